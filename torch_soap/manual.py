"""The plan that a person would write: degrees of data, tensor and pipeline parallelism, ZeRO (csrc/search/manual.h)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from torch_soap import _C, cache, calibrate
from torch_soap.compare import Context
from torch_soap.grids import grid_plan, is_large
from torch_soap.plan import Plan
from torch_soap.planner import described, graph_for, measure

ORDERS = {"gpipe": _C.Order.forward_then_backward, "1f1b": _C.Order.interleaved}


def manual_plan(
    module: nn.Module,
    example_inputs: Any,
    *,
    loss: Callable[..., Any] | None = None,
    world_size: int | None = None,
    machine: Any = None,
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    micro_batches: int = 1,
    schedule: str = "1f1b",
    zero: int = 0,
    zero_group: int | None = None,
    sequence: bool = False,
    recompute: bool | str | Sequence[str] = False,
    fsdp: bool = False,
) -> Plan:
    """A plan with given degrees, priced on a machine; the module may be on the meta device.

    Devices are numbered with the ranks of a tensor group next to each other, then data parallel replicas, pipeline stages farthest apart.

    Args:
        example_inputs: the global batch.
        world_size: devices; default: dp * tp * pp.
        machine: to price it on; default: this one, measured.
        dp: replicas, each with its share of the samples.
        tp: ranks that share each layer: linears by output, then by input channels, embeddings by vocabulary, attention by heads.
        pp: stages of balanced work.
        micro_batches: chunks of samples in time, of each replica.
        schedule: "1f1b" (needs the loss in the plan) or "gpipe".
        zero: parameters stored in parts over replicas: 1 gathered until the optimizer's step, 2 until backward, 3 for each use.
        zero_group: replicas that share the parts, a divisor of dp (HSDP); default: all.
        sequence: what the ranks of a tensor group would do alike (normalisations, residuals) is cut along dim 1, the sequence.
        recompute: what backward computes again instead of keeping its activations: each repeated block (True), or modules by name or pattern as in
            a plan's `recompute` line ("h.*", "features.0+features.1"), each a region.
        fsdp: what PyTorch's fully_shard would take for this, with zero 2 or 3: a price alone, of block-wise all-gathers and reduce-scatters by rings
            and gradients in float32 in every micro-batch; the plan that comes with it runs with this runtime's own exchanges. Needs a machine.

    Raises:
        ValueError: a degree that this model or batch doesn't allow: names the operator and what would be legal.
    """
    begin = time.perf_counter()
    if schedule not in ORDERS:
        raise ValueError(f'[manual_plan] schedule "{schedule}" is not one of {", ".join(ORDERS)}')
    if fsdp and machine is None:
        raise ValueError("[manual_plan] fsdp=True prices what another runtime does, by a model of the machine, not by what was measured here: machine=None")
    world = world_size or dp * tp * pp
    graph, captured, rows = graph_for(module, example_inputs, loss, world)
    seconds = time.perf_counter() - begin
    options = _C.ManualOptions()
    options.dp, options.tp, options.pp, options.micro_batches = dp, tp, pp, micro_batches
    options.order, options.zero, options.zero_group, options.sequence, options.strict = ORDERS[schedule], zero, zero_group or 0, sequence, True
    strategy = _C.manual_strategy(graph, world, options)
    strategy.recompute = regions(graph, recompute)
    name = " x ".join(f"{k} {v}" for k, v in (("dp", dp), ("tp", tp), ("pp", pp)) if v > 1) or "one device"
    name += (
        (f", zero-{zero}" if zero else "")
        + (" as fully_shard" if fsdp else "")
        + (", sequence" if sequence else "")
        + (", recompute" if strategy.recompute else "")
    )
    if machine is not None and (fsdp or is_large(graph, world)):
        if not isinstance(recompute, bool):
            raise ValueError(
                f"[manual_plan] {world} devices are priced by their grid, where recompute is True (each repeated block) or False, not {recompute!r}"
            )
        options.recompute, options.fsdp = recompute, fsdp
        cost = _C.CostModel(machine)
        price = _C.grid_price(graph, world, cost, options)
        stats = {"seconds": time.perf_counter() - begin, "capture_seconds": seconds, "simulations": 1, "chains": 0, "measured_operators": 0}
        return grid_plan(graph, world, cost, strategy, name, price, stats, [])
    measured = 0
    if machine is None:
        known = cache.load(world)
        cost = _C.CostModel(calibrate.detect(world, None, known))
        measured = measure(cost, graph, captured, strategy, rows, None, known)
        if measured:
            cache.save(world, known)
    else:
        cost = _C.CostModel(machine)
    stats = {"seconds": time.perf_counter() - begin, "capture_seconds": seconds, "simulations": 1, "chains": 0, "measured_operators": measured}
    return described(Context(graph, rows, cost, [(name, strategy)]), strategy, stats, {"chosen": name, "seeds": {}, "table": ""})


def regions(graph: _C.OpGraph, recompute: bool | str | Sequence[str]) -> list[list[str]]:
    """The regions of `manual_plan`'s argument."""
    if recompute is True:
        blocks: list[list[str]] = _C.repeated_blocks(graph)
        if not blocks:
            raise ValueError("[manual_plan] recompute=True: no module has numbered children that are alike; name the modules, recompute=[...]")
        return blocks
    words = [recompute] if isinstance(recompute, str) else list(recompute or [])
    return [region for word in words for region in _C.parse_regions(graph, word)]
