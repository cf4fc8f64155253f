"""OptCNN's layer-wise cost, its elimination, and the plans that it is known for."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT, next_byte_loss
from tests.unit.planning import graph_of, p100
from torch_soap import _C


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class Residual(nn.Module):
    """Batch norms, a branch and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(x + self.norm2(self.conv2(x)))
        return self.fc(torch.cat([y, F.relu(self.conv3(y))], 1).mean((2, 3)))


class Norms(nn.Module):
    """Batch norms that lead a layer, of two rows of pixels, of none, and after what cuts otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(24, 6)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.BatchNorm1d(6, track_running_stats=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norms[0](torch.cat([x, self.conv(x)], 1))), 2)
        return self.norms[2](self.fc(self.norms[1](x).flatten(1)))


def image_graph(module: nn.Module, rows: int, size: int, channels: int = 3, classes: int = 1000) -> _C.OpGraph:
    """Of a classifier with its loss, captured on the meta device."""
    images = torch.empty(rows, channels, size, size, device="meta")
    return graph_of(module.to("meta"), images, torch.empty(rows, dtype=torch.long, device="meta"), loss=F.cross_entropy)


def lenet(rows: int = 16) -> _C.OpGraph:
    return image_graph(LeNet(), rows, 28, 1, 10)


def residual(rows: int = 8) -> _C.OpGraph:
    return image_graph(Residual(), rows, 16, 3, 10)


def imagenet(name: str, rows: int = 128) -> _C.OpGraph:
    with torch.device("meta"):
        return image_graph(tv.get_model(name), rows, 224)


def random_graph(rng: random.Random) -> _C.ChoiceGraph:
    """Any topology: several components, parallel edges in both directions, cycles, cliques."""
    count = rng.randint(1, 6)
    nodes = [[rng.randint(0, 20) for _ in range(rng.randint(1, 4))] for _ in range(count)]
    edges, tables = [], []
    for _ in range(rng.randint(0, 2 * count) if count > 1 else 0):
        a, b = rng.sample(range(count), 2)
        edges.append(_C.ChoiceEdge(a, b, len(tables)))
        tables.append([rng.randint(0, 20) for _ in range(len(nodes[a]) * len(nodes[b]))])
    return _C.ChoiceGraph(nodes, tables, edges)


def all_costs(graph: _C.ChoiceGraph) -> np.ndarray:
    """The cost of every assignment, one dim per node."""
    sizes = [len(n) for n in graph.nodes]
    total = np.zeros(sizes, dtype=np.int64)
    for i, costs in enumerate(graph.nodes):
        total += np.array(costs).reshape([-1 if j == i else 1 for j in range(len(sizes))])
    for e in graph.edges:
        table = np.array(graph.tables[e.table]).reshape(sizes[e.a], sizes[e.b])
        table = table if e.a < e.b else table.T
        total += table.reshape([sizes[j] if j in (e.a, e.b) else 1 for j in range(len(sizes))])
    return total


def test_elimination_equals_enumeration() -> None:
    rng = random.Random(0)
    with_tables = 0
    for _ in range(400):
        graph = random_graph(rng)
        found = _C.minimize(graph)
        assert found.exact
        assert found.cost == graph.cost(found.choice) == all_costs(graph).min()
        with_tables += found.with_tables
    assert with_tables > 10, "some graphs must keep nodes with three neighbours or more"


def test_beyond_the_largest_table_it_says_so() -> None:
    """A clique whose tables are too large: some node is fixed, and no single change improves the result."""
    rng = random.Random(1)
    fixed = 0
    for _ in range(50):
        nodes = [[rng.randint(0, 20) for _ in range(3)] for _ in range(5)]
        pairs = list(itertools.combinations(range(5), 2))
        graph = _C.ChoiceGraph(nodes, [[rng.randint(0, 20) for _ in range(9)] for _ in pairs], [_C.ChoiceEdge(a, b, i) for i, (a, b) in enumerate(pairs)])
        found = _C.minimize(graph, largest_table=27)
        costs = all_costs(graph)
        assert not found.exact and found.fixed > 0 and found.cost == graph.cost(found.choice) >= costs.min()
        for node in range(5):
            line = tuple(slice(None) if n == node else c for n, c in enumerate(found.choice))
            assert found.cost == costs[line].min()
        fixed += found.cost > costs.min()
        assert _C.minimize(graph).cost == costs.min()
    assert fixed > 0, "too easy: fixing never cost anything"


def test_a_limit_on_memory_holds() -> None:
    rng = random.Random(2)
    moved = 0
    for _ in range(200):
        graph = random_graph(rng)
        weights = [[rng.randint(0, 1000) * 1000 for _ in n] for n in graph.nodes]
        weigh = all_costs(_C.ChoiceGraph(weights, [], []))
        costs, lightest = all_costs(graph), int(weigh.min())
        free = _C.minimize_within(graph, weights, int(weigh.max()))
        assert free.multiplier == 0 and free.choices.cost == costs.min()
        limit = (lightest + free.weight) // 2
        kept = _C.minimize_within(graph, weights, limit)
        assert kept.fits and kept.weight <= limit
        assert kept.weight == sum(w[c] for w, c in zip(weights, kept.choices.choice, strict=True))
        assert costs[weigh <= limit].min() <= kept.choices.cost == graph.cost(kept.choices.choice)
        assert not costs[(weigh <= kept.weight)].min() < kept.choices.cost, "a choice as light is cheaper: not on the hull"
        moved += kept.choices.choice != free.choices.choice
        assert not _C.minimize_within(graph, weights, lightest - 1).fits
    assert moved > 100


@pytest.mark.parametrize(("graph", "world", "configurations"), [(lenet(), 2, 5), (lenet(), 4, 4), (imagenet("alexnet", 8), 2, 3), (residual(), 4, 3)])
def test_layers_by_elimination_equal_enumeration(graph: _C.OpGraph, world: int, configurations: int) -> None:
    costs = _C.layer_costs(graph, [8 // world] * world, _C.CostModel(p100(world)), _C.LayerOptions(max_configurations=configurations))
    found = _C.minimize(costs.choices)
    assert found.cost == all_costs(costs.choices).min() == costs.choices.cost(found.choice)


def separate_buckets(strategy: _C.Strategy) -> _C.Strategy:
    out = strategy.copy()
    out.bucket_bytes = 0
    return out


@pytest.mark.parametrize("graph", [lenet(), residual()], ids=["lenet", "residual"])
def test_the_layerwise_cost_is_the_simulation_where_devices_work_alike(graph: _C.OpGraph) -> None:
    rows, cost = [4, 4, 4, 4], _C.CostModel(p100(4))
    costs = _C.layer_costs(graph, rows, cost)
    for name, strategy in _C.seeds(graph, 4):
        if name not in ("ddp", "one device"):
            continue
        choice = _C.choices_of(graph, costs, strategy)
        assert choice is not None
        simulated = _C.simulate(_C.lower(graph, separate_buckets(strategy), rows), cost).step_ns
        # What several read by one copy, each pays for here: the labels, and movements that travel together, by a latency each.
        apart = costs.choices.cost(choice) - simulated
        assert apart == pytest.approx(10e3 * round(apart / 10e3), abs=len(graph.nodes)), name
        assert 0 <= round(apart / 10e3) <= (0 if name == "ddp" else 4), name


@pytest.mark.parametrize("graph", [lenet(), residual()], ids=["lenet", "residual"])
def test_every_choice_lowers_and_costs_no_less_than_its_simulation(graph: _C.OpGraph) -> None:
    """Layers one after another, each movement by itself: the simulation merges some and lets devices work beside each other."""
    rows, cost, rng = [4, 4, 4, 4], _C.CostModel(p100(4)), random.Random(3)
    costs = _C.layer_costs(graph, rows, cost)
    for _ in range(60):
        choice = [rng.randrange(len(layer.configs)) for layer in costs.layers]
        strategy = _C.strategy_of(graph, costs, choice)
        assert _C.choices_of(graph, costs, strategy) == choice
        simulated = _C.simulate(_C.lower(graph, separate_buckets(strategy), rows), cost).step_ns
        assert simulated <= costs.choices.cost(choice) * 1.001
        assert simulated >= costs.choices.cost(choice) * 0.5


GRAPHS = {
    "lenet": lambda: lenet(),
    "residual": lambda: residual(),
    "norms": lambda: image_graph(Norms(), 8, 4, 3, 6),
    "alexnet": lambda: imagenet("alexnet", 8),
    "squeezenet": lambda: imagenet("squeezenet1_0", 8),
    "shufflenet": lambda: imagenet("shufflenet_v2_x0_5", 8),
    "gpt": lambda: gpt(),
}


def gpt() -> _C.OpGraph:
    with torch.device("meta"):
        tokens = torch.empty(4, 16, dtype=torch.long)
        return graph_of(GPT(vocabulary=64, layers=2, hidden=32, heads=4, context=16), tokens, tokens, loss=next_byte_loss)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("rows", [[2, 2, 2, 2], [1, 5, 2, 0]], ids=["even", "uneven"])
def test_tables_equal_those_of_resolving_each_configuration(name: str, rows: list[int]) -> None:
    check_tables(name, rows)


@pytest.mark.parametrize("name", ["residual", "norms"])
def test_tables_of_eight_devices_equal_those_of_resolving(name: str) -> None:
    """Three dims of a batch norm cut at once, moments of two, four and eight parts."""
    check_tables(name, [1] * 8)


def check_tables(name: str, rows: list[int]) -> None:
    graph, cost = GRAPHS[name](), _C.CostModel(p100(len(rows)))
    fast, slow = (_C.layer_costs(graph, rows, cost, _C.LayerOptions(by_resolving=by)) for by in (False, True))
    for a, b, nodes, wanted in zip(fast.layers, slow.layers, fast.choices.nodes, slow.choices.nodes, strict=True):
        assert a.configs == b.configs and nodes == wanted, [graph.nodes[n].name for n in a.nodes]
    assert fast.choices.tables == slow.choices.tables
    assert fast.memory_bytes == slow.memory_bytes
    assert slow.resolved > 0 and (fast.resolved == 0 or name == "gpt"), "parts of attention's keys: no table tells of them"


def cuts(plan: _C.LayerPlan, name: str) -> dict[str, int]:
    return {factor: cut.tiles for factor, cut in plan.strategy.nodes[name].cuts}


def own_space(name: str) -> tuple[_C.OpGraph, _C.LayerCosts, _C.LayerPlan]:
    """OptCNN's: nothing that is summed over is cut. Batch 32 per device, 4 devices."""
    graph, rows, cost, options = imagenet(name), [32] * 4, _C.CostModel(p100(4)), _C.LayerOptions(reductions=False)
    return graph, _C.layer_costs(graph, rows, cost, options), _C.optimize_layers(graph, rows, cost, options)


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_convolutions_by_samples_and_linears_by_output_channel(name: str) -> None:
    """One weird trick (Krizhevsky 2014), found: OptCNN's plan for AlexNet on 4 devices."""
    graph, _, plan = own_space(name)
    assert plan.choices.exact and plan.choices.with_tables == 0
    targets = {n.name: n.target for n in graph.nodes}
    for node in plan.strategy.nodes:
        if targets[node] == "conv2d":
            assert cuts(plan, node) == {"n": 4}, node
        if targets[node] == "linear":
            assert cuts(plan, node) == {"o": 4}, node


def test_resnet_is_about_data_parallel() -> None:
    graph, costs, plan = own_space("resnet50")
    data_parallel = _C.choices_of(graph, costs, dict(_C.seeds(graph, 4))["ddp"])
    by_samples = [name for name in plan.strategy.nodes if cuts(plan, name) == {"n": 4}]
    assert len(by_samples) >= 0.9 * len(plan.strategy.nodes)
    assert cuts(plan, "fc") == {"o": 4}
    assert 0 < 1 - plan.cost_ns / costs.choices.cost(data_parallel) < 0.02


def test_the_search_prices_it_like_a_seed() -> None:
    graph, rows, cost = imagenet("alexnet", 8), [2] * 4, _C.CostModel(p100(4))
    options = _C.SearchOptions()
    options.descent_simulations = options.mcmc_simulations = 0
    found = _C.search(graph, rows, cost, options)
    candidates = {c.name: c for c in found.candidates}
    plan = _C.optimize_layers(graph, rows, cost)
    assert candidates["optcnn"].step_ns == _C.simulate(_C.lower(graph, plan.strategy, rows), cost).step_ns
    assert candidates["optcnn"].step_ns < 0.7 * candidates["ddp"].step_ns
    assert found.candidates[found.best].step_ns <= candidates["optcnn"].step_ns


def test_in_little_memory_it_costs_more_and_fits() -> None:
    """By its own estimate; a limit that nothing keeps is told."""
    graph, rows, cost = imagenet("alexnet", 8), [2] * 4, _C.CostModel(p100(4))
    free = _C.optimize_layers(graph, rows, cost)
    costs = _C.layer_costs(graph, rows, cost)
    lightest = sum(min(of_layer) for of_layer in costs.memory_bytes)
    limit = (free.memory_bytes + lightest) // 2
    assert lightest < free.memory_bytes
    kept = _C.optimize_layers(graph, rows, cost, memory_limit_bytes=limit)
    assert kept.fits and lightest <= kept.memory_bytes <= limit and kept.cost_ns >= free.cost_ns
    assert not _C.optimize_layers(graph, rows, cost, memory_limit_bytes=1 << 20).fits


def test_it_refuses_what_it_can_not_price() -> None:
    graph = lenet()
    with pytest.raises(ValueError, match="1 to 64 devices, not 65"):
        _C.layer_costs(graph, [1] * 65, _C.CostModel(p100(65)))
    with pytest.raises(ValueError, match="has 2 devices, not 4"):
        _C.layer_costs(graph, [4] * 4, _C.CostModel(p100(2)))
    with pytest.raises(ValueError, match="has 3 entries, it needs 4"):
        _C.minimize(_C.ChoiceGraph([[0, 1], [2, 3]], [[0, 0, 0]], [_C.ChoiceEdge(0, 1, 0)]))
