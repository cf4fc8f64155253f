"""What graph rewrites bring: predicted and measured step times with and without, in turns in one run. `pytest benchmarks/test_rewrite_gain.py`.

Writes benchmarks/results/rewrites.md and .json. Asserts only that the plans ran and which of them rewrite.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.worker_rewrites import MODELS, ROWS
from tests.dist.launch import revision, torchrun

RESULTS = Path(__file__).parent / "results"
STEPS, WARM_UP = 23, 3


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict]]:
    out = {}
    for name in MODELS:
        done = torchrun(2, "benchmarks.worker_rewrites", name, str(STEPS), timeout_s=600)
        assert done.results[0] is not None, done.output
        out[name] = done.results[0]
    return out


def test_write_table(measured: dict[str, dict[str, dict]], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "# Graph rewrites: step times with and without",
        "",
        f"`pytest benchmarks/test_rewrite_gain.py`: 2 processes of one thread, {ROWS} rows each, gloo; median [quartiles] of {STEPS - WARM_UP} steps, all "
        f"plans in turns in one run. Revision {revision()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores.",
    ]
    for name, runs in measured.items():
        lines += ["", f"## {name}", "", "| plan | rewrites | predicted ms | measured ms |", "|---|---|---|---|"]
        for label, run in runs.items():
            low, middle, high = statistics.quantiles(run["measured_ms"][WARM_UP:], n=4)
            kinds = [r.split()[0] for r in run["rewrites"]]
            words = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds)) or "none"
            lines.append(f"| {label} | {words} | {run['predicted_ms']:.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
            assert bool(kinds) == (", fuse" in label or ", unary" in label) or label == "searched", f"{name}, {label}: {run['rewrites']}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rewrites.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "rewrites.json").write_text(json.dumps(measured, indent=1) + "\n")
    with capsys.disabled():
        print("\n".join(["", *lines]))
