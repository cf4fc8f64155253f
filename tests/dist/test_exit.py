"""Nothing of ours keeps a process group until the interpreter has ended: its threads would abort the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.dist.launch import ROOT

SCRIPT = """
import atexit, weakref
ended = []
atexit.register(lambda: print("ended" if ended[0]() is None else "held"))  # runs after those registered later
import torch.distributed as dist
from torch_soap.runtime.comm import TorchComm
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ended.append(weakref.ref(dist.group.WORLD))
comm = TorchComm()
assert comm.gather_ints([3]) == [[3]]
{}
"""


@pytest.mark.parametrize(("last", "then"), [("dist.destroy_process_group()", "ended"), ("", "held")])
def test_a_process_group_that_was_left_has_ended_before_the_interpreter(last: str, then: str) -> None:
    """`held`: one that the program never left is torch's."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(last)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [then]
