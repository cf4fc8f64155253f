"""Delta simulation: changes per second against full simulations, on one core.

`python -m pytest benchmarks/test_delta_speed.py -s` writes benchmarks/results/delta.md and .json. Asserts only that both say the same.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch.nn import functional as F

from benchmarks import flexflow_models
from tests.dist.launch import revision
from tests.unit.planning import graph_of
from torch_soap import _C
from torch_soap.machine import Machine

RESULTS = Path(__file__).parent / "results"
CASES = [("alexnet", 1, 4), ("resnet50", 4, 4), ("inception_v3", 16, 4), ("nmt", 16, 4)]  # model, hosts, devices of each
BARS = {"resnet50": 10_000, "inception_v3": 3_000, "nmt": 3_000}  # changes per second
ROWS, CHANGES, ROUNDS, KEPT = 32, 1000, 5, 0.2
NMT_ROWS = flexflow_models.BATCH.get("nmt", 64)  # a device


def graph(name: str, world: int) -> _C.OpGraph:
    if name == "nmt":
        module, inputs, loss = flexflow_models.build(name, world)
        assert inputs[0].shape[0] == NMT_ROWS * world
        return graph_of(module, *inputs, loss=loss)
    with torch.device("meta"):
        model = tv.inception_v3(aux_logits=False, init_weights=False) if name == "inception_v3" else tv.get_model(name)
    size = 299 if name == "inception_v3" else 224
    images = torch.empty(ROWS * world, 3, size, size, device="meta")
    return graph_of(model, images, torch.empty(ROWS * world, dtype=torch.long, device="meta"), loss=F.cross_entropy)


def configs(graph: _C.OpGraph, world: int) -> list[tuple[int, list[_C.OpConfig | None]]]:
    """Of each operator: following, the processes' rows, and each factor cut into 2 or over all devices."""
    out: list[tuple[int, list[_C.OpConfig | None]]] = []
    for node in graph.nodes:
        if node.kind != _C.NodeKind.op:
            continue
        own: list[_C.OpConfig | None] = [None, _C.OpConfig([("n", _C.Cut(tiles=world, fed=True))])]
        for factor in _C.make_rule(graph, node, world).factors:
            if factor.cut != _C.Cuttable.whole:
                own += [_C.OpConfig([(factor.name, _C.Cut(tiles=t))]) for t in (2, world) if factor.size // factor.unit >= t]
        out.append((node.id, own))
    return out


def measure(name: str, hosts: int, per_host: int, overlap: bool) -> dict[str, Any]:
    world = hosts * per_host
    ops, rows = graph(name, world), [NMT_ROWS if name == "nmt" else ROWS] * world
    machine = Machine.preset("p100", hosts=hosts, devices_per_host=per_host)
    machine.overlap = overlap
    cost, start = _C.CostModel(machine), dict(_C.seeds(ops, world))["ddp"]
    begin = time.process_time()
    delta = _C.DeltaSimulator(ops, start, rows, cost)
    first_s = time.process_time() - begin
    choices, rng, rates = configs(ops, world), random.Random(0), []
    for _ in range(ROUNDS):
        draws = [(node, rng.choice(own), rng.random() < KEPT) for node, own in rng.choices(choices, k=CHANGES)]
        begin = time.process_time()
        for node, config, keep in draws:
            delta.change(node, config)
            if not keep:
                delta.undo()
        rates.append(CHANGES / (time.process_time() - begin))
    begin = time.process_time()
    full = _C.simulate(_C.lower(ops, delta.strategy, rows), cost).step_ns
    full_s = time.process_time() - begin
    assert delta.step_ns == full
    return {
        "model": name, "devices": world, "overlap": overlap, "nodes": len(ops.nodes), "first_ms": first_s * 1e3,
        "changes_per_s": rates, "full_ms": full_s * 1e3, "factor": full_s * statistics.median(rates),
    }  # fmt: skip


def test_write_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [measure(*case, overlap) for case in CASES for overlap in (False, True)]
    lines = [
        "# Delta simulation",
        "",
        f"`python -m pytest benchmarks/test_delta_speed.py -s`: random changes of one operator, one in five kept; CPU time of one thread, median [range] "
        f"of {ROUNDS} rounds of {CHANGES}. Full: lower and simulate, once. P100 preset, 4 devices a host, {ROWS} rows a device ({NMT_ROWS} of NMT's). "
        f"Revision {revision()}, {platform.machine()}, {os.cpu_count()} cores.",
        "",
        "| model | devices | overlap | nodes | first ms | changes/s | bar | full ms | factor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rates = r["changes_per_s"]
        lines.append(
            f"| {r['model']} | {r['devices']} | {'yes' if r['overlap'] else 'no'} | {r['nodes']} | {r['first_ms']:.0f} | "
            f"{statistics.median(rates):.0f} [{min(rates):.0f}, {max(rates):.0f}] | {BARS.get(r['model'], '-')} | {r['full_ms']:.0f} | {r['factor']:.0f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "delta.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "delta.json").write_text(json.dumps(rows, indent=1) + "\n")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
