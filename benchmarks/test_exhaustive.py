"""The optimum of LeNet and of two steps of an RNN language model on up to 4 devices, with its proof, and whether the searches find it.

FlexFlow (Jia et al., MLSys 2019, section 8.4) needed 0.8 and 18 hours for the proof; its MCMC found the same plan in less than a second.
`python -m pytest benchmarks/test_exhaustive.py -s` writes benchmarks/results/exhaustive.md and .json.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.dist.launch import revision
from tests.unit.planning import graph_of
from tests.unit.test_exhaustive import Recurrent, each_word
from tests.unit.test_optcnn import LeNet
from torch_soap import _C

RESULTS = Path(__file__).parent / "results"
ROWS, REPEATS = 64, 5  # rows per device: FlexFlow's batch
DEVICES = (1, 2, 4)
SIMULATIONS = 10_000  # of the search, of descent and of MCMC each
FLEXFLOW_OPERATORS = ("embedding", "lstm_layer", "linear", "ce_rows")


def lenet(rows: int) -> _C.OpGraph:
    return graph_of(LeNet().to("meta"), torch.empty(rows, 1, 28, 28, device="meta"), torch.empty(rows, dtype=torch.long, device="meta"), loss=F.cross_entropy)


def rnnlm(rows: int) -> _C.OpGraph:
    """FlexFlow's sizes: two layers of 2048, a vocabulary of 10,000."""
    with torch.device("meta"):
        words = torch.empty(rows, 2, dtype=torch.long)
        model: nn.Module = Recurrent(10_000, 2048)
        return graph_of(model, words, words, loss=each_word)


def timed(run: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    out = run()
    return out, time.perf_counter() - begin


def inside(strategy: _C.Strategy, space: _C.ExhaustiveSpace, graph: _C.OpGraph) -> bool:
    """Whether a plan is one of the space's: each of its configurations is the layer's, and nothing else is configured."""
    heads = {graph.nodes[h].name: configs for h, configs in zip(space.heads, space.configs, strict=True)}
    return set(strategy.nodes) == set(heads) and all(config in heads[name] for name, config in strategy.nodes.items())


def examined(name: str, devices: int) -> dict[str, Any]:
    graph = (lenet if name == "lenet" else rnnlm)(ROWS * devices)
    rows, cost = [ROWS] * devices, _C.CostModel(_C.machine_preset("p100", 1, devices))
    options = _C.ExhaustiveOptions()
    if name == "rnnlm":
        options.operators = [n.name for n in graph.nodes if n.target in FLEXFLOW_OPERATORS]
    runs = []
    for _ in range(REPEATS):
        space, space_s = timed(lambda: _C.exhaustive_space(graph, rows, cost, options))
        found, search_s = timed(lambda: _C.exhaustive_search(graph, rows, cost, space, options))  # noqa: B023
        runs.append(space_s + search_s)
    search_options = _C.SearchOptions()
    search_options.descent_simulations = search_options.mcmc_simulations = SIMULATIONS
    searched, searched_s = timed(lambda: _C.search(graph, rows, cost, search_options))
    best = searched.candidates[searched.best]
    out = {
        "operators": sum(n.kind == _C.NodeKind.op for n in graph.nodes),
        "layers": len(space.heads),
        "configurations": list(found.configurations),
        "plans": found.plans,
        "seconds": sorted(runs)[len(runs) // 2],
        "proven": found.proven,
        "bounds": found.bounds,
        "pruned": found.pruned,
        "simulated": found.simulated,
        "last_better": found.last_better,
        "optimum_ms": found.step_ns / 1e6,
        "plan": _C.print_plan(graph, found.strategy),
        "search": {"chosen": best.name, "ms": best.step_ns / 1e6, "seconds": searched_s, "inside": inside(best.strategy, space, graph)},
        "candidates_ms": {c.name: c.step_ns / 1e6 for c in searched.candidates if c.step_ns >= 0},
    }
    if devices > 1:
        plan, plan_s = timed(lambda: _C.optimize_layers(graph, rows, cost))
        out["optcnn"] = {"ms": _C.simulate(_C.lower(graph, plan.strategy, rows), cost).step_ns / 1e6, "seconds": plan_s, "exact": plan.choices.exact}
    return out


@pytest.fixture(scope="module")
def results() -> dict[str, dict[int, dict[str, Any]]]:
    return {name: {devices: examined(name, devices) for devices in DEVICES} for name in ("lenet", "rnnlm")}


def test_every_optimum_is_proven_and_no_plan_of_its_space_is_faster(results: dict[str, dict[int, dict[str, Any]]]) -> None:
    for name, by_devices in results.items():
        for devices, r in by_devices.items():
            assert r["proven"], (name, devices)
            if r["search"]["inside"]:
                assert r["search"]["ms"] >= r["optimum_ms"], (name, devices)


def test_write_table(results: dict[str, dict[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "# Exhaustive search",
        "",
        f"`python -m pytest benchmarks/test_exhaustive.py -s`, revision {revision()}: P100 preset, one host, {ROWS} rows per device, wall seconds, median of "
        f"{REPEATS} (space, bounds and simulations together). torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores. "
        "Space: csrc/search/exhaustive.h; of RNNLM (two steps) the operators that FlexFlow has: embeddings, LSTM cells, linears and softmaxes, each "
        "step by itself. FlexFlow's own proofs took 0.8 and 18 hours (arXiv:1807.05358, section 8.4).",
        "",
        "| model | devices | layers | plans | bounds | left out | simulated | best found after | optimum, ms | proof, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, by_devices in results.items():
        for devices, r in by_devices.items():
            lines.append(
                f"| {name} | {devices} | {r['layers']} | {r['plans']:.1e} | {r['bounds']} | {r['pruned']} | {r['simulated']} | {r['last_better']} bounds "
                f"| {r['optimum_ms']:.4f} | {r['seconds']:.3f} |"
            )
    lines += [
        "",
        f"What the other searches find, simulated, and by how much that is slower than the optimum (negative: a plan outside the space, whose parameters are "
        f"stored in parts, or which cuts what follows apart, unevenly or on other devices). The search has {SIMULATIONS} simulations of descent and of "
        "MCMC each; OptCNN's dynamic program is exact by its own cost, which isn't the simulation's.",
        "",
        "| model | devices | search, ms | found by | gap | in the space | s | OptCNN, ms | gap | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, by_devices in results.items():
        for devices, r in by_devices.items():
            search, optcnn, best = r["search"], r.get("optcnn"), r["optimum_ms"]
            line = f"| {name} | {devices} | {search['ms']:.4f} | {search['chosen']} | {100 * (search['ms'] / best - 1):+.2f} % "
            line += f"| {'yes' if search['inside'] else 'no'} | {search['seconds']:.2f} "
            line += f"| {optcnn['ms']:.4f} | {100 * (optcnn['ms'] / best - 1):+.2f} % | {optcnn['seconds']:.3f} |" if optcnn else "| - | - | - |"
            lines.append(line)
    RESULTS.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "revision": revision()}
    (RESULTS / "exhaustive.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "exhaustive.json").write_text(json.dumps({"where": machine, "models": results}, indent=1) + "\n")
    with capsys.disabled():
        print("\n".join(["", *lines]))
