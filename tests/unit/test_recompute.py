"""Recomputation: the same bits as without it, in the plan's text, in manual plans, priced, and found where memory is short."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT, next_byte_loss
from tests.unit.planning import lowered, op_graph
from torch_soap import _C, diff, manual_plan
from torch_soap.capture import Captured, capture
from torch_soap.plan import as_plan, make_plan
from torch_soap.random import CounterState
from torch_soap.runtime import Engine, ThreadComm
from torch_soap.runtime.comm import ThreadWorld
from torch_soap.verify import RankResult, bits_equal, even_rows, run_rank

Model = tuple[nn.Module, tuple[Any, ...], Callable[..., Any] | None]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


def blocks() -> Model:
    return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(8, 5)), (torch.randn(8, 8), torch.arange(8) % 5), F.cross_entropy


def convs() -> Model:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)]
    return nn.Sequential(*layers), (torch.randn(6, 2, 6, 6),), None


class Drifting(nn.Module):
    """Reads a buffer that it writes: backward must compute again on what forward read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x) + self.seen)
        self.seen.mul_(0.5).add_(0.25)
        return y * y


def drifting() -> Model:
    return nn.Sequential(Drifting(), nn.Linear(4, 3)), (torch.randn(6, 4),), None


def recurrent() -> Model:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, num_layers=2, dropout=0.3), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    return Net(), (torch.randn(6, 4, 4),), None


@functools.cache
def captured_model(make: Callable[[], Model]) -> tuple[Captured, int]:
    torch.manual_seed(0)
    module, inputs, loss = make()
    captured = capture(module, inputs, {}, loss=loss)
    rows = next(t.shape[d] for t, d in zip(inputs, captured.batch_dims, strict=True) if d is not None)
    return captured, rows


def trained(make: Callable[[], Model], text: str, world: int = 2) -> list[RankResult]:
    """Two steps of every rank."""
    captured, total = captured_model(make)
    inputs = [captured.leaves[i] for i in captured.tensor_slots]
    graph = captured.instantiate(captured._signature_of(inputs))
    strategy = _C.parse_plan(whole := op_graph(captured), text, world)
    program = _C.lower(whole, strategy, even_rows(total, world))
    results: list[RankResult] = ThreadWorld(world).run(lambda comm: run_rank(captured, program, graph, inputs, 2, 7, comm))
    return results


def differing(a: list[RankResult], b: list[RankResult]) -> list[str]:
    """Names of tensors of which a bit differs."""
    out = []
    for rank, (one, other) in enumerate(zip(a, b, strict=True)):
        for kind in ("outputs", "grads", "input_grads", "buffers", "parameters"):
            for step, (x, y) in enumerate(zip(getattr(one, kind), getattr(other, kind), strict=True)):
                assert x.keys() == y.keys()
                for name in x:
                    same = x[name] is None and y[name] is None
                    if not same and (x[name] is None or y[name] is None or not bits_equal(x[name], y[name])):
                        out.append(f"{kind} {name} rank {rank} step {step}")
    return out


MEGATRON = "*.up o=2\n*.down i=2\n* replicas=2"
BITS = [
    (blocks, "recompute 0 1 2", "* n=fed"),
    (blocks, "recompute 0+1 2", "* n=fed store=shard keep=use"),
    (blocks, "recompute *", MEGATRON),
    (blocks, "recompute 0 2", "* n=2x2t"),
    (blocks, "recompute 0+1 2", "set order=1f1b\n0* n=1x4t @ [0]\n1* n=1x4t @ [0]\n* n=1x4t @ [1]"),
    (blocks, "recompute 0 1+2", "set order=1f1b\n* n=2x2t store=shard keep=use"),
    (convs, "recompute 0+1+2+3 4+5", "* n=fed"),
    (convs, "recompute 0+1 2+3+4", "* h=2"),
    (drifting, "recompute 0", "* n=fed"),
    (recurrent, "recompute rnn head", "rnn/* t=2\n* n=fed"),
]


@pytest.mark.parametrize(("make", "regions", "plan"), BITS, ids=[f"{m.__name__}, {r}, {p.splitlines()[0]}" for m, r, p in BITS])
def test_bits_are_the_same(make: Callable[[], Model], regions: str, plan: str) -> None:
    assert not differing(trained(make, plan), trained(make, f"{regions}\n{plan}"))


def graph_of(module: nn.Module, *inputs: torch.Tensor, loss: Callable[..., Any] | None = None) -> _C.OpGraph:
    return op_graph(capture(module, inputs, {}, loss=loss, check=False))


@functools.cache
def gpt_graph(layers: int = 4) -> _C.OpGraph:
    torch.manual_seed(0)
    return graph_of(GPT(vocabulary=32, layers=layers, hidden=16, heads=2, context=8), torch.randint(32, (8, 8)), torch.randint(32, (8, 8)), loss=next_byte_loss)


# -- the plan's text ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "regions"),
    [
        ("recompute blocks.0", [["blocks.0"]]),
        ("recompute blocks.*", [["blocks.0"], ["blocks.1"], ["blocks.2"], ["blocks.3"]]),
        ("recompute blocks.3 blocks.*", [["blocks.3"], ["blocks.0"], ["blocks.1"], ["blocks.2"]]),
        ("recompute blocks.0+blocks.1\nrecompute blocks.?", [["blocks.0", "blocks.1"], ["blocks.2"], ["blocks.3"]]),
        ("recompute blocks.1.norm?+blocks.1.up blocks.1/gelu", [["blocks.1.norm1", "blocks.1.norm2", "blocks.1.up"], ["blocks.1/gelu"]]),
    ],
)
def test_text(line: str, regions: list[list[str]]) -> None:
    graph = gpt_graph()
    strategy = _C.parse_plan(graph, f"{line}\n* n=2", 2)
    assert strategy.recompute == regions
    assert _C.parse_plan(graph, _C.print_plan(graph, strategy), 2) == strategy
    plan = make_plan(graph, strategy)
    assert as_plan(plan.to_json(), graph).strategy == strategy


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recompute", "Name modules or operators"),
        ("recompute blocks.9", "no module or operator blocks.9; there are tokens, positions, blocks"),
        ("recompute blocks.0 blocks.0.up", "blocks.0.up is in two regions, blocks.0 and blocks.0.up"),
        ("recompute blocks.0 blocks.0", "blocks.0 stands twice"),
    ],
)
def test_refused_text(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"plan line 1: .*{message}"):
        _C.parse_plan(gpt_graph(), line, 2)


def test_a_changed_model_keeps_the_regions_that_are_left() -> None:
    plan = make_plan(gpt_graph(), _C.parse_plan(gpt_graph(), "recompute blocks.1 blocks.2+blocks.3\n* n=2", 2))
    with pytest.warns(UserWarning, match=r"no longer there: blocks.2\+blocks.3"):
        kept = as_plan(plan.to_json(), gpt_graph(layers=3))
    assert kept.strategy.recompute == [["blocks.1"]]


# -- what is computed again ---------------------------------------------------------------------------------------------
def test_a_region_is_its_modules_operators_also_those_that_follow() -> None:
    program = lowered(gpt_graph(), "recompute blocks.1\n*.qkv n=2", [4, 4])
    inside = {n.name for n, r in zip(program.graph.nodes, program.regions, strict=True) if r == 0}
    assert inside == {n.name for n in program.graph.nodes if n.name.startswith("blocks.1") and n.kind == _C.NodeKind.op}


def test_segments_hold_one_region_and_one_chunk() -> None:
    program = lowered(gpt_graph(), "recompute blocks.1 blocks.2+blocks.3\n* n=2x2t", [4, 4])
    for segment in _C.project(program, 1).segments:
        regions = {program.regions[i.node] for i in segment.items}
        assert regions == {segment.region}
        assert segment.region < 0 or len({i.chunk for i in segment.items}) == 1


def test_each_segment_of_a_region_is_computed_again_once_before_its_backward() -> None:
    program = lowered(gpt_graph(), "recompute blocks.*\n" + "\n".join(["*.qkv o=2:3.16.1", "*.up o=2", "*.down i=2", "*.proj i=2", "* replicas=2"]), [4, 4])
    rank = _C.project(program, 0)
    again = [(position, a.segment) for position, i in enumerate(rank.instructions) for a in i.recomputes if a.segment >= 0]
    wanted = [s for s, segment in enumerate(rank.segments) if segment.region >= 0]
    assert sorted(s for _, s in again) == wanted
    own = {i.segment: position for position, i in enumerate(rank.instructions) if i.kind == _C.InstructionKind.segment_backward}
    assert all(position <= own[s] for position, s in again)


def test_a_region_that_is_gathered_again_is_gathered_before_its_first_backward() -> None:
    program = lowered(gpt_graph(), "recompute blocks.*\n* n=fed store=shard keep=use", [4, 4])
    kinds = [s.kind for s in program.steps]
    names = [program.graph.nodes[s.items[0].id].name if s.kind == _C.StepKind.compute_backward else "" for s in program.steps]
    for block in ("blocks.3", "blocks.2"):
        first = next(i for i, name in enumerate(names) if name.startswith(block))
        last = len(names) - next(i for i, name in enumerate(reversed(names)) if name.startswith(block))
        assert _C.StepKind.refill in kinds[:first]
        assert _C.StepKind.refill not in kinds[first:last], "computing the block again needs all its parameters at once"


class Effects(nn.Module):
    """Can't be traced, draws, and counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Effects.calls += 1
        scale = 1.0 if float(x.detach().sum()) > 1e9 else 2.0
        return F.dropout(x * scale, 0.5, self.training)


def test_opaque_code_runs_once() -> None:
    captured, _ = captured_model(lambda: (nn.Sequential(nn.Linear(4, 4), Effects(), nn.Linear(4, 3)), (torch.randn(4, 4),), None))
    graph = op_graph(captured)
    assert any(n.target == "opaque" for n in graph.nodes)
    program = lowered(graph, "recompute 0+1+2\n* n=1", [4])
    assert [r for n, r in zip(program.graph.nodes, program.regions, strict=True) if n.target == "opaque"] == [-1]
    assert max(program.regions) == 0
    text = _C.explain_recompute(graph, _C.parse_plan(graph, "recompute 0+1+2\n* n=1", 1), [4], _C.CostModel(_C.Machine(1)), 1 << 40)
    assert "kept, because opaque code may have effects: 1" in text


def engine_of(text: str) -> tuple[Engine, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    captured, _ = captured_model(blocks)
    inputs = [captured.leaves[i] for i in captured.tensor_slots]
    graph = captured.instantiate(captured._signature_of(inputs))
    program = lowered(op_graph(captured), text, [8])
    engine = Engine(program, graph, 0, ThreadComm(ThreadWorld(1), 0))
    feeds = {n.name: t.detach().clone() for n, t in zip([n for n in graph.nodes if n.kind == "feed"], inputs, strict=True)}
    return engine, feeds, {n: t.detach().clone() for n, t in captured.stored_tensors(graph).items()}


def test_changed_in_place_is_told() -> None:
    """Without recomputation autograd says so; with it, the new value would silently be used."""
    engine, feeds, stored = engine_of("recompute 0 1\n* n=1")
    state = engine.forward(feeds, stored, grad=True, random=CounterState(1))
    stored["param:0.up.bias"].add_(1.0)
    with pytest.raises(RuntimeError, match=r"param:0.up.bias was changed in place"):
        engine.backward(state, {})


def test_without_gradients_nothing_is_kept() -> None:
    held = []
    for grad in (True, False):
        engine, feeds, stored = engine_of("recompute 0 1\n* n=1")
        held.append(set(engine.forward(feeds, stored, grad=grad, random=CounterState(1)).values))
    plain, feeds, stored = engine_of("* n=1")
    assert held[1] == set(plain.forward(feeds, stored, grad=False, random=CounterState(1)).values)
    assert len(held[0]) > len(held[1])


@pytest.mark.parametrize("regions", ["", "recompute 0 1+2\n"])
def test_an_interleaved_program_evaluates(regions: str) -> None:
    outputs = []
    for order in ("", "set order=1f1b\n"):
        engine, feeds, stored = engine_of(f"{regions}{order}* n=2t")
        state = engine.forward(feeds, stored, grad=False, random=CounterState(1))
        outputs.append(engine.output(state, engine.returns[0]))
    assert bits_equal(*outputs)


# -- regions that are found ----------------------------------------------------------------------------------------------
def test_repeated_blocks() -> None:
    assert _C.repeated_blocks(gpt_graph()) == [[f"blocks.{i}"] for i in range(4)]
    resnet = graph_of(tv.ResNet(tv.resnet.BasicBlock, [2, 1, 2, 1], num_classes=4), torch.randn(2, 3, 32, 32))
    assert _C.repeated_blocks(resnet) == [["layer1.0"], ["layer1.1"], ["layer3.0"], ["layer3.1"]]
    mlp = graph_of(nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))), torch.randn(2, 4))
    assert _C.repeated_blocks(mlp) == []
    assert _C.usual_regions(mlp) == [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"]]


def machine(devices: int, mib: float = 1 << 14) -> _C.Machine:
    out = _C.Machine(devices)
    out.memory_bytes = int(mib * (1 << 20))
    return out


def gpt_model(layers: int = 5) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return GPT(vocabulary=64, layers=layers, hidden=32, heads=2, context=32), (torch.randint(64, (16, 32)), torch.randint(64, (16, 32)))


def test_manual_plans() -> None:
    model, inputs = gpt_model()
    price = functools.partial(manual_plan, model, inputs, loss=next_byte_loss, machine=machine(2), dp=2)
    plain, again, two = price(), price(recompute=True), price(recompute=["blocks.1+blocks.2", "blocks.4"])
    assert [r[0] for r in again.strategy.recompute] == [f"blocks.{i}" for i in range(5)]
    assert two.strategy.recompute == [["blocks.1", "blocks.2"], ["blocks.4"]]
    peaks = [max(p.predicted["memory_bytes"]) for p in (plain, two, again)]
    steps = [p.predicted["step_time_ns"] for p in (plain, two, again)]
    assert peaks == sorted(peaks, reverse=True)
    assert steps == sorted(steps)
    assert steps[2] < steps[0] * 4 / 3, "at most the forward again, which is a third of forward and backward"
    assert "computed again in backward" in again.explain()
    assert "computed again" not in plain.explain()
    line = str(diff(plain, two))
    assert "computed again in backward: nothing -> blocks.1+blocks.2 blocks.4" in line
    change = plain.why_not("recompute blocks.*")
    assert change.after is not None
    assert change.after.step_ns == steps[2]
    with pytest.raises(ValueError, match="no module has numbered children that are alike"):
        manual_plan(nn.Linear(4, 4), torch.randn(4, 4), machine=machine(2), dp=2, recompute=True)


def test_where_memory_is_short_the_search_recomputes() -> None:
    graph = op_graph(capture(*gpt_model(), {}, loss=next_byte_loss, check=False))
    cost = _C.CostModel(machine(2))

    def peak(name: str, regions: Sequence[Sequence[str]]) -> int:
        strategy = dict(_C.seeds(graph, 2))[name].copy()
        strategy.recompute = [list(r) for r in regions]
        return max(_C.simulate(_C.lower(graph, strategy, [8, 8]), cost).memory_bytes)

    names = [n for n, _ in _C.seeds(graph, 2)]
    smallest = min(peak(n, []) for n in names)
    with_regions = min(peak(n, _C.usual_regions(graph)) for n in names)
    assert with_regions < smallest
    limit = (smallest + with_regions) // 2
    options = _C.SearchOptions()
    options.descent_simulations = options.mcmc_simulations = 20
    roomy = _C.search(graph, [8, 8], cost, options)
    assert not any(c.strategy.recompute for c in roomy.candidates)
    options.memory_limit_bytes = limit
    found = _C.search(graph, [8, 8], cost, options)
    best = found.candidates[found.best]
    assert best.strategy.recompute
    assert best.fits
    assert best.memory_bytes <= limit
    assert best.step_ns >= roomy.candidates[roomy.best].step_ns
    assert "without it the plan doesn't fit" in _C.explain_recompute(graph, best.strategy, [8, 8], cost, limit)
    fewer = best.strategy.copy()
    fewer.recompute = fewer.recompute[:-1]
    assert max(_C.simulate(_C.lower(graph, fewer, [8, 8]), cost).memory_bytes) > limit, "no region too many"


# -- planted bugs --------------------------------------------------------------------------------------------------------
def caught(make: Callable[[], Model], plan: str) -> None:
    try:
        wrong = differing(trained(make, plan.split("\n", 1)[1]), trained(make, plan))
    except (RuntimeError, KeyError):
        return
    assert wrong, "the planted bug went unnoticed"


def test_other_random_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine._compute_again

    def redrawn(self: Engine, state: Any, segment: int) -> None:
        state.random.call += 1
        original(self, state, segment)

    monkeypatch.setattr(Engine, "_compute_again", redrawn)
    caught(blocks, "recompute 0 1\n* n=fed")


def test_reading_written_buffers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.__init__

    def forgetful(self: Engine, *args: Any) -> None:
        original(self, *args)
        self.overwritten = []

    monkeypatch.setattr(Engine, "__init__", forgetful)
    caught(drifting, "recompute 0\n* n=fed")


def test_statistics_updated_twice_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine._compute_again

    def with_effects(self: Engine, state: Any, segment: int) -> None:
        original(self, state, segment)
        for store in self.stores:
            running = state.values[self.value_of_store[store]]
            if self._is_written(store) and running.is_floating_point():
                running.lerp_(torch.zeros_like(running), 0.1)

    monkeypatch.setattr(Engine, "_compute_again", with_effects)
    caught(convs, "recompute 0+1 4+5\n* n=fed")


def test_a_regions_input_freed_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.__init__

    def hasty(self: Engine, *args: Any) -> None:
        original(self, *args)
        self.frees = [[*frees, *kept] for frees, kept in zip(self.frees, self.kept, strict=True)]

    monkeypatch.setattr(Engine, "__init__", hasty)
    caught(blocks, "recompute 0 1\n* n=fed")
