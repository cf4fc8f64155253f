"""The backend soap against gloo, interleaved in one run: all-reduce, all-gather, reduce-scatter and uneven all-to-all on 2 and 4 ranks of this machine.

`python -m pytest benchmarks/test_collectives.py -s` writes benchmarks/results/collectives.md and .json. A repetition takes as long as its slowest rank;
medians, and in brackets the quartiles.
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

from benchmarks.worker_collectives import BACKENDS
from tests.dist.launch import revision, torchrun

RESULTS = Path(__file__).parent / "results"
SECONDS = 1.0  # for each row
RANKS = (2, 4)


def rows(ranks: int) -> list[dict[str, Any]]:
    done = torchrun(ranks, "benchmarks.worker_collectives", str(SECONDS), timeout_s=900)
    assert done.returncode == 0 and all(r is not None for r in done.results), done.output
    out = []
    for measured in zip(*done.results, strict=True):
        row: dict[str, Any] = {"ranks": ranks, "collective": measured[0]["collective"], "bytes": measured[0]["bytes"]}
        for backend in BACKENDS:
            slowest = [max(times) * 1e6 for times in zip(*(m["times_s"][backend] for m in measured), strict=True)]
            low, median, high = statistics.quantiles(slowest, n=4)
            row[backend] = {"median_us": median, "quartiles_us": [low, high], "least_us": min(slowest), "repetitions": len(slowest)}
        row["ratio"] = row["gloo"]["median_us"] / row["soap"]["median_us"]
        out.append(row)
    return out


def shown(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def time_text(measured: dict[str, Any]) -> str:
    median, (low, high) = measured["median_us"], measured["quartiles_us"]
    return f"{median:.0f} us ({low:.0f}-{high:.0f})" if median < 1e4 else f"{median / 1e3:.1f} ms ({low / 1e3:.1f}-{high / 1e3:.1f})"


def table(measured: list[dict[str, Any]]) -> str:
    lines = ["| ranks | collective | per rank | soap | gloo | gloo / soap |", "|---|---|---|---|---|---|"]
    for row in measured:
        cells = [row["ranks"], row["collective"], shown(row["bytes"]), time_text(row["soap"]), time_text(row["gloo"]), f"{row['ratio']:.1f}"]
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines)


def falls_short(row: dict[str, Any]) -> bool:
    """The bars: on 2 ranks 8 times as fast up to 64 KiB and twice at 64 MiB; more ranks than cores: never slower."""
    bar = 1.0 if row["ranks"] > 2 else 8.0 if row["bytes"] <= 64 << 10 else 2.0 if row["bytes"] >= 64 << 20 else 1.0
    return bool(row["ratio"] < bar)


@pytest.mark.timeout(1200)
def test_collectives() -> None:
    measured = [row for ranks in RANKS for row in rows(ranks)]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, revision {revision()}"
    what = "Median over repetitions of the slowest rank's time, and quartiles; one torch thread for each rank."
    text = f"# soap against gloo\n\n{machine}. {what}\n\n{table(measured)}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "collectives.md").write_text(text)
    (RESULTS / "collectives.json").write_text(json.dumps({"machine": machine, "rows": measured}, indent=1) + "\n")
    print("\n" + text)
    short = [f"{r['ranks']} ranks, {r['collective']}, {shown(r['bytes'])}: {r['ratio']:.2f}" for r in measured if falls_short(r)]
    assert not short, short
