"""OptCNN's search on its own models: time of the tables and of the elimination, and what its plan costs beside those that a person writes.

`python -m pytest benchmarks/test_optcnn.py -s` writes benchmarks/results/optcnn.md and .json. Asserts what must hold on any machine: no plan of
the same space costs less.
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
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F

from tests.dist.launch import revision
from tests.unit.planning import graph_of, p100
from torch_soap import _C

RESULTS = Path(__file__).parent / "results"
DEVICES, ROWS, REPEATS = 4, 32, 11
BARS_MS = {"alexnet": 2, "vgg16": 10, "inception_v3": 40}  # the goal; OptCNN's own table: 20, 100, 400
VGG_BLOCK = ["features.24", "features.26", "features.28", "features.30"]  # its last three convolutions and their pool


def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return tv.inception_v3(aux_logits=False, init_weights=False) if name == "inception_v3" else tv.get_model(name)


def graph(name: str) -> _C.OpGraph:
    size, rows = 299 if name == "inception_v3" else 224, DEVICES * ROWS
    images = torch.empty(rows, 3, size, size, device="meta")
    return graph_of(model(name), images, torch.empty(rows, dtype=torch.long, device="meta"), loss=F.cross_entropy)


def cut(factor: str, tiles: int) -> tuple[str, _C.Cut]:
    return factor, _C.Cut(tiles=tiles)


def changed(strategy: _C.Strategy, configs: dict[str, _C.OpConfig]) -> _C.Strategy:
    out = strategy.copy()
    for name, config in configs.items():
        out.set(name, config)
    return out


def written(name: str, g: _C.OpGraph) -> dict[str, _C.Strategy]:
    """Plans that a person would write."""
    seeds = dict(_C.seeds(g, DEVICES))
    linears = [n.name for n in g.nodes if n.target == "linear"]
    out = {"one device": seeds["one device"], "DDP": seeds["ddp"]}
    out["OWT"] = changed(seeds["ddp"], {n: _C.OpConfig([cut("o", DEVICES)]) for n in linears})
    if name == "vgg16":
        spatial = {n: _C.OpConfig([cut("h", 2), cut("w", 2)]) for n in VGG_BLOCK}
        out["OptCNN, table 5"] = changed(out["OWT"], {**spatial, linears[-1]: _C.OpConfig([cut("o", 2)]), "/ce_rows": _C.OpConfig(devices=[0])})
    return out


def measured(name: str) -> dict[str, Any]:
    g, rows, cost = graph(name), [ROWS] * DEVICES, _C.CostModel(p100(DEVICES))
    out: dict[str, Any] = {}
    for space, options in (("OptCNN's space", _C.LayerOptions(reductions=False)), ("with reductions", _C.LayerOptions())):
        plans = [_C.optimize_layers(g, rows, cost, options) for _ in range(REPEATS)]
        plan, costs = plans[0], _C.layer_costs(g, rows, cost, options)
        others = {}
        for label, strategy in written(name, g).items():
            choice = _C.choices_of(g, costs, strategy)
            if choice is not None:
                others[label] = costs.choices.cost(choice) / 1e6
        tables, elimination = ([getattr(p, f"{part}_seconds") * 1e3 for p in plans] for part in ("table", "elimination"))
        out[space] = {
            "nodes": sum(n.kind == _C.NodeKind.op for n in g.nodes),
            "layers": plan.layers,
            "distinct_layers": plan.distinct_layers,
            "edges": plan.edges,
            "configurations": plan.configurations,
            "largest": plan.largest,
            "left": plan.choices.left,
            "with_tables": plan.choices.with_tables,
            "exact": plan.choices.exact,
            "table_ms": statistics.median(tables),
            "table_best_ms": min(tables),
            "elimination_ms": statistics.median(elimination),
            "cost_ms": plan.cost_ns / 1e6,
            "others_ms": others,
            "plan": _C.print_plan(g, plan.strategy),
        }
    return out


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return {name: measured(name) for name in BARS_MS}


def test_no_written_plan_costs_less(results: dict[str, dict[str, Any]]) -> None:
    for name, spaces in results.items():
        for space, run in spaces.items():
            assert run["exact"] and {"DDP", "one device", "OWT"} <= set(run["others_ms"]), (name, space)
            assert run["cost_ms"] <= min(run["others_ms"].values()), (name, space)
        assert spaces["with reductions"]["cost_ms"] <= spaces["OptCNN's space"]["cost_ms"]


def test_write_table(results: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "# OptCNN's search",
        "",
        f"`python -m pytest benchmarks/test_optcnn.py -s`, revision {revision()}: {DEVICES} P100 (tests/unit/planning.py), {ROWS} rows each, median "
        f"[smallest] of {REPEATS} runs in milliseconds of the thread's CPU time. torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores. "
        "K: layers that node and edge elimination alone leave; elimination of leaves then leaves none.",
        "",
        "| model | space | operators | layers (distinct) | edges | configurations (largest) | K | tables ms | elimination ms | bar, together |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, spaces in results.items():
        for space, r in spaces.items():
            lines.append(
                f"| {name} | {space} | {r['nodes']} | {r['layers']} ({r['distinct_layers']}) | {r['edges']} | {r['configurations']} ({r['largest']}) "
                f"| {r['left']} | {r['table_ms']:.1f} [{r['table_best_ms']:.1f}] | {r['elimination_ms']:.2f} | {BARS_MS[name]} |"
            )
    lines += [
        "",
        "Layer-wise cost in milliseconds:",
        "",
        "| model | space | found | OWT | DDP | one device | OptCNN's table 5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, spaces in results.items():
        for space, r in spaces.items():
            others = [f"{r['others_ms'][o]:.2f}" if o in r["others_ms"] else "-" for o in ("OWT", "DDP", "one device", "OptCNN, table 5")]
            lines.append(f"| {name} | {space} | {r['cost_ms']:.2f} | {' | '.join(others)} |")
    RESULTS.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "revision": revision()}
    (RESULTS / "optcnn.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "optcnn.json").write_text(json.dumps({"where": machine, "models": results}, indent=1) + "\n")
    with capsys.disabled():
        print("\n".join(["", *lines]))
