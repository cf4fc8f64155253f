"""Grid plans priced by what one group does, against the simulation that names every device; the search over them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import torch_soap
from examples.gpt import GPT, next_byte_loss
from examples.llama import SIZES, Llama, Sizes
from tests.unit.planning import patterns
from torch_soap import _C
from torch_soap.grids import is_large, plan_grids
from torch_soap.planner import graph_for
from torch_soap.verify import verify

ROWS, LENGTH = 16, 512
SMALL = Sizes(layers=4, hidden=1024, ffn=2816, heads=16, key_heads=4, vocabulary=8192)  # large enough that latencies don't decide


def machine(name: str = "cpu-10g", devices: int = 8) -> torch_soap.Machine:
    return torch_soap.Machine.preset(name, hosts=max(devices // 4, 1), devices_per_host=min(devices, 4))


def tokens(rows: int = ROWS, length: int = LENGTH) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long, device="meta")


@pytest.fixture(scope="module")
def llama() -> _C.OpGraph:
    with torch.device("meta"):
        module = Llama(SMALL, context=LENGTH).to(torch.bfloat16)
    return graph_for(module, (tokens(), tokens()), None, 8)[0]


def options(**degrees: Any) -> _C.ManualOptions:
    out = _C.ManualOptions()
    for name, value in degrees.items():
        setattr(out, name, value)
    if out.micro_batches > 1:
        out.order = _C.Order.interleaved
    return out


def simulated(graph: _C.OpGraph, strategy: _C.Strategy, cost: _C.CostModel) -> _C.Simulation:
    world = strategy.world_size
    return _C.simulate(_C.lower(graph, strategy, [ROWS // world] * world), cost)


GRIDS: list[dict[str, Any]] = [
    {"dp": 8},
    {"dp": 8, "zero": 1},
    {"dp": 8, "zero": 3},
    {"dp": 8, "zero": 3, "zero_group": 4},
    {"tp": 8},
    {"tp": 8, "sequence": True},
    {"dp": 2, "tp": 4},
    {"dp": 4, "tp": 2, "zero": 3},
    {"dp": 4, "tp": 2, "recompute": True},
    {"dp": 2, "tp": 4, "micro_batches": 4},
    {"tp": 8, "recompute": True},
    {"dp": 8, "micro_batches": 2},
]
# Where a gathered copy is there sooner (recomputation asks for it early) or goes later (1F1B keeps an embedding's) than a walk over one group knows.
ROUGH: list[dict[str, Any]] = [{"dp": 8, "zero": 3, "recompute": True}, {"dp": 8, "zero": 3, "micro_batches": 2}]


@pytest.mark.parametrize("grid", GRIDS + ROUGH, ids=str)
def test_a_grid_costs_what_naming_all_devices_costs(llama: _C.OpGraph, grid: dict[str, Any]) -> None:
    cost = _C.CostModel(machine())
    given = options(**grid)
    priced = _C.grid_price(llama, 8, cost, given)
    whole = simulated(llama, _C.manual_strategy(llama, 8, given), cost)
    assert priced.step_ns == pytest.approx(whole.step_ns, rel=0.02)
    assert priced.memory_bytes == pytest.approx(max(whole.memory_bytes), rel=0.05 if grid in ROUGH else 0.01)


STAGES: list[dict[str, Any]] = [{"dp": 4, "pp": 2, "micro_batches": 4}, {"dp": 2, "tp": 2, "pp": 2, "micro_batches": 4}]


@pytest.mark.parametrize("grid", STAGES, ids=str)
def test_stages_are_scheduled_about_as_lowering_orders_them(llama: _C.OpGraph, grid: dict[str, Any]) -> None:
    cost = _C.CostModel(machine())
    priced = _C.grid_price(llama, 8, cost, options(**grid))
    whole = simulated(llama, _C.manual_strategy(llama, 8, options(**grid)), cost)
    assert priced.step_ns == pytest.approx(whole.step_ns, rel=0.05)
    assert len(priced.stage_memory) == 2
    assert 0.97 < priced.memory_bytes / max(whole.memory_bytes) < 1.1, "rather too much than too little"


def deep_mlp() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    layers = [m for _ in range(3) for m in (nn.Linear(512, 2048), nn.GELU(), nn.Dropout(0.1), nn.Linear(2048, 512), nn.LayerNorm(512))]
    return nn.Sequential(*layers, nn.Linear(512, 1000)), (torch.zeros(1024, 512), torch.zeros(1024, dtype=torch.long)), nn.functional.cross_entropy


def small_gpt() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    batch = torch.zeros(16, 128, dtype=torch.long)
    return GPT(vocabulary=2048, layers=2, hidden=256, heads=8, context=128), (batch, batch), next_byte_loss


@pytest.mark.parametrize("make", [deep_mlp, small_gpt])
def test_other_models_hold_what_is_priced(make: Any) -> None:
    """Inputs that are large, a tied embedding, classes that are cut, masks of dropout."""
    with torch.device("meta"):
        module, batch, loss = make()
    graph = graph_for(module, batch, loss, 8)[0]
    cost = _C.CostModel(machine())
    for grid in ({"dp": 8, "zero": 1}, {"tp": 8}, {"dp": 4, "tp": 2, "recompute": True}, {"dp": 4, "tp": 2, "zero": 3, "sequence": True}):
        whole = _C.simulate(_C.lower(graph, _C.manual_strategy(graph, 8, options(**grid)), [len(batch[0]) // 8] * 8), cost)
        priced = _C.grid_price(graph, 8, cost, options(**grid)).memory_bytes
        assert priced == pytest.approx(max(whole.memory_bytes), rel=0.02), grid


def small_convolutions() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    blocks = [m for i, o in ((3, 64), (64, 128)) for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    module = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 64, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 100))
    return module, (torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.long)), nn.functional.cross_entropy


def small_llama() -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    return Llama(SMALL, context=LENGTH).to(torch.bfloat16), (tokens(), tokens()), None


def legal_grids(sequence: bool) -> list[dict[str, Any]]:
    """Of eight devices, all that a person may write with up to four micro-batches."""
    out: list[dict[str, Any]] = []
    for tp, pp, count in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4)):
        dp = 8 // tp // pp
        if tp * pp > 8:
            continue
        orders = [_C.Order.interleaved, _C.Order.forward_then_backward] if count > 1 else [_C.Order.forward_then_backward]
        parts = itertools.product(orders, (0, 1, 3) if dp > 1 else (0,), (False, True) if tp > 1 and sequence else (False,), (False, True))
        out += [{"dp": dp, "tp": tp, "pp": pp, "micro_batches": count, "order": o, "zero": z, "sequence": s, "recompute": r} for o, z, s, r in parts]
    return out


def swept_machines() -> dict[str, torch_soap.Machine]:
    named = {f"{name} {hosts}x{8 // hosts}": (name, hosts) for name in ("cpu-10g", "k80") for hosts in (1, 2)}
    return {key: torch_soap.Machine.preset(name, hosts=hosts, devices_per_host=8 // hosts) for key, (name, hosts) in named.items()} | {"h100": without_host()}


@pytest.mark.parametrize("make", [small_llama, small_gpt, small_convolutions])
def test_a_sweep_of_grids_costs_about_what_it_is_simulated_to(make: Any) -> None:
    """Not chosen by hand: every seventh of all. Fewer are close where steps are short and stages many (docs/search.md)."""
    with torch.device("meta"):
        module, batch, loss = make()
    graph = graph_for(module, batch, loss, 8)[0]
    costs = {name: _C.CostModel(on) for name, on in swept_machines().items()}
    ratios: dict[str, list[float]] = {name: [] for name in costs}
    for grid in legal_grids(sequence=make is not small_convolutions)[::7]:
        given = _C.ManualOptions()
        for name, value in grid.items():
            setattr(given, name, value)
        try:
            strategy = _C.manual_strategy(graph, 8, given)
        except ValueError:  # more stages than layers
            continue
        program = _C.lower(graph, strategy, [len(batch[0]) // 8] * 8)
        for name, cost in costs.items():
            ratios[name].append(_C.grid_price(graph, 8, cost, given).step_ns / _C.simulate(program, cost).step_ns)
    for name, found in ratios.items():
        off = [abs(r - 1) for r in found]
        assert len(off) >= 30 and max(off) < 0.25, (name, max(off))
        assert sum(o < 0.05 for o in off) >= 0.65 * len(off) and sum(o < 0.1 for o in off) >= 0.85 * len(off), (name, sorted(found))


def test_the_search_takes_no_worse_than_any_seed_and_its_strategy_costs_what_it_says(llama: _C.OpGraph) -> None:
    cost = _C.CostModel(machine())
    found = _C.search_grids(llama, 8, cost, _C.GridSearchOptions())
    best = found.candidates[0]
    assert best.fits and best.price.step_ns == min(c.price.step_ns for c in found.candidates if c.fits)
    names = {c.name for c in found.candidates}
    assert {"dp 8", "tp 8", "tp 8, sequence", "dp 8, zero-1", "dp 2 x tp 4"} <= names
    whole = simulated(llama, found.strategy, cost)
    assert whole.step_ns == pytest.approx(best.price.step_ns, rel=0.1)


def test_memory_decides(llama: _C.OpGraph) -> None:
    cost = _C.CostModel(machine())
    free = _C.search_grids(llama, 8, cost, _C.GridSearchOptions())
    tight = _C.GridSearchOptions()
    least = min(c.price.memory_bytes for c in free.candidates)
    tight.memory_limit_bytes = int(least * 1.1)
    found = _C.search_grids(llama, 8, cost, tight)
    assert found.candidates[0].price.memory_bytes <= tight.memory_limit_bytes < free.candidates[0].price.memory_bytes
    tight.memory_limit_bytes = least // 4
    with pytest.raises(ValueError, match=r"nothing fits: the smallest plan found .* needs .* MiB on a device, the limit is"):
        _C.search_grids(llama, 8, cost, tight)


def test_what_grids_share_changes_no_price(llama: _C.OpGraph) -> None:
    """The search prices one grid after the other and keeps what the next one has in common; here each is priced by itself."""
    cost, tight = _C.CostModel(machine()), _C.GridSearchOptions()
    tight.descents, tight.memory_limit_bytes = 0, 115 << 20
    candidates = _C.search_grids(llama, 8, cost, tight).candidates
    assert {c.options.recompute for c in candidates} == {c.options.sequence for c in candidates} == {False, True}
    for c in candidates[::5]:
        alone = _C.grid_price(llama, 8, cost, c.options)
        assert (c.price.step_ns, c.price.stage_memory) == (alone.step_ns, alone.stage_memory), c.name


def test_statistics_over_samples_are_refused_in_words() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    graph = graph_for(module, torch.zeros(16, 3, 8, 8), None, 8)[0]
    with pytest.raises(ValueError, match="statistics over samples"):
        plan_grids(graph, 8, _C.CostModel(machine()))


def test_a_large_world_is_planned_by_its_grid() -> None:
    with torch.device("meta"):
        module = Llama(SIZES["tiny"], context=LENGTH)
    batch = tokens(512), tokens(512)
    plan = torch_soap.plan(module, batch, machine=torch_soap.Machine.preset("h100", hosts=64, devices_per_host=8))
    assert is_large(graph_for(module, batch, None, 512)[0], 512)
    assert plan.world_size == 512 and plan.predicted["grid"]
    assert plan.predicted["chosen"] in plan.explain()
    graph = graph_for(module, batch, None, 512)[0]
    assert _C.parse_plan(graph, plan.text, 512) == plan.strategy
    with pytest.raises(ValueError, match="priced by its grid"):
        plan.why_not("tokens", "n=2")
    same = torch_soap.manual_plan(module, batch, machine=torch_soap.Machine.preset("h100", hosts=64, devices_per_host=8), dp=64, tp=2, pp=4, micro_batches=4)
    assert same.predicted["step_time_ns"] >= plan.predicted["step_time_ns"]


def test_runs_of_devices_are_written_short(llama: _C.OpGraph) -> None:
    text = "tokens  n=2 replicas=10 @ [0..18:2,1..19:2]"
    strategy = _C.parse_plan(llama, text, 20)
    assert "@ [0..18:2,1..19:2]" in _C.print_plan(llama, strategy)
    assert list(strategy.nodes["tokens"].devices) == [*range(0, 20, 2), *range(1, 20, 2)]
    with pytest.raises(ValueError, match="no run of devices"):
        _C.parse_plan(llama, "tokens n=2 @ [3..1]", 20)


@pytest.mark.parametrize("grid", [{"tp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_sequence_parallelism_and_a_cross_entropy_by_classes_are_exact(grid: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = Llama(SIZES["tiny"], context=8)
    batch = torch.randint(512, (4, 8)), torch.randint(512, (4, 8))
    plan = torch_soap.manual_plan(module, batch, machine=_C.Machine(math.prod(grid.values())), sequence=True, **grid)
    assert " s=2" in plan.text and " v=2" in plan.text
    report = verify(module, batch, plan, dtype=torch.float32)  # its loss is in float32: another graph in float64
    assert report.ok, report


def test_tensor_parallel_groups_reduce_among_themselves(llama: _C.OpGraph) -> None:
    program = _C.lower(llama, _C.manual_strategy(llama, 8, options(dp=4, tp=2)), [2] * 8)
    assert set(patterns(program, lambda name: name.endswith("attention.o"))) == {"fill all_reduce"}
    assert set(patterns(program, lambda name: name == "param:layers.0.ffn.up.weight")) == {"grad_fill all_reduce"}
    assert set(patterns(program, lambda name: name == "param:layers.0.ffn_norm.weight")) == {"grad_fill all_reduce"}


def without_host() -> torch_soap.Machine:
    """An H100 whose host takes no time, which would bound so small a model."""
    on = machine("h100")
    on.launch, on.op_overhead_ns = {}, 5e3
    return on


def as_fsdp(graph: _C.OpGraph, gigabytes_per_s: float, **degrees: Any) -> _C.GridPrice:
    on = without_host()
    on.intra.bytes_per_s = on.inter.bytes_per_s = gigabytes_per_s * 1e9
    return _C.grid_price(graph, 8, _C.CostModel(on), options(dp=8, zero=3, fsdp=True, **degrees))


def test_fully_shard_hides_its_movements_behind_compute_or_the_other_way_round(llama: _C.OpGraph) -> None:
    """Fast links: all that shows is the first gather and the last reduce-scatter; slow ones: all that shows is movements."""
    fast, slow, slower = (as_fsdp(llama, rate) for rate in (1e4, 1.0, 0.5))
    assert fast.compute_ns < fast.step_ns < 1.2 * fast.compute_ns
    assert slow.communication_ns > 5 * slow.compute_ns and slow.step_ns == pytest.approx(slow.communication_ns, rel=0.1)
    assert slower.step_ns == pytest.approx(2 * slow.step_ns, rel=0.05)


def test_fully_shard_gathers_in_every_micro_batch_and_keeps_until_backward_with_zero_2(llama: _C.OpGraph) -> None:
    one, two = as_fsdp(llama, 1.0), as_fsdp(llama, 1.0, micro_batches=2)
    assert two.communication_ns == pytest.approx(2 * one.communication_ns, rel=1e-3)
    # bfloat16: two gathers and a reduce-scatter in float32 are 8 bytes for a parameter, with one gather 6
    on = without_host()
    on.intra.bytes_per_s = on.inter.bytes_per_s = 1e9
    kept = _C.grid_price(llama, 8, _C.CostModel(on), options(dp=8, zero=2, fsdp=True))
    assert kept.communication_ns / one.communication_ns == pytest.approx(6 / 8, rel=0.01)


def test_fully_shard_recomputes_what_backward_needs_but_not_the_last_product(llama: _C.OpGraph) -> None:
    plain, again = as_fsdp(llama, 1e4), as_fsdp(llama, 1e4, recompute=True)
    whole = _C.grid_price(llama, 8, _C.CostModel(without_host()), options(dp=8, zero=3, recompute=True))
    everything = whole.compute_ns - plain.compute_ns  # once more, all of the blocks
    assert 0.5 * everything < again.step_ns - plain.step_ns < 0.95 * everything


@pytest.mark.parametrize("zero", [0, 1])
def test_fully_shard_stores_parts(llama: _C.OpGraph, zero: int) -> None:
    with pytest.raises(ValueError, match=rf"fsdp needs zero=2 .* or zero=3 .*, not zero={zero}"):
        _C.grid_price(llama, 8, _C.CostModel(machine("h100")), options(dp=8, zero=zero, fsdp=True))


def test_a_person_can_price_fully_shard() -> None:
    with torch.device("meta"):
        module = Llama(SMALL, context=LENGTH).to(torch.bfloat16)
    given = {"machine": machine("h100"), "dp": 8, "zero": 3}
    plan = torch_soap.manual_plan(module, (tokens(), tokens()), **given, fsdp=True)
    assert plan.predicted["chosen"] == "dp 8, zero-3 as fully_shard"
    assert plan.predicted["step_time_ns"] == as_fsdp_default(module)
    with pytest.raises(ValueError, match="fsdp=True prices what another runtime does"):
        torch_soap.manual_plan(module, (tokens(), tokens()), dp=8, zero=3, fsdp=True)


def as_fsdp_default(module: nn.Module) -> int:
    graph = graph_for(module, (tokens(), tokens()), None, 8)[0]
    return _C.grid_price(graph, 8, _C.CostModel(machine("h100")), options(dp=8, zero=3, fsdp=True)).step_ns
