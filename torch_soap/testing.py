"""For tests of models and of this library: random plans that are legal, seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from torch_soap import _C
from torch_soap.capture import Captured, capture
from torch_soap.plan import Plan, make_plan
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.verify import as_arguments, even_rows

MAX_DRAWS = 50  # of one node, and of nodes refused in the whole graph

__all__ = ["random_config", "random_plan", "random_plan_of", "random_regions", "random_rewrites", "random_storage"]


def random_plan(module: nn.Module, example_inputs: Any, world_size: int, seed: int, *, loss: Callable[..., Any] | None = None) -> Plan:
    """A legal plan drawn from all of them: what `verify` must accept for any module.

    Uneven and empty parts, up to three factors of an operator at once, chunks on any factor, zigzag and mixed-radix cuts, any list of
    devices (several tiles on one, some on none), replicas, parameters stored anywhere, operators that follow their producer, small buckets, operators
    that backward computes again.

    Args:
        example_inputs: the global batch, as for `verify`.
    """
    args, kwargs = as_arguments(example_inputs)
    return random_plan_of(capture(module, args, kwargs, loss=loss), world_size, seed)


def random_plan_of(captured: Captured, world_size: int, seed: int, rows: Sequence[int] | None = None, *, rewrites: int = 0) -> Plan:
    """`random_plan` of a module that is captured already; `rows`: what each process will feed; `rewrites`: how many are drawn first, at most."""
    inputs = [captured.leaves[i] for i in captured.tensor_slots]
    original = to_op_graph(captured.instantiate(captured._signature_of(inputs)))
    drawn = random_rewrites(original, rewrites, seed)
    graph = _C.rewritten(original, drawn)
    total = next((t.shape[d] for t, d in zip(inputs, captured.batch_dims, strict=True) if d is not None), world_size)
    parts = list(rows) if rows is not None else even_rows(total, world_size)
    strategy = random_strategy(graph, parts, seed)
    strategy.rewrites = drawn
    return make_plan(original, strategy)


def random_strategy(graph: _C.OpGraph, rows: Sequence[int], seed: int) -> _C.Strategy:
    """A legal strategy of a graph for these rows of each process."""
    world_size = len(rows)
    rng = random.Random(seed)
    strategy = _C.Strategy(world_size)
    strategy.bucket_bytes = rng.choice([1, 64, 1024, 25 << 20])
    returns = [n for n in graph.nodes if n.kind == _C.NodeKind.return_ and n.target != "buffer_write"]
    if all(n.sample_dim < 0 for n in returns) and rng.random() < 0.25:
        strategy.order = _C.Order.interleaved
    follow = rng.choice([0.1, 0.3, 0.6])
    stay = rng.choice([0.3, 0.7])
    for node in graph.nodes:
        if node.kind == _C.NodeKind.op and rng.random() >= follow:
            draw(graph, node, strategy, rng, random_config)
        elif node.kind == _C.NodeKind.param and rng.random() >= stay:
            draw(graph, node, strategy, rng, random_storage)
    settle(graph, strategy, rows, rng)
    if rng.random() < 0.5:
        strategy.recompute = random_regions(graph, rng)
    return strategy


def random_rewrites(graph: _C.OpGraph, most: int, seed: int) -> list[_C.Rewrite]:
    """Rewrites of a graph, each of what the ones before leave."""
    rng = random.Random(seed)
    drawn: list[_C.Rewrite] = []
    for _ in range(most):
        known = _C.find_rewrites(graph)
        if not known:
            break
        name = rng.choice(sorted({r.substitution for r in known}))
        drawn.append(rng.choice([r for r in known if r.substitution == name]))
        graph = _C.rewritten(graph, drawn[-1:])
    return drawn


def draw(graph: _C.OpGraph, node: _C.Node, strategy: _C.Strategy, rng: random.Random, how: Callable[..., _C.OpConfig]) -> None:
    """Gives a node a configuration that is legal for it alone; none (it follows) only where nothing else was legal."""
    rule = _C.make_rule(graph, node, strategy.world_size)
    for _ in range(MAX_DRAWS):
        config = how(rule, strategy.world_size, rng)
        try:
            _C.parse_plan(graph, f"{node.name} {_C.print_config(config)}", strategy.world_size)
        except ValueError:
            continue
        strategy.set(node.name, config)
        return


def settle(graph: _C.OpGraph, strategy: _C.Strategy, rows: Sequence[int], rng: random.Random) -> None:
    """Draws again what only the whole graph shows to be illegal, until it lowers."""
    nodes = {n.name: n for n in graph.nodes}
    for _ in range(MAX_DRAWS * 4):
        try:
            _C.lower(graph, strategy, list(rows))
            return
        except ValueError as error:
            words = str(error).removeprefix("[plan] ").split()
            name = words[0].rstrip(":") if words else ""
            if name not in nodes or name not in strategy.names:
                if strategy.order != _C.Order.interleaved:
                    raise
                strategy.order = _C.Order.forward_then_backward
                continue
            strategy.remove(name)
            draw(graph, nodes[name], strategy, rng, random_storage if nodes[name].kind == _C.NodeKind.param else random_config)
    raise RuntimeError(f"[random_plan] no legal plan after {MAX_DRAWS * 4} draws")


def random_config(rule: _C.Rule, world_size: int, rng: random.Random) -> _C.OpConfig:
    """Cuts of up to three factors, on any devices; may be illegal where a rule couples factors."""
    factors = [f for f in rule.factors if f.cut != _C.Cuttable.whole]
    if rng.random() < 0.1:
        return _C.OpConfig(cuts=[("n", _C.Cut(tiles=world_size, fed=True))])
    rng.shuffle(factors)
    room = rng.choice([world_size, world_size, 2 * world_size])  # tiles x replicas
    cuts = []
    for factor in factors[: rng.choice([0, 1, 1, 1, 2, 2, 3])]:
        cut = random_cut(factor, max(1, room), rng)
        cuts.append((factor.name, cut))
        room //= cut.tiles
    tiles = 1
    for _, cut in cuts:
        tiles *= cut.tiles
    replicas = rng.randint(1, max(1, min(room, world_size))) if rng.random() < 0.3 else 1
    return _C.OpConfig(cuts=cuts, devices=random_devices(tiles, replicas, world_size, rng), replicas=replicas)


def random_cut(factor: _C.Factor, most: int, rng: random.Random) -> _C.Cut:
    """One way to cut a factor into at most `most` tiles, and into chunks."""
    tiles = rng.randint(1, min(most, 4))
    chunks = rng.choice([1, 1, 1, 2, 3])
    kind = rng.random()
    if kind < 0.45 or factor.size // factor.unit < 1:
        return _C.Cut(tiles=tiles, chunks=chunks)
    if kind < 0.8 or factor.cut == _C.Cuttable.interval:
        units = factor.size // factor.unit
        points = sorted(rng.randint(0, units) * factor.unit for _ in range(tiles - 1))
        return _C.Cut(tiles=tiles, chunks=chunks, bounds=[0, *points, factor.size])
    if kind < 0.9:
        return _C.Cut(tiles=tiles, chunks=chunks, zigzag=True)
    divisors = [d for d in range(1, factor.size + 1) if factor.size % d == 0]
    outer = rng.choice(divisors)
    inner = rng.choice([d for d in divisors if factor.size // outer % d == 0])
    return _C.Cut(tiles=tiles, chunks=chunks, radix=[outer, factor.size // outer // inner, inner])


def random_devices(tiles: int, replicas: int, world_size: int, rng: random.Random) -> list[int]:
    """Devices of (tile, replica); a tile's replicas differ."""
    if tiles * replicas <= world_size and rng.random() < 0.6:
        return rng.sample(range(world_size), tiles * replicas) if rng.random() < 0.6 else []
    some = rng.sample(range(world_size), rng.randint(replicas, world_size))
    return [d for _ in range(tiles) for d in rng.sample(some, replicas)]


def random_regions(graph: _C.OpGraph, rng: random.Random) -> list[list[str]]:
    """Up to three regions: stretches of the graph, or any operators."""
    names = [n.name for n in graph.nodes if n.kind == _C.NodeKind.op]
    within = {p for n in names for p in (n[:i] for i, c in enumerate(n) if c in "./")}  # a name that is also a module's, with others in it
    count = rng.randint(1, 3)
    out: list[list[str]] = [[] for _ in range(count)]
    stretches = rng.random() < 0.6
    points = sorted(rng.randint(0, len(names)) for _ in range(count + 1))
    for i, name in enumerate(names):
        region = sum(p <= i for p in points) - 1 if stretches else rng.randint(-1, count - 1)
        if name not in within and 0 <= region < count:
            out[region].append(name)
    return [r for r in out if r]


def random_storage(rule: _C.Rule, world_size: int, rng: random.Random) -> _C.OpConfig:
    """Whole on some devices, or cut along a dim or two, each device storing one part."""
    keep = rng.choice([_C.Keep.until_backward, _C.Keep.use, _C.Keep.until_step])
    factors = [f for f in rule.factors if f.cut != _C.Cuttable.whole]
    rng.shuffle(factors)
    cuts = []
    room = world_size
    for factor in factors[: rng.choice([0, 1, 1, 2])]:
        cut = random_cut(factor, room, rng)
        cut.chunks = 1
        cuts.append((factor.name, cut))
        room //= cut.tiles
    tiles = 1
    for _, cut in cuts:
        tiles *= cut.tiles
    replicas = rng.randint(1, max(1, world_size // tiles))
    return _C.OpConfig(cuts=cuts, devices=rng.sample(range(world_size), tiles * replicas), replicas=replicas, keep=keep)
