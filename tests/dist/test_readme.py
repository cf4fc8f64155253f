"""README's first example, as a user runs it: a script in a folder of its own, under torchrun, with nothing but `parallelize(model)`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launch import ROOT, environment


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_first_example(processes: int, tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None and "parallelize(" in example[1]
    script = tmp_path / "train.py"
    script.write_text(example[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(TORCH_SOAP_CACHE=str(tmp_path)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = "one process" if processes == 1 else "predicted step"
    assert done.stdout.count(said) == processes
