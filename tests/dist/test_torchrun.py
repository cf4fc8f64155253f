"""The launcher of the tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.dist.launch import torchrun


def test_a_launch_that_takes_too_long_leaves_no_worker() -> None:
    asleep = "import time; time.sleep(300.125)"
    with pytest.raises(subprocess.TimeoutExpired):
        torchrun(1, "timeit", "-n1", "-r1", asleep, timeout_s=8.0)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if asleep.encode() in read(p)]
    assert not left


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
