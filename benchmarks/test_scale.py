"""Plans for worlds that aren't here: Llama 3 on 64, 1,024 and 16,384 H100, the module on the meta device.

`python -m pytest benchmarks/test_scale.py -s` writes benchmarks/results/scale.md and .json. Each size is planned in a process of its own, whose peak memory is
reported. Asserts what must hold on any machine: the plan is no worse than every grid that a person could write, and fits.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.llama import llama
from tests.dist.launch import revision
from torch_soap import _C, Machine
from torch_soap.grids import plan_grids
from torch_soap.planner import graph_for

RESULTS = Path(__file__).parent / "results"
SEQUENCE, REPEATS, LONGER = 8192, 3, 8
# (size, devices) -> (sequences in the batch, seconds that a plan may take)
CASES: dict[tuple[str, int], tuple[int, float]] = {("8b", 64): (256, 2), ("8b", 1024): (2048, 10), ("70b", 16384): (4096, 60)}


def planned(size: str, devices: int) -> dict[str, Any]:
    batch, _ = CASES[size, devices]
    module = llama(size, SEQUENCE)
    tokens = torch.zeros(batch, SEQUENCE, dtype=torch.long, device="meta")
    begin = time.perf_counter()
    graph = graph_for(module, (tokens, tokens), None, devices)[0]
    capture = time.perf_counter() - begin
    cost = _C.CostModel(Machine.preset("h100", hosts=devices // 8, devices_per_host=8))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        plan = plan_grids(graph, devices, cost)
        seconds.append(time.perf_counter() - begin)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    longer = plan_grids(graph, devices, cost, effort=LONGER)
    seeds = {name: s for name, s in plan.predicted["seeds"].items() if not name.startswith("descent")}
    limit = cost.machine.memory_bytes
    best_seed, seed = min(((n, s["step_time_ns"]) for n, s in seeds.items() if s["memory_bytes"] <= limit), key=lambda x: x[1])
    return {
        "size": size,
        "devices": devices,
        "operators": sum(n.kind == _C.NodeKind.op for n in graph.nodes),
        "capture_s": capture,
        "plan_s": statistics.median(seconds),
        "plan_s_runs": seconds,
        "simulations": plan.stats["simulations"],
        "peak_rss_bytes": memory,
        "plan": plan.predicted["chosen"],
        "step_ns": plan.predicted["step_time_ns"],
        "memory_bytes": max(plan.predicted["memory_bytes"]),
        "limit_bytes": limit,
        "best_seed": best_seed,
        "best_seed_ns": seed,
        "seeds": len(seeds),
        "longer_ns": longer.predicted["step_time_ns"],
        "longer_simulations": longer.stats["simulations"],
    }


def test_scale() -> None:
    rows = []
    for size, devices in CASES:
        run = subprocess.run([sys.executable, "-m", "benchmarks.test_scale", size, str(devices)], capture_output=True, text=True, check=False)
        if run.returncode:
            pytest.fail(run.stderr[-2000:])
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    for row in rows:
        assert row["memory_bytes"] <= row["limit_bytes"]
        assert row["step_ns"] <= row["best_seed_ns"]
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    lines = [
        "# Plans for thousands of devices",
        "",
        f"`python -m pytest benchmarks/test_scale.py -s` on {platform.processor() or platform.machine()}, {os.cpu_count()} cores, revision {revision()}.",
        f"Llama 3 in bfloat16, sequences of {SEQUENCE} tokens, preset h100 with 8 devices per host. Plan: median of {REPEATS} runs, one core; goal in",
        "brackets. Peak memory is the whole process', torch included. The last column: how much faster the plan of a search is that has eight times",
        "the simulations of descent.",
        "",
        "| model | devices | capture s | plan s | simulations | peak GiB | plan | step ms | best of the grids ms | 8x longer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        goal = CASES[r["size"], r["devices"]][1]
        lines.append(
            f"| {r['size']} | {r['devices']} | {r['capture_s']:.1f} | {r['plan_s']:.2f} ({goal:g}) | {r['simulations']} "
            f"| {r['peak_rss_bytes'] / 2**30:.2f} | {r['plan']} | {r['step_ns'] / 1e6:.1f} | {r['best_seed_ns'] / 1e6:.1f} of {r['seeds']} "
            f"| {1 - r['longer_ns'] / r['step_ns']:.2%} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "scale.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    print(json.dumps(planned(sys.argv[1], int(sys.argv[2]))))
