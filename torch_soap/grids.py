"""Plans for worlds in which naming each device costs too much: grids, priced by what one group does (csrc/search/grid_search.h)."""

from __future__ import annotations

import time
from typing import Any

from torch_soap import _C
from torch_soap.plan import Plan, make_plan

NAMED_WORK = 16_384  # operators x devices that the search prices device by device
SHOWN = 24  # grids of the table
MIB = 1 << 20


def is_large(graph: _C.OpGraph, world_size: int) -> bool:
    return sum(n.kind == _C.NodeKind.op for n in graph.nodes) * world_size > NAMED_WORK


def plan_grids(graph: _C.OpGraph, world_size: int, cost: _C.CostModel, *, memory_limit: int | None = None, effort: int = 1) -> Plan:
    """The best grid of stages, replicas and ranks, its repeated blocks improved within their groups.

    Args:
        memory_limit: bytes per device; default: the machine's.
        effort: how many times the usual number of simulations the improvement may take.

    Raises:
        ValueError: replicas don't compute apart (statistics over the batch), or nothing fits: then it says what would.
    """
    begin = time.perf_counter()
    options = _C.GridSearchOptions()
    options.memory_limit_bytes = memory_limit
    options.descent_simulations *= effort
    found = _C.search_grids(graph, world_size, cost, options)
    best = found.candidates[0]
    stats = {"seconds": time.perf_counter() - begin, "simulations": found.simulations, "chains": 0, "measured_operators": 0}
    return grid_plan(graph, world_size, cost, found.strategy, best.name, best.price, stats, found.candidates)


def grid_plan(
    graph: _C.OpGraph,
    world_size: int,
    cost: _C.CostModel,
    strategy: _C.Strategy,
    name: str,
    price: _C.GridPrice,
    stats: dict[str, Any],
    candidates: list[_C.GridCandidate],
) -> Plan:
    """A Plan priced by its grid. Compute and communication are those of the busiest stage, memory is given for each stage."""
    predicted = {
        "step_time_ns": price.step_ns,
        "compute_ns": [price.compute_ns],
        "communication_ns": [price.communication_ns],
        "memory_bytes": list(price.stage_memory),
        "chosen": name,
        "grid": True,
        **({"host_ns": [price.host_ns], "device_step_ns": price.device_step_ns} if price.host_ns else {}),
        "seeds": {c.name: {"step_time_ns": c.price.step_ns, "memory_bytes": c.price.memory_bytes} for c in candidates},
    }
    machine = cost.machine
    return make_plan(
        graph,
        strategy,
        predicted=predicted,
        stats=stats,
        explanation=explained(world_size, name, price, candidates),
        machine={"name": machine.name, "devices": machine.num_devices},
    )


def explained(world_size: int, name: str, price: _C.GridPrice, candidates: list[_C.GridCandidate]) -> str:
    lines = [
        f"{world_size} devices: {name}",
        f"predicted step {price.step_ns / 1e6:.2f} ms; the busiest stage computes {price.compute_ns / 1e6:.2f} ms, "
        f"its movements take {price.communication_ns / 1e6:.2f} ms",
        *([f"the host queues kernels for {price.host_ns / 1e6:.2f} ms of it"] if price.device_step_ns < price.step_ns else []),
        "memory of a device by stage: " + ", ".join(f"{b / MIB:.0f} MiB" for b in price.stage_memory),
    ]
    if candidates:
        lines.append(f"the best of {len(candidates)} grids:")
        width = max(len(c.name) for c in candidates[:SHOWN])
        lines += [
            f"  {c.name:<{width}} {c.price.step_ns / 1e6:>10.2f} ms {c.price.memory_bytes / MIB:>9.1f} MiB{'' if c.fits else '  does not fit'}"
            for c in candidates[:SHOWN]
        ]
    return "\n".join(lines) + "\n"
