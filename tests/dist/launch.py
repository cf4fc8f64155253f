"""Runs a script on N real processes under torchrun and collects what each rank wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE_S = 40.0  # torchrun kills workers that haven't ended after 30
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """results[rank] is what the rank handed to `report`, None when it didn't come that far."""

    returncode: int
    output: str
    results: list[Any]


def environment(**extra: str) -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}
    return {k: v for k, v in env.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}


def torchrun(
    nproc: int, module: str, *arguments: str, timeout_s: float = 600.0, options: tuple[str, ...] = ("--standalone",), env: dict[str, str] | None = None
) -> Outcome:
    """`torchrun -m module arguments` on `nproc` processes of this machine, one torch thread each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={nproc}", "-m", module, *arguments]
        variables = environment(SOAP_TEST_OUT=folder, **(env or {}))
        running = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, err = running.communicate(timeout=timeout_s)
        finally:
            end(running)
        return Outcome(running.returncode, out[-6000:] + err[-12000:], read_results(folder, nproc))


def end(running: subprocess.Popen[str]) -> None:
    """Of torchrun, where it still runs. Its workers have sessions of their own: only it ends them, if it is asked."""
    if running.poll() is None:
        running.terminate()
        try:
            running.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def revision() -> str:
    """Of the checkout, for reports."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def read_results(folder: str, nproc: int) -> list[Any]:
    files = [Path(folder) / f"{rank}.json" for rank in range(nproc)]
    return [json.loads(f.read_text()) if f.exists() else None for f in files]


def report(result: Any) -> None:
    """On a rank: hands a result to the launcher; the last one counts."""
    (Path(os.environ["SOAP_TEST_OUT"]) / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
