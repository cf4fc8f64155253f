"""The planner's entry point: measure, search, decide. One process searches; the plan's text goes to all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch_soap import _C, cache, calibrate
from torch_soap.capture import capture
from torch_soap.capture.graph import Graph
from torch_soap.compare import Context, figures
from torch_soap.constraints import Forbid, Pin, constraints
from torch_soap.grids import is_large, plan_grids
from torch_soap.measuring import known_error
from torch_soap.operator_times import doubt, measure_operators
from torch_soap.plan import Plan, make_plan
from torch_soap.progress import SearchProgress
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.rewrite.substitution import Checker
from torch_soap.runtime.comm import Comm
from torch_soap.verify import as_arguments, even_rows

MEASURED_SEEDS = ("ddp", "zero-3", "megatron", "owt")
LEAST_GAIN = {True: 0.01, False: 0.002}  # of a step, that a rewrite must save: where operators are measured, and where nothing is
ROUNDS = 2  # searches; after each, what its best candidate needs is measured
STARTS = 8  # candidates that a plan remembers
SAME = 1e-3  # plans whose predictions are closer than this, relative, are of one kind


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
    rewrites: bool = True,
    simulations: int | None = None,
) -> Plan:
    """The fastest plan found, by simulation on this machine (measured now, with all ranks) or on the one given (roofline).

    Collective when `comm` is given. `simulations`: of descent and of random proposals each; default: by the graph's size.
    `predicted`, `stats` and the explanation of the plan are filled in.
    """
    world = len(rows)
    begin = time.perf_counter()
    measuring = machine is None
    host_of = calibrate.placement(comm) if measuring else []
    known = cache.load(world, comm, host_of) if measuring else {"operators": {}, "tables": {}}
    if machine is None:
        machine = calibrate.detect(world, comm, known, host_of)
    cost = _C.CostModel(machine)
    if not measuring and not pin and not forbid and is_large(graph, world):
        return plan_grids(graph, world, cost, memory_limit=memory_limit)
    options = _C.SearchOptions()
    options.seed = seed
    options.constraints = constraints(graph, pin, forbid, world)
    num_operators = sum(n.kind == _C.NodeKind.op for n in graph.nodes)
    budget = simulations if simulations is not None else max(200, min(4000, 600_000 // max(num_operators, 1)))
    options.descent_simulations = options.mcmc_simulations = budget
    if memory_limit is not None:
        options.memory_limit_bytes = memory_limit
    rewriting = rewrite_options(captured, known if measuring else None) if rewrites else None
    found: dict[str, Any] = {}
    measured = 0
    spent: dict[str, Any] = {"search_seconds": 0.0, "simulations": 0, "chains": 0, "illegal_proposals": 0, "progress": []}
    with SearchProgress(comm) as progress:

        def price(strategies: Sequence[_C.Strategy]) -> int:
            progress.doing("measuring")
            return sum(measure(cost, graph, captured, strategy, rows, comm, known, progress) for strategy in strategies) if measuring else 0

        # These seeds' operators first, so that no search runs on guesses alone; what it finds is measured after it.
        priced = [strategy for name, strategy in _C.seeds(graph, world) if name in MEASURED_SEEDS]
        measured += price(priced)
        looked_again = False
        for turn in range(ROUNDS + STARTS):
            if turn < ROUNDS:
                found = searched(graph, rows, cost, options, comm, progress, found, rewriting)
            else:
                found = settled(graph, rows, cost, options, comm, progress, found)
            add_to(spent, found)
            strategy = _C.parse_plan(graph, found["plan"], world)
            priced.append(strategy)
            fresh = price([strategy])
            measured += fresh
            if not fresh and measured and not looked_again:  # seconds later: was that a slow minute?
                looked_again = True
                doubt(known)
                before, machine = (machine, cost), calibrate.detect(world, comm, known, host_of)
                cost = _C.CostModel(machine)
                fresh = price(priced) + int(machine != before[0])
                measured += fresh
                if progress.agreed():
                    machine, cost = before
            if not fresh:  # nothing of it was guessed, or it was interrupted
                break
        interrupted = progress.agreed()
        if interrupted:
            progress.say_interrupted(spent["simulations"], found["step_ns"], found["chosen"])
    if measured or (known.get("looks", 0) < cache.LOOKS and measuring):
        known["looks"] = 0 if measured else known["looks"] + 1
        cache.save(world, known, host_of)
    stats = {"seconds": time.perf_counter() - begin, **spent, "measured_operators": measured, "interrupted": interrupted, "lead": found["lead"]}
    if measuring:
        error = known_error(known)
        stats["known_error"] = error if comm is None else comm.gather_objects(error)[0]
    starts = found.get("starts") or [(found["chosen"], strategy)]
    return described(Context(graph, rows, cost, starts, memory_limit), strategy, stats, found)


def lead(candidates: Sequence[tuple[str, int]]) -> float:
    """By how much the best candidate is predicted to be faster than the next of another kind, relative. `candidates`: name and step in ns of those that fit."""
    ordered = sorted(ns for _, ns in candidates)
    others = [ns for ns in ordered if ns > ordered[0] * (1 + SAME)] if ordered else []
    return others[0] / max(ordered[0], 1) - 1 if others else float("inf")


def rewrite_options(captured: Graph, known: dict[str, Any] | None) -> _C.RewriteOptions:
    """Rewrites are checked before they are priced, and stay where they save more than the noise of the figures that price them."""
    options = _C.RewriteOptions()
    options.refusal = Checker(captured)
    spreads = [spread for name, (spread, _, _) in known["marks"].items() if name.startswith("operators/")] if known else []
    options.least_gain = max(LEAST_GAIN[known is not None], statistics.median(spreads) if spreads else 0.0)
    return options


def add_to(spent: dict[str, Any], found: dict[str, Any]) -> None:
    """One more search: its figures are added, its progress goes on where the last one's ended."""
    before = spent["simulations"]
    spent["search_seconds"] += found["seconds"]
    spent["simulations"] += found["simulations"]
    spent["chains"] = max(spent["chains"], found["chains"])
    spent["illegal_proposals"] += found["illegal"]
    spent["progress"] += [[before + simulations, step_ns, phase] for simulations, step_ns, phase in found["progress"]]


def described(context: Context, strategy: _C.Strategy, stats: dict[str, Any], found: dict[str, Any]) -> Plan:
    """A Plan with its prediction. `found`: what is known of a search: chosen, seeds, table."""
    program = _C.lower(context.graph, strategy, context.rows)
    simulation = _C.simulate(program, context.cost)
    predicted = {
        **figures(simulation),
        "chosen": found["chosen"],
        "seeds": found["seeds"],
    }
    if strategy.rewrites:
        predicted["rewrites"] = found.get("rewrites", [])
        predicted["without_rewrites_ns"] = found.get("without_rewrites_ns", -1)
    machine = context.cost.machine
    limit = machine.memory_bytes if context.memory_limit is None else context.memory_limit
    explanation = _C.explain(program, simulation) + rewrites_table(strategy, predicted)
    explanation += _C.explain_recompute(context.graph, strategy, context.rows, context.cost, limit) + found["table"]
    return make_plan(
        context.graph,
        strategy,
        predicted=predicted,
        stats=stats,
        explanation=explanation,
        machine={"name": machine.name, "devices": machine.num_devices},
        context=context,
    )


def rewrites_table(strategy: _C.Strategy, predicted: dict[str, Any]) -> str:
    """A line for each group of rewrites that a plan uses, with what it was chosen for; "" without any."""
    if not strategy.rewrites:
        return ""
    lines = [f"{len(strategy.rewrites)} rewrites"]
    without = predicted["without_rewrites_ns"]
    if without >= 0:
        lines[0] += f": {(predicted['step_time_ns'] - without) / 1e6:+.3f} ms to the best plan without"
    for group in predicted["rewrites"]:
        first, more = group["rewrites"][0], len(group["rewrites"]) - 1
        lines.append(f"  {first}{f' and {more} more alike' if more else ''}: {-group['gain_ns'] / 1e6:+.3f} ms when it was chosen")
    if not predicted["rewrites"]:
        lines += [f"  {r}" for r in strategy.rewrites]
    return "\n".join(lines) + "\n"


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
    spent: dict[str, Any] = {"search_seconds": 0.0, "simulations": 0, "chains": 0, "illegal_proposals": 0, "progress": []}
    with SearchProgress(None) as progress:
        found = searched(context.graph, context.rows, context.cost, options, None, progress)
        if progress.interrupted:
            progress.say_interrupted(found["simulations"], found["step_ns"], found["chosen"])
    add_to(spent, found)
    stats = {"seconds": time.perf_counter() - begin, **spent, "measured_operators": 0, "interrupted": progress.interrupted}
    strategy = _C.parse_plan(context.graph, found["plan"], plan.world_size)
    # The next one begins from here and from all that was known: what a constraint ruled out may come back.
    starts = [*found["starts"], *context.starts][: 2 * STARTS]
    return described(Context(context.graph, context.rows, context.cost, starts, context.memory_limit), strategy, stats, found)


def settled(
    graph: _C.OpGraph, rows: list[int], cost: _C.CostModel, options: _C.SearchOptions, comm: Comm | None, progress: SearchProgress, found: dict[str, Any]
) -> dict[str, Any]:
    """What `searched` found, priced again now that its operators are measured, beside all that it beat: a guess may have won."""
    options.descent_simulations = options.mcmc_simulations = 0
    if "starts" in found:  # rank 0
        names = {name for name, _ in found["starts"]}
        options.starts = [*found["starts"], *((name, strategy) for name, strategy in _C.seeds(graph, len(rows)) if name not in names)]
    return {**searched(graph, rows, cost, options, comm, progress, found), "rewrites": found.get("rewrites", [])}


def no_rewrites() -> _C.RewriteOptions:
    """Starts keep the rewrites that they have; no more are tried."""
    options = _C.RewriteOptions()
    options.rounds = 0
    return options


def measure(
    cost: _C.CostModel,
    graph: _C.OpGraph,
    captured: Graph,
    strategy: _C.Strategy,
    rows: list[int],
    comm: Comm | None,
    known: dict[str, Any],
    progress: SearchProgress | None = None,
) -> int:
    """Times a strategy's operators on all ranks at once; nothing once a rank was interrupted."""
    try:
        program = _C.lower(graph, strategy, rows)
    except ValueError:  # a seed that this model doesn't allow
        return 0
    if progress is None:
        calibrate.barrier(comm)
    elif progress.agreed():
        return 0
    return measure_operators(cost, program, captured, comm, known)


def searched(
    graph: _C.OpGraph,
    rows: list[int],
    cost: _C.CostModel,
    options: _C.SearchOptions,
    comm: Comm | None,
    progress: SearchProgress,
    before: dict[str, Any] | None = None,
    rewriting: _C.RewriteOptions | None = None,
) -> dict[str, Any]:
    """Rank 0 searches; everyone gets the best strategy, the table of candidates and the counts.

    Args:
        before: what an earlier search found. Where this one is interrupted the better of the two is taken, at today's prices.
        rewriting: how graph rewrites are tried; default: not at all.
    """
    found: dict[str, Any] = {}
    if comm is None or comm.rank == 0:
        begin = time.perf_counter()
        with_rewrites = _C.search_with_rewrites(graph, rows, cost, options, rewriting or no_rewrites(), progress)
        result = with_rewrites.search
        best = result.candidates[result.best]
        candidates, simulations, illegal = list(result.candidates), result.simulations, result.illegal
        if result.interrupted and before:
            two = _C.SearchOptions()
            two.memory_limit_bytes, two.constraints, two.starts = (
                options.memory_limit_bytes,
                options.constraints,
                [*before["starts"][:1], (best.name, best.strategy)],
            )
            two.descent_simulations = two.mcmc_simulations = 0
            again = _C.search_with_rewrites(graph, rows, cost, two, no_rewrites()).search
            best = again.candidates[again.best]
            candidates.append(again.candidates[0])
            simulations, illegal = simulations + again.simulations, illegal + again.illegal
        found = {
            "plan": _C.print_plan(graph, best.strategy),
            "chosen": best.name,
            "step_ns": best.step_ns,
            "seeds": {c.name: {"step_time_ns": c.step_ns, "memory_bytes": c.memory_bytes, "fits": c.fits} for c in candidates},
            "table": _C.candidates_table(candidates),
            "simulations": simulations,
            "chains": result.chains,
            "illegal": illegal,
            "seconds": time.perf_counter() - begin,
            "progress": [(p.simulations, p.best_ns, p.phase) for p in result.progress],
            "rewrites": [{"rewrites": [str(r) for r in u.rewrites], "gain_ns": u.gain_ns} for u in with_rewrites.used],
            "without_rewrites_ns": min((c.step_ns for c in candidates if c.step_ns >= 0 and c.fits and not c.strategy.rewrites), default=-1),
            "lead": lead([(c.name, c.step_ns) for c in candidates if c.step_ns >= 0 and c.fits]),
        }
    everywhere = found if comm is None else dict(comm.gather_objects(found)[0])
    if found:  # only where the search was: they are as large as the plan, each
        legal = sorted((c for c in candidates if c.step_ns >= 0), key=lambda c: (not c.fits, c.step_ns))
        everywhere["starts"] = [(c.name, c.strategy) for c in starts_of(legal)]
    return everywhere


def starts_of(legal: Sequence[_C.Candidate]) -> list[_C.Candidate]:
    """The best of them, the best without rewrites included."""
    plain = next((c for c in legal[STARTS:] if not c.strategy.rewrites), None)
    if plain is None or any(not c.strategy.rewrites for c in legal[:STARTS]):
        return list(legal[:STARTS])
    return [*legal[: STARTS - 1], plain]
