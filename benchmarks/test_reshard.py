"""A tensor of 64 MiB from one layout to another on two ranks: the movement that a plan has there, against DTensor.redistribute on soap and on gloo.

`python -m pytest benchmarks/test_reshard.py -s` writes benchmarks/results/reshard.md and .json. A repetition takes as long as its slowest rank; medians, and
in brackets the quartiles.
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

from tests.dist.launch import revision, torchrun

RESULTS = Path(__file__).parent / "results"
SECONDS = 4.0  # for each pair
BAR = 5.0
NAMES = {"ours": "movement", "soap": "DTensor on soap", "gloo": "DTensor on gloo"}


def rows() -> list[dict[str, Any]]:
    done = torchrun(2, "benchmarks.worker_reshard", str(SECONDS), timeout_s=900)
    assert done.returncode == 0 and all(r is not None for r in done.results), done.output
    out = []
    for measured in zip(*done.results, strict=True):
        row: dict[str, Any] = {k: measured[0][k] for k in ("before", "after", "shape")}
        row["same"] = all(m["same"] for m in measured)
        for way in NAMES:
            slowest = [max(times) * 1e6 for times in zip(*(m["times_s"][way] for m in measured), strict=True)]
            low, median, high = statistics.quantiles(slowest, n=4)
            row[way] = {"median_us": median, "quartiles_us": [low, high], "least_us": min(slowest), "repetitions": len(slowest)}
        out.append(row)
    return out


def time_text(measured: dict[str, Any]) -> str:
    median, (low, high) = measured["median_us"], measured["quartiles_us"]
    return f"{median:.0f} us ({low:.0f}-{high:.0f})" if median < 1e4 else f"{median / 1e3:.1f} ms ({low / 1e3:.1f}-{high / 1e3:.1f})"


def ratio(row: dict[str, Any], way: str) -> float:
    return float(row[way]["median_us"] / row["ours"]["median_us"])


def table(measured: list[dict[str, Any]]) -> str:
    lines = ["| shape | from | to | " + " | ".join(NAMES.values()) + " | on soap / movement | on gloo / movement |", "|---|---|---|---|---|---|---|---|"]
    for row in measured:
        times = [time_text(row[way]) for way in NAMES]
        lines.append(
            f"| {row['shape']} | {row['before']} | {row['after']} | " + " | ".join(times) + f" | {ratio(row, 'soap'):.2f} | {ratio(row, 'gloo'):.2f} |"
        )
    return "\n".join(lines)


@pytest.mark.timeout(1200)
def test_reshard() -> None:
    measured = rows()
    assert all(row["same"] for row in measured), measured
    means = {way: statistics.geometric_mean(ratio(row, way) for row in measured) for way in ("soap", "gloo")}
    moving = {way: statistics.geometric_mean(ratio(row, way) for row in measured if row["before"] != "whole") for way in ("soap", "gloo")}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, revision {revision()}"
    what = "Two ranks, one torch thread each. Median over repetitions of the slowest rank's time, and quartiles. From whole tensors nothing crosses."
    mean = "; ".join(f"{NAMES[way]} / movement {means[way]:.1f}, {moving[way]:.1f} without the pairs in which nothing crosses" for way in means)
    text = f"# Reshard against DTensor.redistribute\n\n{machine}. {what}\n\n{table(measured)}\n\nGeometric means: {mean}.\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reshard.md").write_text(text)
    data = {"machine": machine, "geometric_means": means, "without_local": moving, "rows": measured}
    (RESULTS / "reshard.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n" + text)
    assert means["gloo"] >= BAR, f"{means['gloo']:.2f} times as fast as DTensor on gloo, the bar is {BAR}"
