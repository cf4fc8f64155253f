"""The planner's entry point: measure, search, decide. One process searches; the plan's text goes to all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch_soap import _C, calibrate
from torch_soap.capture import capture
from torch_soap.capture.graph import Graph
from torch_soap.compare import Context
from torch_soap.constraints import Forbid, Pin, constraints
from torch_soap.plan import Plan, make_plan
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.runtime.comm import Comm
from torch_soap.verify import as_arguments, even_rows

MEASURED_SEEDS = ("ddp", "zero-3", "megatron", "owt")
ROUNDS = 2  # searches; after each, what its best candidate needs is measured
STARTS = 8  # candidates that a plan remembers


def graph_for(module: Any, example_inputs: Any, loss: Callable[..., Any] | None, world_size: int) -> tuple[_C.OpGraph, Graph, list[int]]:
    """A module captured without running it, its graph for this global batch, and the rows that each process feeds."""
    args, kwargs = as_arguments(example_inputs)
    captured = capture(module, args, kwargs, loss=loss, check=False)
    tensors = [captured.leaves[i] for i in captured.tensor_slots]
    graph = captured.instantiate(captured._signature_of(tensors))
    total = next((t.shape[d] for t, d in zip(tensors, captured.batch_dims, strict=True) if d is not None), world_size)
    return to_op_graph(graph), graph, even_rows(total, world_size)


def search_plan(
    graph: _C.OpGraph,
    captured: Graph,
    rows: list[int],
    *,
    comm: Comm | None,
    machine: _C.Machine | None = None,
    memory_limit: int | None = None,
    pin: Pin | None = None,
    forbid: Forbid | None = None,
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
    options.constraints = constraints(graph, pin, forbid, world)
    num_operators = sum(n.kind == _C.NodeKind.op for n in graph.nodes)
    options.descent_simulations = options.mcmc_simulations = max(200, min(4000, 600_000 // max(num_operators, 1)))
    if memory_limit is not None:
        options.memory_limit_bytes = memory_limit
    measured = simulations = chains = 0
    if measuring:  # these seeds' operators first, so that no search runs on guesses alone; what it finds is measured after it
        for name, strategy in _C.seeds(graph, world):
            if name in MEASURED_SEEDS:
                measured += measure(cost, graph, captured, strategy, rows, comm, known)
    found: dict[str, Any] = {}
    for turn in range(ROUNDS + STARTS):
        found = searched(graph, rows, cost, options, comm) if turn < ROUNDS else settled(graph, found, rows, cost, options, comm)
        strategy = _C.parse_plan(graph, found["plan"], world)
        simulations += found["simulations"]
        chains = max(chains, found["chains"])
        fresh = measure(cost, graph, captured, strategy, rows, comm, known) if measuring else 0
        measured += fresh
        if not fresh:  # nothing of it was guessed
            break
    if measured:
        calibrate.save(world, known, host_of)
    stats = {
        "seconds": time.perf_counter() - begin,
        "simulations": simulations,
        "chains": chains,
        "illegal_proposals": found["illegal"],
        "measured_operators": measured,
    }
    starts = found.get("starts") or [(found["chosen"], strategy)]
    return described(Context(graph, rows, cost, starts, memory_limit), strategy, stats, found)


def described(context: Context, strategy: _C.Strategy, stats: dict[str, Any], found: dict[str, Any]) -> Plan:
    """A Plan with its prediction. `found`: what is known of a search: chosen, seeds, table."""
    program = _C.lower(context.graph, strategy, context.rows)
    simulation = _C.simulate(program, context.cost)
    predicted = {
        "step_time_ns": simulation.step_ns,
        "compute_ns": list(simulation.compute_ns),
        "communication_ns": list(simulation.communication_ns),
        "memory_bytes": list(simulation.memory_bytes),
        "chosen": found["chosen"],
        "seeds": found["seeds"],
    }
    machine = context.cost.machine
    explanation = _C.explain(program, simulation) + found["table"]
    return make_plan(
        context.graph,
        strategy,
        predicted=predicted,
        stats=stats,
        explanation=explanation,
        machine={"name": machine.name, "devices": machine.num_devices},
        context=context,
    )


def resolved(plan: Plan, context: Context, pin: Pin | None, forbid: Forbid | None, simulations: int, seed: int) -> Plan:
    """`Plan.resolve`."""
    begin = time.perf_counter()
    options = _C.SearchOptions()
    options.seed = seed
    options.constraints = constraints(context.graph, pin, forbid, plan.world_size)
    options.descent_simulations = options.mcmc_simulations = simulations
    if context.memory_limit is not None:
        options.memory_limit_bytes = context.memory_limit
    options.starts = [(n, s) for n, s in [("before", plan.strategy), *context.starts] if n == "before" or s != plan.strategy]
    found = searched(context.graph, context.rows, context.cost, options, None)
    stats = {
        "seconds": time.perf_counter() - begin,
        "simulations": found["simulations"],
        "chains": found["chains"],
        "illegal_proposals": found["illegal"],
        "measured_operators": 0,
    }
    strategy = _C.parse_plan(context.graph, found["plan"], plan.world_size)
    # The next one begins from here and from all that was known: what a constraint ruled out may come back.
    starts = [*found["starts"], *context.starts][: 2 * STARTS]
    return described(Context(context.graph, context.rows, context.cost, starts, context.memory_limit), strategy, stats, found)


def settled(graph: _C.OpGraph, found: dict[str, Any], rows: list[int], cost: _C.CostModel, options: _C.SearchOptions, comm: Comm | None) -> dict[str, Any]:
    """What `searched` found, priced again now that its operators are measured, beside all that it beat: a guess may have won."""
    options.descent_simulations = options.mcmc_simulations = 0
    if "starts" in found:  # rank 0
        names = {name for name, _ in found["starts"]}
        options.starts = [*found["starts"], *((name, strategy) for name, strategy in _C.seeds(graph, len(rows)) if name not in names)]
    return searched(graph, rows, cost, options, comm)


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
            "chains": result.chains,
            "illegal": result.illegal,
        }
    everywhere = found if comm is None else dict(comm.gather_objects(found)[0])
    if found:  # only where the search was: they are as large as the plan, each
        legal = sorted((c for c in result.candidates if c.step_ns >= 0), key=lambda c: (not c.fits, c.step_ns))
        everywhere["starts"] = [(c.name, c.strategy) for c in legal[:STARTS]]
    return everywhere
