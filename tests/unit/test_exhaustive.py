"""Branch and bound over a stated space: the bound never exceeds a step time, and what it returns is what enumeration returns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.unit.planning import graph_of
from tests.unit.test_optcnn import LeNet, image_graph, lenet, residual
from torch_soap import _C

ROWS = 8  # per device


class Recurrent(nn.Module):
    """Two steps of a small language model whose steps share every weight."""

    def __init__(self, vocabulary: int = 300, hidden: int = 128) -> None:
        super().__init__()
        self.table, self.words = nn.Embedding(vocabulary, hidden), nn.Linear(hidden, vocabulary)
        self.first, self.second = nn.LSTM(hidden, hidden), nn.LSTM(hidden, hidden)

    def forward(self, words: torch.Tensor) -> list[torch.Tensor]:
        steps = [self.table(words[:, t]).unsqueeze(0) for t in range(2)]
        for layer in (self.first, self.second):
            before, state = steps, None
            steps = []
            for x in before:
                y, state = layer(x, state)
                steps.append(y)
        return [self.words(x.squeeze(0)) for x in steps]


def each_word(output: list[torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cross_entropy(x, words[:, t]) for t, x in enumerate(output)]).mean()


def recurrent(rows: int) -> _C.OpGraph:
    with torch.device("meta"):
        words = torch.empty(rows, 2, dtype=torch.long)
        return graph_of(Recurrent(), words, words, loss=each_word)


def heavy(rows: int) -> _C.OpGraph:
    """LeNet on images that make computing outweigh every latency."""

    class Large(LeNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(16 * 61 * 61, 120)

    return image_graph(Large(), rows, 252, 1, 10)


GRAPHS: dict[str, Callable[[int], _C.OpGraph]] = {"lenet": lenet, "heavy": heavy, "residual": residual, "recurrent": recurrent}
BUCKETS = [0, 40_000, 25 << 20]


def machine(devices: int, overlap: bool) -> _C.CostModel:
    out = _C.machine_preset("p100", 2 if devices > 2 else 1, devices // 2 if devices > 2 else devices)
    out.overlap = overlap
    return _C.CostModel(out)


def options(bucket_bytes: int = 25 << 20, bound_scale: float = 1.0) -> _C.ExhaustiveOptions:
    out = _C.ExhaustiveOptions()
    out.bucket_bytes, out.bound_scale = bucket_bytes, bound_scale
    return out


def plan(graph: _C.OpGraph, space: _C.ExhaustiveSpace, choice: list[int], world: int, bucket_bytes: int) -> _C.Strategy:
    out = _C.Strategy(world)
    out.bucket_bytes = bucket_bytes
    for head, configs, c in zip(space.heads, space.configs, choice, strict=True):
        out.set(graph.nodes[head].name, configs[c])
    return out


def simulated(graph: _C.OpGraph, strategy: _C.Strategy, cost: _C.CostModel) -> int:
    return _C.simulate(_C.lower(graph, strategy, [ROWS] * strategy.world_size), cost).step_ns


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_no_bound_exceeds_the_step_time(name: str, world: int, overlap: bool) -> None:
    """And the last is the step time: all is lowered then."""
    graph, rows, cost, rng = GRAPHS[name](ROWS * world), [ROWS] * world, machine(world, overlap), random.Random(0)
    space = _C.exhaustive_space(graph, rows, cost)
    largest = 0.0
    for trial in range(12):
        choice = [rng.randrange(len(configs)) for configs in space.configs]
        bucket = BUCKETS[trial % len(BUCKETS)]
        step = simulated(graph, plan(graph, space, choice, world, bucket), cost)
        bounds = _C.partial_bounds(graph, rows, cost, space, choice, options(bucket))
        assert max(bounds) == bounds[-1] == step
        largest = max(largest, bounds[0] / step)
    assert largest > 0.1, "a bound of nothing holds always"


def small_space(space: _C.ExhaustiveSpace, rng: random.Random, plans: int) -> _C.ExhaustiveSpace:
    """Some of the configurations: at most so many plans."""
    configs = [[rng.choice(of_layer)] for of_layer in space.configs]
    while True:
        at = rng.randrange(len(configs))
        configs[at].append(rng.choice(space.configs[at]))
        product = 1
        for of_layer in configs:
            product *= len(of_layer)
        if product > plans:
            configs[at].pop()
            return _C.ExhaustiveSpace(space.heads, configs)


def enumerated(graph: _C.OpGraph, space: _C.ExhaustiveSpace, cost: _C.CostModel, world: int, bucket_bytes: int) -> list[int]:
    choices = itertools.product(*(range(len(configs)) for configs in space.configs))
    return sorted(simulated(graph, plan(graph, space, list(choice), world, bucket_bytes), cost) for choice in choices)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
@pytest.mark.parametrize("name", GRAPHS)
def test_it_finds_what_enumeration_finds(name: str, overlap: bool) -> None:
    graph, rows, cost, rng = GRAPHS[name](ROWS * 4), [ROWS] * 4, machine(4, overlap), random.Random(1)
    space = _C.exhaustive_space(graph, rows, cost)
    pruned = 0
    for bucket in BUCKETS:
        small = small_space(space, rng, 120)
        found = _C.exhaustive_search(graph, rows, cost, small, options(bucket))
        assert found.proven
        assert found.step_ns == enumerated(graph, small, cost, 4, bucket)[0] == simulated(graph, found.strategy, cost)
        pruned += found.pruned
    assert pruned > 0


def test_a_bound_that_is_too_large_is_noticed() -> None:
    """The comparison with enumeration fails where a bound leaves out what it must not."""
    graph, rows, cost, rng = lenet(ROWS * 4), [ROWS] * 4, machine(4, True), random.Random(2)
    space = _C.exhaustive_space(graph, rows, cost)
    missed = 0
    for _ in range(12):
        small = small_space(space, rng, 60)
        best = enumerated(graph, small, cost, 4, 25 << 20)[0]
        assert _C.exhaustive_search(graph, rows, cost, small, options()).step_ns == best
        missed += _C.exhaustive_search(graph, rows, cost, small, options(bound_scale=1.5)).step_ns > best
    assert missed > 0


def test_lenet_on_four_devices() -> None:
    """All of its plans, and no seed of the search is faster."""
    graph, rows, cost = lenet(64 * 4), [64] * 4, _C.CostModel(_C.machine_preset("p100", 1, 4))
    space = _C.exhaustive_space(graph, rows, cost)
    found = _C.exhaustive_search(graph, rows, cost, space)
    assert found.proven and found.plans > 1e13 and found.illegal == 0
    assert found.simulated < 100 < found.pruned < found.bounds < 100_000
    inside = [s for name, s in _C.seeds(graph, 4) if name in ("ddp", "one device")]
    assert all(found.step_ns <= _C.simulate(_C.lower(graph, s, rows), cost).step_ns for s in inside)
    with_start = _C.ExhaustiveOptions()
    with_start.starts = [found.strategy]
    again = _C.exhaustive_search(graph, rows, cost, space, with_start)
    assert again.proven and again.step_ns == found.step_ns and again.last_better == 0 and again.bounds <= found.bounds


def test_it_ends_without_proof_when_told() -> None:
    graph, rows, cost = lenet(64 * 4), [64] * 4, _C.CostModel(_C.machine_preset("p100", 1, 4))
    space = _C.exhaustive_space(graph, rows, cost)
    little = _C.ExhaustiveOptions()
    little.most_bounds = 400
    cut_off = _C.exhaustive_search(graph, rows, cost, space, little)
    assert not cut_off.proven and cut_off.bounds < 500
    interrupted = _C.exhaustive_search(graph, rows, cost, space, _C.ExhaustiveOptions(), lambda progress: False, 0)
    assert not interrupted.proven and interrupted.bounds < 3000
    assert cut_off.step_ns == _C.simulate(_C.lower(graph, cut_off.strategy, rows), cost).step_ns


def test_it_refuses_what_it_can_not_bound() -> None:
    graph = lenet(16)
    with pytest.raises(ValueError, match="1 to 8 devices, not 16"):
        cost = _C.CostModel(_C.Machine(16))
        _C.exhaustive_search(graph, [1] * 16, cost, _C.exhaustive_space(graph, [1] * 16, cost))
    named = _C.ExhaustiveOptions()
    named.operators = ["conv1", "/relu"]
    with pytest.raises(ValueError, match="/relu is not an operator that is configured"):
        _C.exhaustive_space(graph, [8, 8], _C.CostModel(_C.Machine(2)), named)
    slowed = _C.Machine(2)
    slowed.busy_speed = [1.0, 0.7]
    with pytest.raises(ValueError, match="busy_speed"):
        _C.exhaustive_search(graph, [8, 8], _C.CostModel(slowed), _C.exhaustive_space(graph, [8, 8], _C.CostModel(slowed)))
