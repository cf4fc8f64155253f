"""The backend soap against gloo, interleaved in one run: all-reduce, all-gather, reduce-scatter and uneven all-to-all on 2 and 4 ranks of this machine,
and of two hosts.

`python -m pytest benchmarks/test_collectives.py -s` writes benchmarks/results/collectives.md and .json, and the same of collectives_hosts, for which it must
be root: hosts are network namespaces, joined at 1 Gb/s (tests/dist/hosts.py). A repetition takes as long as its slowest rank; medians, and in brackets the
quartiles. *The wire*: what leaves a host at that rate, if nothing leaves twice.
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
from tests.dist.hosts import Host, NoHosts, torchrun_on, two_hosts
from tests.dist.launch import Outcome, revision, torchrun

RESULTS = Path(__file__).parent / "results"
SECONDS = 1.0  # for each row
RANKS = (2, 4)
# Between hosts: ranks of each, bytes, and the link.
PER_HOST = (1, 2)
BETWEEN_HOSTS = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
LINK, LINK_BYTES_PER_S = "1gbit", 125e6
LARGE = 16 << 20
WIRE_BAR = 1.15


def rows(ranks: int) -> list[dict[str, Any]]:
    return rows_of(torchrun(ranks, "benchmarks.worker_collectives", str(SECONDS), timeout_s=900), ranks)


def rows_between_hosts(hosts: list[Host], per_host: int) -> list[dict[str, Any]]:
    sizes = [str(size) for size in BETWEEN_HOSTS]
    out = rows_of(torchrun_on(hosts, per_host, "benchmarks.worker_collectives", str(SECONDS), *sizes, timeout_s=900), len(hosts) * per_host)
    for row in out:
        row["per_host"] = per_host
        row["wire_us"] = bytes_between(row["collective"], row["bytes"], per_host) / LINK_BYTES_PER_S * 1e6
    return out


def bytes_between(collective: str, num_bytes: int, per_host: int) -> float:
    """What has to leave each of two hosts (at least one of them)."""
    if collective == "all-reduce":
        return num_bytes
    if collective != "all-to-all":
        return per_host * num_bytes
    ranks = 2 * per_host
    weights = [[3 if (r + s) % 2 else 1 for s in range(ranks)] for r in range(ranks)]
    here = range(per_host)
    return sum(num_bytes * weights[r][s] / sum(weights[r]) for r in here for s in range(per_host, ranks))


def rows_of(done: Outcome, ranks: int) -> list[dict[str, Any]]:
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


def table_between_hosts(measured: list[dict[str, Any]]) -> str:
    lines = ["| ranks | collective | per rank | soap | gloo | gloo / soap | the wire | soap / wire |", "|---|---|---|---|---|---|---|---|"]
    for row in measured:
        on_wire = row["soap"]["median_us"] / row["wire_us"]
        wire = f"{row['wire_us'] / 1e3:.1f} ms", f"{on_wire:.2f}" if row["bytes"] >= 1 << 20 else ""
        cells = [f"2 x {row['per_host']}", row["collective"], shown(row["bytes"]), time_text(row["soap"]), time_text(row["gloo"]), f"{row['ratio']:.1f}", *wire]
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines)


def write(name: str, title: str, measured: list[dict[str, Any]], shown_as: str) -> None:
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, revision {revision()}"
    what = "Median over repetitions of the slowest rank's time, and quartiles; one torch thread for each rank."
    text = f"# {title}\n\n{machine}. {what}\n\n{shown_as}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": measured}, indent=1) + "\n")
    print("\n" + text)


@pytest.mark.timeout(1200)
def test_collectives_between_hosts() -> None:
    """The bars: all-gather and reduce-scatter of 16 MiB near the wire; nothing slower than gloo (by more than noise)."""
    measured = []
    try:
        with two_hosts(LINK) as hosts:
            for per_host in PER_HOST:
                measured += rows_between_hosts(hosts, per_host)
    except NoHosts as error:
        pytest.skip(str(error))
    write("collectives_hosts", "soap against gloo between two hosts, 1 Gb/s", measured, table_between_hosts(measured))
    names = [f"2 x {r['per_host']} ranks, {r['collective']}, {shown(r['bytes'])}: " for r in measured]
    short = [f"{name}{r['ratio']:.2f} of gloo's speed" for name, r in zip(names, measured, strict=True) if r["ratio"] < 0.95]
    for name, r in zip(names, measured, strict=True):
        if r["collective"] in ("all-gather", "reduce-scatter") and r["bytes"] == LARGE and r["soap"]["median_us"] > WIRE_BAR * r["wire_us"]:
            short.append(f"{name}{r['soap']['median_us'] / r['wire_us']:.2f} of the wire's time")
    assert not short, short


@pytest.mark.timeout(1200)
def test_collectives() -> None:
    measured = [row for ranks in RANKS for row in rows(ranks)]
    write("collectives", "soap against gloo", measured, table(measured))
    short = [f"{r['ranks']} ranks, {r['collective']}, {shown(r['bytes'])}: {r['ratio']:.2f}" for r in measured if falls_short(r)]
    assert not short, short
