"""Manual plans: exact at every grid of degrees, laid out as a person would, refused with what would be legal."""

from __future__ import annotations

import functools
import math
import platform
from typing import Any

import pytest
import torch
from torch import nn

from examples.gpt import GPT, next_byte_loss
from tests.unit.planning import lowered, movements, node, op_graph
from torch_soap import _C, manual_plan, verify
from torch_soap.capture import Captured, capture
from torch_soap.manual import ORDERS
from torch_soap.plan import make_plan
from torch_soap.planner import graph_for
from torch_soap.verify import verify_captured


def mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)]
    layers += [nn.Linear(16, 16) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(16, 8)), (torch.randn(16, 16), torch.arange(16) % 8), nn.functional.cross_entropy


def gpt() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    torch.manual_seed(0)
    model = GPT(vocabulary=32, layers=4, hidden=16, heads=8, context=16)
    return model, (torch.randint(32, (16, 4)), torch.randint(32, (16, 4))), next_byte_loss


MODELS = {"mlp": mlp, "gpt": gpt}


def grids(world: int) -> list[tuple[int, int, int]]:
    powers = [2**i for i in range(int(math.log2(world)) + 1)]
    return [(dp, tp, world // dp // tp) for dp in powers for tp in powers if dp * tp <= world]


CASES = [
    (model, grid, {"micro_batches": 2 if grid[2] > 1 else 1, "zero": zero if grid[0] > 1 else 0})
    for model in MODELS
    for world in (2, 4, 8)
    for grid, zero in zip(grids(world), [1, 3, 2, 0, 3, 1, 2, 3, 0, 3], strict=False)
]
MORE = [
    ("gpt", (2, 1, 2), {"micro_batches": 4, "schedule": "gpipe", "zero": 3}),
    ("gpt", (4, 1, 1), {"micro_batches": 2, "zero": 1}),
    ("gpt", (4, 2, 1), {"zero": 3, "zero_group": 2}),
    ("mlp", (8, 1, 1), {"zero": 3, "zero_group": 4}),
    ("mlp", (2, 2, 2), {"micro_batches": 3, "zero": 2}),
]


@functools.cache
def captured(model: str) -> Captured:
    module, inputs, loss = MODELS[model]()
    return capture(module.double(), tuple(t.double() if t.is_floating_point() else t for t in inputs), {}, loss=loss)


@pytest.mark.parametrize(("model", "grid", "more"), CASES + MORE)
def test_every_grid_is_exact(model: str, grid: tuple[int, int, int], more: dict[str, Any]) -> None:
    graph = op_graph(captured(model))
    options = _C.ManualOptions()
    options.dp, options.tp, options.pp = grid
    options.order, options.strict = ORDERS[more.get("schedule", "1f1b")], True
    for name in ("micro_batches", "zero", "zero_group"):
        setattr(options, name, more.get(name, getattr(options, name)))
    plan = make_plan(graph, _C.manual_strategy(graph, math.prod(grid), options))
    report = verify_captured(captured(model), plan, steps=2 if options.zero else 1, dtype=torch.float64)
    assert report.ok, f"{report}\n{plan.text}"


def program(model: str, **degrees: Any) -> _C.Program:
    module, inputs, loss = MODELS[model]()
    world = math.prod(degrees.get(k, 1) for k in ("dp", "tp", "pp"))
    plan = manual_plan(module, inputs, loss=loss, machine=_C.Machine(world), **degrees)
    graph, _, rows = graph_for(module, inputs, loss, world)
    return lowered(graph, plan.text, rows)


def devices(p: _C.Program, name: str) -> list[int]:
    return list(p.tilings[node(p.graph, name).id].devices)


def stored(p: _C.Program, name: str) -> dict[int, list[str]]:
    """Device -> its part of a parameter, an index set for each dim."""
    tensor = node(p.graph, f"param:{name}").outputs[0]
    return {d: [str(s) for s in c.box] for c in p.tiles[tensor].coords for d in c.devices}


def test_tensor_ranks_are_neighbours_and_stages_lie_farthest_apart() -> None:
    p = program("mlp", dp=2, tp=2, pp=2, micro_batches=2)
    assert devices(p, "0") == [0, 1, 2, 3] and devices(p, "11") == [4, 5, 6, 7]
    parts = stored(p, "0.weight")  # by output channels within a group, alike in both
    assert parts[0] == parts[2] != parts[1] == parts[3] and len(parts) == 4


def test_a_tensor_group_sums_twice_in_each_layer_of_a_transformer() -> None:
    """Megatron, section 3: one all-reduce after the attention and one after the MLP; nothing between queries, keys and values and their heads."""
    p = program("gpt", tp=4)
    forward = [(name, pattern) for kind, name, pattern, _ in movements(p) if kind == "fill" and name.startswith("blocks.1")]
    assert forward == [("blocks.1.proj", "all_reduce"), ("blocks.1.down", "all_reduce")]
    backward = [(name, pattern) for kind, name, pattern, _ in movements(p) if kind == "grad_fill" and name.startswith("blocks.1")]
    assert backward == [("blocks.1.norm2", "all_reduce"), ("blocks.1.norm1", "all_reduce")]


@pytest.mark.parametrize(("zero", "keep"), [(1, _C.Keep.until_step), (2, _C.Keep.until_backward), (3, _C.Keep.use)])
def test_zero_stores_parts_within_the_replicas_of_a_tensor_rank(zero: int, keep: _C.Keep) -> None:
    p = program("mlp", dp=2, tp=2, zero=zero)
    for name, numel in (("0.weight", 512), ("2.weight", 512), ("2.bias", 16), ("3.weight", 16)):
        tensor = node(p.graph, f"param:{name}").outputs[0]
        ranks = 1 if name in ("2.bias", "3.weight") else 2
        assert {math.prod(len(s) for s in c.box) for c in p.tiles[tensor].coords} == {numel // 2 // ranks}, name
        assert {g.keep for g in p.groups if g.tensor == tensor} == {keep}
    # Ranks 0 of both groups share the half of the output channels that they use: nothing is gathered from another tensor rank.
    tensor = node(p.graph, "param:0.weight").outputs[0]
    rows = {d: c.box[0] for c in p.tiles[tensor].coords for d in c.devices}
    assert [rows[d].begin for d in (0, 2, 1, 3)] == [0, 8, 16, 24]


def test_hsdp_cuts_within_groups_and_repeats_over_them() -> None:
    parts = stored(program("mlp", dp=4, zero=3, zero_group=2), "0.weight")
    assert parts[0] == parts[2] != parts[1] == parts[3]


def test_stages_are_balanced() -> None:
    """Four equal linears in two stages, whatever else there is: two each."""
    torch.manual_seed(0)
    module = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.ReLU())))
    plan = manual_plan(module, (torch.randn(8, 32), torch.randn(8, 32)), loss=nn.functional.mse_loss, machine=_C.Machine(2), pp=2, micro_batches=4)
    placed = {name: list(plan.strategy.nodes[name].devices) for name in ("0", "2", "4", "6")}
    assert placed == {"0": [], "2": [], "4": [1], "6": [1]}  # no list: device 0


@pytest.mark.parametrize(
    ("model", "degrees", "words"),
    [
        ("gpt", {"tp": 3}, r"scaled_dot_product_attention.*h=8.*3 equal parts; legal here: tp=1, 2, 4, 8"),
        ("gpt", {"tp": 16}, r"h=8.*legal here: tp=1, 2, 4, 8"),
        ("mlp", {"tp": 48}, r"0 \(linear\) has o=32.*48 parts"),
        ("mlp", {"pp": 10}, r"pp=10.* there are 9, the last begins at 11; legal: pp=1 to 9"),
        ("mlp", {"dp": 8, "micro_batches": 4}, r"16 rows, dp=8 x micro_batches=4 need 32; legal with this dp: micro_batches=1 to 2"),
        ("mlp", {"dp": 4, "zero": 3, "zero_group": 3}, r"zero_group=3 doesn't divide dp=4; legal: 1, 2, 4"),
        ("mlp", {"tp": 2, "zero": 1}, "dp is 1"),
        ("mlp", {"dp": 2, "zero": 4}, "zero=4"),
        ("mlp", {"dp": 0}, "degrees are 1 or more"),
        ("mlp", {"dp": 2, "world_size": 4}, "are 2 devices, there are 4"),
        ("mlp", {"pp": 2, "schedule": "zigzag"}, 'schedule "zigzag"'),
    ],
)
def test_a_degree_that_cannot_be_is_refused(model: str, degrees: dict[str, Any], words: str) -> None:
    module, inputs, loss = MODELS[model]()
    with pytest.raises(ValueError, match=words):
        manual_plan(module, inputs, loss=loss, machine=_C.Machine(64), **degrees)


def test_1f1b_without_a_loss_is_refused_and_gpipe_is_exact() -> None:
    module, (x, _), _ = mlp()
    with pytest.raises(ValueError, match="1f1b needs the loss"):
        manual_plan(module, (x,), machine=_C.Machine(2), pp=2, micro_batches=2)
    plan = manual_plan(module, (x,), machine=_C.Machine(2), pp=2, micro_batches=2, schedule="gpipe")
    assert verify(module, (x,), plan, steps=2).ok


def test_time_first_inputs_cut_the_samples_not_the_sequence() -> None:
    """An LSTM with time first: dim 0 of what its linear reads isn't the sample."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x.transpose(0, 1))[0]).transpose(0, 1)

    torch.manual_seed(0)
    module, x = TimeFirst(), torch.randn(8, 5, 4)
    plan = manual_plan(module, (x,), machine=_C.Machine(4), dp=2, tp=2)
    assert [c[0] for c in plan.strategy.nodes["rnn"].cuts] == ["n"]
    assert plan.strategy.nodes["head"].cuts[0][0] == "s"
    assert verify(module, (x,), plan, steps=2).ok


def test_the_prediction_is_of_the_plan() -> None:
    module, inputs, loss = mlp()
    plan = manual_plan(module, inputs, loss=loss, machine=_C.Machine(4), dp=2, tp=2)
    assert plan.context is not None
    simulation = _C.simulate(_C.lower(plan.context.graph, plan.strategy, plan.context.rows), plan.context.cost)
    assert plan.predicted["step_time_ns"] == simulation.step_ns and plan.predicted["memory_bytes"] == list(simulation.memory_bytes)
    assert "predicted step" in plan.explain()
    assert verify(module, inputs, plan, loss=loss, steps=1).ok


def test_degrees_without_a_machine_are_priced_on_this_one() -> None:
    module, inputs, loss = mlp()
    plan = manual_plan(module, inputs, loss=loss, dp=2)
    assert plan.machine == {"name": platform.node(), "devices": 2}
    assert plan.stats["capture_seconds"] <= plan.stats["seconds"]
