"""Another planner beside ours: AutoParallel's integer program on the same module, mesh and batch; its plan priced by our simulator.

`python -m pytest benchmarks/test_peers.py -s` writes benchmarks/results/peers.md and .json; a run takes
minutes, nearly all of them the peer's. Skips where the peer isn't there:

    pip install --target FOLDER pulp
    git clone https://github.com/meta-pytorch/autoparallel FOLDER/autoparallel-source
    export SOAP_PEERS=FOLDER:FOLDER/autoparallel-source
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peer_model import Model
from tests.dist.launch import revision
from tests.unit.planning import graph_of
from torch_soap import _C

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent
LENGTH, HIDDEN, HEADS = 1024, 2048, 16
# layers, rows, mesh
CASES = {
    "1 layer, 32 rows": (1, 32, (2, 4)),
    "1 layer, 8 rows": (1, 8, (2, 4)),
    "2 layers, 32 rows": (2, 32, (2, 4)),
    "4 layers, 32 rows": (4, 32, (2, 4)),
    "1 layer, 64 rows": (1, 64, (8, 8)),
    "4 layers, 64 rows": (4, 64, (8, 8)),
}
SIMULATIONS = 1000

pytestmark = pytest.mark.skipif("SOAP_PEERS" not in os.environ, reason="AutoParallel isn't installed: see the top of benchmarks/test_peers.py for how")


def peer(layers: int, rows: int, mesh: tuple[int, ...]) -> dict[str, Any]:
    path = os.pathsep.join([str(REPOSITORY), os.environ["SOAP_PEERS"]])
    arguments = [str(a) for a in (rows, LENGTH, HIDDEN, HEADS, layers, *mesh)]
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker_peers", *arguments], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return {**json.loads(run.stdout.splitlines()[-1]), "process_s": time.perf_counter() - begin}


def configured(factors: list[str | None], mesh: tuple[int, ...], **more: Any) -> _C.OpConfig:
    """The factor that each dim of the mesh cuts, None for copies; the mesh's dims are ranks' digits, the first slowest."""
    names = list(dict.fromkeys(f for f in factors if f is not None))
    of = {name: [d for d, f in enumerate(factors) if f == name] for name in names}
    copies = [d for d, f in enumerate(factors) if f is None]
    digits = [d for name in names for d in of[name]] + copies  # of a slot, slowest first
    devices = []
    for slot in itertools.product(*(range(mesh[d]) for d in digits)):
        at = dict(zip(digits, slot, strict=True))
        devices.append(sum(at[d] * math.prod(mesh[d + 1 :]) for d in range(len(mesh))))
    cuts = [(name, _C.Cut(tiles=math.prod(mesh[d] for d in of[name]))) for name in names]
    return _C.OpConfig(cuts, devices=devices, replicas=math.prod(mesh[d] for d in copies), **more)


def translated(graph: _C.OpGraph, found: dict[str, Any], mesh: tuple[int, ...]) -> dict[str, _C.Strategy]:
    """The peer's plan as ours: its cuts of every product, its storage of every parameter; what is between follows. By how long a gathered parameter lives."""
    out = {}
    nodes = {n.name: n for n in graph.nodes}
    for keep in (_C.Keep.until_backward, _C.Keep.use, _C.Keep.until_step):
        strategy = _C.Strategy(math.prod(mesh))
        for name, placed in found["parameters"].items():
            product = nodes[name.removesuffix(".weight")]
            rule = _C.make_rule(graph, product, math.prod(mesh))
            dims = [rule.factors[d.factors[0]].name for d in rule.results[0].dims]
            summed = next(f.name for f in rule.factors if f.name not in dims)
            strategy.set(product.name, configured([None if p is None else summed if p == "sum" else dims[p] for p in placed["product"]], mesh))
            strategy.set(f"param:{name}", configured([None if p is None else f"d{p}" for p in placed["stored"]], mesh, keep=keep))
        out[str(keep)] = strategy
    return out


def compared(layers: int, total: int, mesh: tuple[int, ...]) -> dict[str, Any]:
    world = math.prod(mesh)
    found = peer(layers, total, mesh)
    with torch.device("meta"):
        model, x = Model(HIDDEN, HEADS, layers), torch.empty(total, LENGTH, HIDDEN)
    begin = time.perf_counter()
    graph = graph_of(model, x)
    captured = time.perf_counter()
    rows, cost = [total // world] * world, _C.CostModel(_C.machine_preset("h100", max(world // 8, 1), min(world, 8)))
    options = _C.SearchOptions()
    options.descent_simulations = options.mcmc_simulations = SIMULATIONS
    result = _C.search(graph, rows, cost, options)
    searched = time.perf_counter()
    best = result.candidates[result.best]
    prices = {k: _C.simulate(_C.lower(graph, s, rows), cost).step_ns / 1e6 for k, s in translated(graph, found, mesh).items()}
    return {
        "peer": found,
        "peer_ms": prices,
        "ours": {"capture_s": captured - begin, "search_s": searched - captured, "chosen": best.name, "ms": best.step_ns / 1e6},
        "candidates_ms": {c.name: c.step_ns / 1e6 for c in result.candidates if c.step_ns >= 0},
        "plan": _C.print_plan(graph, best.strategy),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return {name: compared(*case) for name, case in CASES.items()}


def test_its_plan_is_not_faster(results: dict[str, dict[str, Any]]) -> None:
    for name, r in results.items():
        assert r["ours"]["ms"] <= min(r["peer_ms"].values()), name


def test_write_table(results: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "# AutoParallel on the same module",
        "",
        f"`python -m pytest benchmarks/test_peers.py -s`, revision {revision()}: transformer layers of hidden size {HIDDEN} with {HEADS} heads (benchmarks/"
        f"peer_model.py), rows of {LENGTH} tokens in float32, rows cut over all ranks at input and output, H100 preset, hosts of 8. Wall seconds; "
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores. AutoParallel (github.com/meta-pytorch/autoparallel, a54c252) solves with "
        "CBC on a mesh of CPU ranks, with its tables for H100; no limit on memory on either side. Its products' cuts and its parameters' storage are "
        "written as one of our plans, in which everything between them follows, and priced with the most favourable life of gathered parameters. Both "
        "prices are our simulator's: nothing was run on an H100.",
        "",
        "| model | mesh | AutoParallel: trace and build, s | solve, s | its plan, ms | ours: capture, s | search, s | our plan, ms | found by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        ours, mesh = r["ours"], CASES[name][2]
        lines.append(
            f"| {name} | {' x '.join(map(str, mesh))} | {r['peer']['trace_s']:.1f} | {r['peer']['solve_s']:.1f} | {min(r['peer_ms'].values()):.3f} "
            f"| {ours['capture_s']:.2f} | {ours['search_s']:.2f} | {ours['ms']:.3f} | {ours['chosen']} |"
        )
    RESULTS.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__, "revision": revision()}
    (RESULTS / "peers.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "peers.json").write_text(json.dumps({"where": machine, "cases": results}, indent=1) + "\n")
    with capsys.disabled():
        print("\n".join(["", *lines]))
