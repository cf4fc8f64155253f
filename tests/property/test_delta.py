"""Delta simulation equals full simulation to the bit, over random changes of random graphs (`--cases` in all)."""

from __future__ import annotations

import random

import pytest

from tests.property.sweep import CASES, captured_case
from torch_soap import _C
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.testing import random_config, random_regions, random_storage
from torch_soap.verify import even_rows

NAMES = sorted(CASES)
STEPS = 20  # changes of one start


def machine(world: int, overlap: bool, shared: bool, launch: float) -> _C.Machine:
    out = _C.Machine(world, 2 if world % 2 == 0 else 1)
    out.overlap = overlap
    out.op_overhead_ns, out.flops_per_s, out.memory_bytes_per_s = 900.0, 1e9, 1e9  # operators and movements of like length
    out.step_overhead_ns, out.segment_overhead_ns = 1234.0, 321.0
    if shared and not overlap:
        out.busy_speed, out.jitter, out.cold_ns, out.piece_ns = [1.9, 1.3, 1.0, 0.7], 0.07, 2500.0, 150.0
        out.turn_ns = 1800.0
        out.update_speed = [2.2, 1.4, 1.0, 0.9]
        out.packs, out.send_ns_per_byte, out.receive_ns_per_byte = False, 0.4, 0.3  # what is sent one way between hosts
    elif launch:
        times = {"pointwise": 900.0, "matmul": 1500.0, "view": 300.0, "other": 700.0, "normalization": 1100.0, "collective": 4000.0, "update": 2500.0}
        out.launch = {name: (launch * ns, launch * ns * 1.7) for name, ns in times.items()}
    out.intra, out.inter = _C.Link(700.0, 2e9), _C.Link(2000.0, 5e8)
    return out


def changed(node: _C.Node, graph: _C.OpGraph, world: int, rng: random.Random) -> _C.OpConfig | None:
    """Mostly without chunks: with them all of it is lowered anew."""
    if rng.random() < 0.25:
        return None
    rule = _C.make_rule(graph, node, world)
    if node.kind == _C.NodeKind.param:
        return random_storage(rule, world, rng)
    config = random_config(rule, world, rng)
    if rng.random() < 0.05:
        return config
    whole = [(name, cut) for name, cut in config.cuts]
    for _, cut in whole:
        cut.chunks = 1
    return _C.OpConfig(cuts=whole, devices=config.devices, replicas=config.replicas)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = max(metafunc.config.getoption("--cases") // STEPS, 1)
    metafunc.parametrize("index", range(count), ids=[f"{NAMES[i % len(NAMES)]}-{i // len(NAMES)}" for i in range(count)])


def test_delta_equals_full(index: int) -> None:
    rng = random.Random(index)
    captured = captured_case(NAMES[index % len(NAMES)])
    inputs = [captured.leaves[i] for i in captured.tensor_slots]
    graph = to_op_graph(captured.instantiate(captured._signature_of(inputs)))
    world = rng.choice([2, 3, 4, 6])
    total = next((t.shape[d] for t, d in zip(inputs, captured.batch_dims, strict=True) if d is not None), world)
    rows = even_rows(total, world)
    cost = _C.CostModel(machine(world, overlap=rng.random() < 0.5, shared=rng.random() < 0.3, launch=rng.choice([0, 0.5, 2, 8])))

    def full(strategy: _C.Strategy) -> int:
        return _C.simulate(_C.lower(graph, strategy, rows), cost).step_ns

    strategy = rng.choice([s for _, s in _C.seeds(graph, world)])
    strategy.bucket_bytes = rng.choice([1, 1024, 25 << 20])
    if rng.random() < 0.4:
        strategy.recompute = random_regions(graph, rng)
    try:
        expected = full(strategy)
    except ValueError:  # a seed that this model doesn't allow
        strategy = _C.seeds(graph, world)[0][1]
        expected = full(strategy)
    delta = _C.DeltaSimulator(graph, strategy, rows, cost)
    assert delta.step_ns == expected, "start"
    nodes = [n for n in graph.nodes if n.kind in (_C.NodeKind.op, _C.NodeKind.param)]
    near = nodes
    for step in range(STEPS):
        node = rng.choice(near if rng.random() < 0.5 else nodes)  # often the one before or beside it: what undoing left behind shows there
        near = [n for n in nodes if abs(n.id - node.id) < 3]
        config = changed(node, graph, world, rng)
        other = strategy.copy()
        other.remove(node.name) if config is None else other.set(node.name, config)
        what = f"{step}: {node.name} {config and _C.print_config(config)} after\n{_C.print_plan(graph, strategy)}"
        try:
            wanted = full(other)
        except ValueError:
            with pytest.raises(ValueError):
                delta.change(node.id, config)
            assert delta.step_ns == expected, what
            continue
        assert delta.change(node.id, config) == wanted, what
        if rng.random() < 0.5:
            delta.undo()
            assert delta.step_ns == expected, what
        else:
            strategy, expected = other, wanted
