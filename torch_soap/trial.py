"""Live trial: the few best plans run some steps on the real batch, the fastest stays.

A trial works on engines of its own and on the parts that they would store: parameters, buffers, gradients and random numbers of the model aren't
touched, so what is trained afterwards is, to the bit, what would be trained without it.
"""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from torch_soap import _C
from torch_soap.capture.graph import Graph
from torch_soap.compare import Context, figures
from torch_soap.plan import Plan, make_plan
from torch_soap.runtime.engine import Engine
from torch_soap.runtime.storage import cut, stored_boxes

if TYPE_CHECKING:
    from torch_soap.runtime.parallel import Parallel

PLANS = 3  # that are tried
STEPS = 3  # of each, where nobody says how many


def steps_wanted(plan: Plan, asked: int | None) -> int:
    """Of each plan; 0: no trial. What wasn't asked for is done where the simulator is known to be less certain than the best plan's lead over the second of
    another kind."""
    if asked is not None:
        return asked
    lead = float(plan.stats.get("lead", float("inf")))
    return STEPS if float(plan.stats.get("known_error", 0.0)) > lead else 0


def tried(parallel: Parallel, plan: Plan, graph: Graph, tensors: Sequence[torch.Tensor], stored: dict[str, torch.Tensor], steps: int) -> Plan:
    """The fastest of the plan and its next best rivals. Collective.

    Args:
        tensors: this process' inputs, in the order of the graph's feeds.
        stored: whole parameters, buffers and constants by node name.
    """
    context = plan.known_context("parallelize")
    comm = parallel.comm
    candidates = {plan.text: str(plan.predicted.get("chosen", "found"))}
    if comm.rank == 0:
        limit = context.memory_limit if context.memory_limit is not None else context.cost.machine.memory_bytes
        for name, strategy in context.starts:
            text = _C.print_plan(context.graph, strategy)
            simulation = _C.simulate(_C.lower(context.graph, strategy, context.rows), context.cost)
            if len(candidates) < PLANS and max(simulation.memory_bytes) <= limit:
                candidates.setdefault(text, name)
    candidates = dict(comm.gather_objects(candidates)[0])
    feeds = dict(zip([n.name for n in graph.nodes if n.kind == "feed"], tensors, strict=True))
    times: dict[str, float] = {}
    with untouched(parallel):
        for text in candidates:
            times[text] = time_of(parallel, context, text, graph, feeds, stored, steps)
    times = dict(comm.gather_objects(times)[0])  # rank 0's, on all ranks
    best = min(times, key=lambda t: times[t])
    plan.stats["trial"] = {name: {"step_ms": times[text] / 1e6} for text, name in candidates.items()}
    if best == plan.text:
        return plan
    strategy = _C.parse_plan(context.graph, best, plan.world_size)
    program = _C.lower(context.graph, strategy, context.rows)
    simulation = _C.simulate(program, context.cost)
    predicted = {
        **plan.predicted,
        **figures(simulation),
        "chosen": candidates[best],
    }
    explanation = _C.explain(program, simulation)
    return make_plan(
        context.graph, strategy, predicted=predicted, stats=plan.stats, explanation=explanation, machine=plan.machine, context=context, exact=plan.exact
    )


def time_of(
    parallel: Parallel, context: Context, text: str, graph: Graph, feeds: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], steps: int
) -> float:
    """Forward and backward in ns, median, slowest rank."""
    comm = parallel.comm
    program = _C.lower(context.graph, _C.parse_plan(context.graph, text, comm.world_size), context.rows)
    engine = Engine(program, graph, comm.rank, comm)
    comm.join(engine.groups())
    boxes = stored_boxes(program, comm.rank)
    parts = {n: cut(t.detach(), boxes[n]).clone(memory_format=torch.contiguous_format) for n, t in stored.items()}
    share = 1.0 / comm.world_size
    grads = {
        engine.names[n]: torch.full(engine.shapes[engine.value_of_return[n]], share, dtype=engine.dtype_of(n))
        for n in engine.returns
        if engine.return_wants_grad(n) and engine.value_of_return[n] >= 0
    }
    samples = []
    for _ in range(steps + 1):
        comm.gather_ints([])
        begin = time.perf_counter_ns()
        state = engine.forward(feeds, parts, grad=True, random=replace(parallel.random), seeds=grads if program.interleaved else None)
        if not program.interleaved:
            engine.backward(state, dict(grads))
        samples.append(max(v[0] for v in comm.gather_ints([time.perf_counter_ns() - begin])))
    return float(statistics.median(samples[1:]))


@contextlib.contextmanager
def untouched(parallel: Parallel) -> Iterator[None]:
    """What a step outside of the model changes is as before: torch's and Python's own random numbers (opaque operators draw them), counts of traffic."""
    state, python, traffic = torch.get_rng_state(), random.getstate(), copy.deepcopy(parallel.comm.traffic)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        parallel.comm.traffic = traffic
