"""The planner's entry point: measure, search, decide. One process searches; the plan's text goes to all."""

from __future__ import annotations

import time
from typing import Any

from torch_soap import _C, calibrate
from torch_soap.capture.graph import Graph
from torch_soap.plan import Plan, make_plan
from torch_soap.runtime.comm import Comm

MEASURED_SEEDS = ("ddp", "zero-3", "megatron", "owt")
ROUNDS = 2  # searches; after each, what its best candidates need is measured


def search_plan(
    graph: _C.OpGraph,
    captured: Graph,
    rows: list[int],
    *,
    comm: Comm | None,
    machine: _C.Machine | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
) -> Plan:
    """The fastest plan found, by simulation on this machine (measured now, with all ranks) or on the one given (roofline).

    Collective when `comm` is given. `predicted`, `stats` and the explanation of the plan are filled in.
    """
    world = len(rows)
    begin = time.perf_counter()
    measuring = machine is None
    host_of = calibrate.placement(comm) if measuring else []
    known = calibrate.load(world, comm, host_of) if measuring else {"operators": {}, "tables": {}}
    if machine is None:
        machine = calibrate.detect(world, comm, known, host_of)
    cost = _C.CostModel(machine)
    options = _C.SearchOptions()
    options.seed = seed
    num_operators = sum(n.kind == _C.NodeKind.op for n in graph.nodes)
    options.descent_simulations = max(40, min(600, 30_000 // max(num_operators, 1)))
    options.mcmc_simulations = options.descent_simulations
    if memory_limit is not None:
        options.memory_limit_bytes = memory_limit
    measured = simulations = 0
    if measuring:  # these seeds' operators first, so that no search runs on guesses alone; what it finds is measured after it
        for name, strategy in _C.seeds(graph, world):
            if name in MEASURED_SEEDS:
                measured += measure(cost, graph, captured, strategy, rows, comm, known)
    for _ in range(ROUNDS if measuring else 1):
        found = searched(graph, rows, cost, options, comm)
        strategy = _C.parse_plan(graph, found["plan"], world)
        simulations += found["simulations"]
        fresh = measure(cost, graph, captured, strategy, rows, comm, known) if measuring else 0
        measured += fresh
        if not fresh:
            break
    if measured:
        calibrate.save(world, known, host_of)
    program = _C.lower(graph, strategy, rows)
    simulation = _C.simulate(program, cost)
    predicted = {
        "step_time_ns": simulation.step_ns,
        "compute_ns": list(simulation.compute_ns),
        "communication_ns": list(simulation.communication_ns),
        "memory_bytes": list(simulation.memory_bytes),
        "chosen": found["chosen"],
        "seeds": found["seeds"],
    }
    stats = {"seconds": time.perf_counter() - begin, "simulations": simulations, "illegal_proposals": found["illegal"], "measured_operators": measured}
    explanation = _C.explain(program, simulation) + found["table"]
    return make_plan(
        graph, strategy, predicted=predicted, stats=stats, explanation=explanation, machine={"name": machine.name, "devices": machine.num_devices}, cost=cost
    )


def settled(graph: _C.OpGraph, found: dict[str, Any], rows: list[int], cost: _C.CostModel, limit: int, comm: Comm | None) -> tuple[str, str]:
    """Name and text of what is best now that all operators of the found strategy are measured: it, or a seed that it beat by a guess."""
    choice = found["chosen"], found["plan"]
    if comm is None or comm.rank == 0:
        best = _C.simulate(_C.lower(graph, _C.parse_plan(graph, found["plan"], len(rows)), rows), cost).step_ns
        for name, strategy in _C.seeds(graph, len(rows)):
            if found["seeds"].get(name, {}).get("step_time_ns", -1) < 0:  # not legal here
                continue
            simulation = _C.simulate(_C.lower(graph, strategy, rows), cost)
            if simulation.step_ns < best and max(simulation.memory_bytes) <= limit:
                best, choice = simulation.step_ns, (name, _C.print_plan(graph, strategy))
    return choice if comm is None else comm.gather_objects(choice)[0]


def measure(cost: _C.CostModel, graph: _C.OpGraph, captured: Graph, strategy: _C.Strategy, rows: list[int], comm: Comm | None, known: dict[str, Any]) -> int:
    """Times a strategy's operators on all ranks at once."""
    try:
        program = _C.lower(graph, strategy, rows)
    except ValueError:  # a seed that this model doesn't allow
        return 0
    calibrate.barrier(comm)
    return calibrate.measure_operators(cost, program, captured, comm, known)


def searched(graph: _C.OpGraph, rows: list[int], cost: _C.CostModel, options: _C.SearchOptions, comm: Comm | None) -> dict[str, Any]:
    """Rank 0 searches; everyone gets the best strategy, the table of candidates and the counts."""
    found: dict[str, Any] = {}
    if comm is None or comm.rank == 0:
        result = _C.search(graph, rows, cost, options)
        best = result.candidates[result.best]
        found = {
            "plan": _C.print_plan(graph, best.strategy),
            "chosen": best.name,
            "seeds": {c.name: {"step_time_ns": c.step_ns, "memory_bytes": c.memory_bytes} for c in result.candidates},
            "table": _C.candidates_table(result.candidates),
            "simulations": result.simulations,
            "illegal": result.illegal,
        }
    return found if comm is None else dict(comm.gather_objects(found)[0])
