"""Fidelity and speed: predicted against measured step times of several plans, and against DDP, in one run. `make benchmark`.

Writes benchmarks/results/step_time.md and .json. Asserts only what must hold on any machine: all plans train alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.worker_step_time import PLANS
from tests.dist.launch import torchrun

RESULTS = Path(__file__).parent / "results"
STEPS, WARM_UP = 9, 2


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values[WARM_UP:], n=4)
    return low, middle, high


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict]]:
    out = {}
    for name in PLANS:
        done = torchrun(2, "benchmarks.worker_step_time", name, str(STEPS), timeout_s=1800)
        assert done.results[0] is not None, done.output
        out[name] = done.results[0]
    return out


def test_plans_train_alike(measured: dict[str, dict[str, dict]]) -> None:
    """Without dropout's own numbers (AlexNet under DDP draws torch's) all losses agree."""
    for name, runs in measured.items():
        wanted = runs["data parallel"]["losses"]
        for label, run in runs.items():
            if label == "DDP (torch)" and name == "alexnet":
                continue
            assert run["losses"] == pytest.approx(wanted, rel=1e-3), f"{name}, {label}"


def test_write_table(measured: dict[str, dict[str, dict]], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "# Step times: predicted and measured",
        "",
        f"`make benchmark`: 2 processes of one thread, 8 rows each, gloo; median [quartiles] of {STEPS - WARM_UP} steps, all plans in turns in one run. "
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores.",
    ]
    for name, runs in measured.items():
        ddp = quartiles(runs["DDP (torch)"]["measured_ms"])[1]
        lines += ["", f"## {name}", "", "| plan | predicted ms | measured ms | predicted / measured | speed against DDP |", "|---|---|---|---|---|"]
        for label, run in runs.items():
            low, middle, high = quartiles(run["measured_ms"])
            predicted = run["predicted_ms"]
            ratio = (
                f"{predicted:.0f} | {middle:.0f} [{low:.0f}, {high:.0f}] | {predicted / middle:.2f}"
                if predicted
                else f"- | {middle:.0f} [{low:.0f}, {high:.0f}] | -"
            )
            lines.append(f"| {label} | {ratio} | {ddp / middle:.2f} |")
        order = [label for label in runs if runs[label]["predicted_ms"]]
        by_prediction = sorted(order, key=lambda label: runs[label]["predicted_ms"])
        by_measurement = sorted(order, key=lambda label: quartiles(runs[label]["measured_ms"])[1])
        pairs = [(a, b) for i, a in enumerate(by_measurement) for b in by_measurement[i + 1 :]]
        right = sum(by_prediction.index(a) < by_prediction.index(b) for a, b in pairs)
        lines += ["", f"Pairs of plans in the right order: {right} of {len(pairs)}."]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_time.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "step_time.json").write_text(json.dumps(measured, indent=1) + "\n")
    with capsys.disabled():
        print("\n".join(["", *lines]))
