"""The runtime's own cost: what a step of a parallelized model takes beyond its operators, collectives and optimizer.

`python -m pytest benchmarks/test_runtime_cost.py -s` writes benchmarks/results/runtime_cost.md and .json. Real steps of two ranks of this machine are run
as they are. The engine times what it calls: each segment's operators, autograd's run through each segment, movements between ranks with the copies that they
make. c10d's calls, by which ranks agree, and the optimizer's step and zero_grad are timed from outside. The rest of the step is the runtime's own: walks
over parameters, movements within a rank, what is between instructions, the outer backward that hands gradients to parameters.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.worker_runtime_cost import CASES
from tests.dist.launch import revision, torchrun

RESULTS = Path(__file__).parent / "results"
STEPS = 15
BAR = 0.02  # of the step on the smallest model of the fidelity table (issue 6)
KINDS = ("step", "operators", "movements", "agreement", "optimizer", "own")


def rows(name: str, steps: int = STEPS) -> list[dict[str, Any]]:
    """For each plan the medians over steps of the slowest rank in each, in ms."""
    done = torchrun(2, "benchmarks.worker_runtime_cost", name, str(steps), timeout_s=900)
    assert done.returncode == 0 and all(r is not None for r in done.results), done.output
    first = done.results[0]
    out = []
    for label, of_plan in first["plans"].items():
        row: dict[str, Any] = {"model": name, "plan": label, "parameters": first["parameters"], "modules": first["modules"]}
        row["instructions"] = of_plan["instructions"]
        per_rank = [r["plans"][label]["steps"] for r in done.results]
        slowest = [max(ranks, key=lambda s: s["own"]) for ranks in zip(*per_rank, strict=True)]
        row |= {kind: statistics.median(s.get(kind, 0.0) for s in slowest) for kind in KINDS}
        row["least own"] = min(s["own"] for s in slowest)
        out.append(row)
    return out


def table(measured: list[dict[str, Any]]) -> str:
    lines = [
        "| model | plan | instructions | parameters | step ms | operators | movements | agreement | optimizer | own ms (least) | own, of the step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in measured:
        times = [f"{r[kind]:.2f}" for kind in ("step", "operators", "movements", "agreement", "optimizer")]
        own = [f"{r['own']:.2f} ({r['least own']:.2f})", f"{100 * r['own'] / r['step']:.1f} %"]
        lines.append("| " + " | ".join([r["model"], r["plan"], str(r["instructions"]), str(r["parameters"]), *times, *own]) + " |")
    return "\n".join(lines)


@pytest.mark.timeout(3600)
def test_runtime_cost() -> None:
    measured = [row for name in CASES for row in rows(name)]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, revision {revision()}"
    what = (
        f"Bar: {BAR:.0%} of the step on the smallest model of the fidelity table. Two ranks of one thread over shared memory, medians of {STEPS} steps in ms, "
        "of the rank whose own cost is the larger."
    )
    text = f"# The runtime's own cost of a step\n\n{machine}. {what}\n\n{table(measured)}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "runtime_cost.md").write_text(text)
    (RESULTS / "runtime_cost.json").write_text(json.dumps({"machine": machine, "rows": measured}, indent=1) + "\n")
    print("\n" + text)
    for row in measured:
        parts = sum(row[kind] for kind in ("operators", "movements", "agreement", "optimizer", "own"))
        assert row["own"] > 0 and abs(parts - row["step"]) < 0.25 * row["step"], row
