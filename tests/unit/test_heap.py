"""Freed memory stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.dist.launch import ROOT

FAULTS = """
import resource, statistics, torch
from torch_soap.runtime.heap import keep_freed_memory
done = keep_freed_memory()
x = torch.ones(10 << 20)  # 40 MiB: glibc would ask the kernel for each copy
faults = []
for turn in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.clone()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(done, statistics.median(faults[2:]))  # the kernel may take idle memory back once
"""


def faults(**env: str) -> list[str]:
    variables = {**{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, "-c", FAULTS], env=variables, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_copies_of_a_large_tensor_take_the_same_memory() -> None:
    done, each = faults()
    assert done == "True" and int(each) < 100
    done, each = faults(MALLOC_ARENA_MAX="4")  # the user's own choice
    assert done == "False" and int(each) > 1000
