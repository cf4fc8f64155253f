"""Times of operators' tiles on this machine, forward and backward, as a step finds them."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from torch_soap import _C
from torch_soap.capture.graph import Graph
from torch_soap.measuring import REPEATS, Timing, calmest, mark, own_clock, timed
from torch_soap.random import CounterState
from torch_soap.rewrite.segment import DTYPES, build_item
from torch_soap.runtime.comm import Comm

# Bytes that are written between two runs of an operator, more than a core's own cache holds, and of what is still there when it begins.
OTHER, RECENT = 8 << 20, 512 << 10
PRODUCTS = {"matmul", "convolution", "attention", "recurrent"}  # families
HEAVY, OTHERS, CHECK_NS = 8, 4, 500_000_000  # operators whose times are looked at again: those that take most, others, and how long their runs take at most
OFF, WORTH_NS = 1.05, 1_000_000  # times of slow minutes are so many times what they are now; of operators that take less than this in all nobody asks
AHEAD, SIDES = 8, (64, 512)  # how many products' work comes before a forward, as one; its rows and columns, least and most


def measure_operators(cost: _C.CostModel, program: _C.Program, graph: Graph, comm: Comm | None, known: dict[str, Any], limit: int = 120) -> int:
    """Times what the program needs and the cost model lacks, the same list in the same order on every rank; the mean over ranks counts. What is known but
    doubted (`doubt`) is looked at first: a few of them again, and, where these take less now, all. Returns how many figures are new."""
    samples = {}
    for sample in cost.missing(program):
        if any(len(part) == 0 for part in _C.compute_item(program, sample.node, sample.tile, sample.chunk).sets):
            cost.measure(program, sample, 0, 0)  # nothing to compute: the engine fills in the identity
        else:
            samples[sample.key] = sample
    times: dict[str, list[int]] = known["operators"]

    def take(keys: Sequence[str]) -> dict[str, list[int]]:
        return time_operators(program, graph, [samples[key] for key in keys], comm, known) if keys else {}

    found = take([key for key in samples if key not in times][:limit])
    fresh = len(found)
    doubted = [key for key in samples if key in times and key in known.get("doubted", [])]
    if sum(sum(times[key]) for key in doubted) >= WORTH_NS:
        again = take(representative({key: times[key] for key in doubted}))
        if statistics.median(sum(times[key]) / max(sum(now), 1) for key, now in again.items()) <= OFF:
            known["doubted"] = [key for key in known["doubted"] if key not in times]
        else:
            again |= take([key for key in doubted if key not in again][:limit])
            known["doubted"] = [key for key in known["doubted"] if key not in again]
            fresh += len(again)
        for key, now in again.items():
            found[key] = [min(both) for both in zip(now, times[key], strict=True)]  # what else goes on in the machine only adds
    times |= found
    for key, sample in samples.items():
        if key in times:
            cost.measure(program, sample, *times[key])
    return fresh


def doubt(known: dict[str, Any]) -> None:
    """All times of operators, the update's and movements' were perhaps taken in a slow minute. Others on the machine take its caches and memory, for a minute
    or so: small operators, and with them the pace, hardly show it; large ones take up to a half longer, and so does each prediction that they are in. They
    are looked at again at another time."""
    known["doubted"] = [*known["operators"], "update", "tables"]


def representative(times: dict[str, list[int]]) -> list[str]:
    """Those that take most, and some others, all in all about CHECK_NS to measure, but three of them; the same on all ranks, which know the same times."""
    ordered = sorted(times, key=lambda key: (-sum(times[key]), key))
    rest = ordered[HEAVY:]
    chosen = ordered[:HEAVY] + random.Random(0).sample(rest, min(OTHERS, len(rest)))
    costs = itertools.accumulate((REPEATS + 1) * (times[key][0] + sum(times[key])) for key in chosen)
    return [key for i, (key, cost_ns) in enumerate(zip(chosen, costs, strict=True)) if i < 3 or cost_ns < CHECK_NS]


def time_operators(program: _C.Program, graph: Graph, samples: Sequence[_C.OpSample], comm: Comm | None, known: dict[str, Any]) -> dict[str, list[int]]:
    """Forward and backward of each in ns, the mean over ranks, by its key."""
    side, mine = product_side(program), []
    for sample in samples:
        timings = time_operator(program, graph, sample, side)
        own = harness(side) if timings[1] is not NOTHING else (NOTHING, NOTHING)  # what has no backward is called by itself
        mine.append([max(t.ns - o.ns, 0) for t, o in zip(timings, own, strict=True)])
        mark(known, f"operators/{sample.key}", *timings)
    everyone = [mine] if comm is None else comm.gather_objects(mine)
    return {s.key: [int(statistics.mean(way)) for way in zip(*taken, strict=True)] for s, taken in zip(samples, zip(*everyone, strict=True), strict=True)}


NOTHING = Timing(0, 0.0)


def product_side(program: _C.Program) -> int:
    """Rows and columns of a matrix product that is as much work as AHEAD of the program's median products."""
    smallest, largest = SIDES
    works = [_C.work_of(program, n, 0, 0) for n, node in enumerate(program.graph.nodes) if node.kind == _C.NodeKind.op]
    flops = [w.flops for w in works if w.family in PRODUCTS and w.flops > 0]
    return min(max(round((AHEAD * statistics.median(flops) / 2) ** (1 / 3)), smallest), largest) if flops else smallest


class Surroundings:
    """What ran just before an operator of a step, and has taken the core's caches. `side`: rows and columns of a product."""

    def __init__(self, side: int) -> None:
        self.written, self.factor = torch.zeros(OTHER // 4), torch.ones(side, side)

    def before_forward(self, recent: Sequence[torch.Tensor]) -> None:
        """A matrix product too: its code and pages are what forward finds. Without it operators of one pass take a half to four fifths of what they take in
        a step. Backward finds memory that was freed just now, and takes the same with and without. `recent`: tensors made last, in the cache nevertheless
        where they are small."""
        self.written.add_(1.0)
        torch.mm(self.factor, self.factor)
        self.touch(recent)

    def before_backward(self, recent: Sequence[torch.Tensor]) -> None:
        self.written.add_(1.0)
        self.touch(recent)

    def touch(self, recent: Sequence[torch.Tensor]) -> None:
        for tensor in recent:
            if tensor.numel() * tensor.element_size() <= RECENT:
                tensor.clone()
        for tensor in recent:
            if tensor.numel() * tensor.element_size() <= RECENT:
                tensor.clone()


@functools.cache
def harness(side: int) -> tuple[Timing, Timing]:
    """What `time_operator` takes by itself, forward and backward: of an operator that only makes a view."""
    fx_graph = fx.Graph()
    fx_graph.output((fx_graph.call_method("view_as", (fx_graph.placeholder("x"),) * 2),))
    module, x, clock = fx.GraphModule(nn.Module(), fx_graph), torch.ones(1, requires_grad=True), own_clock()
    grads, surroundings = [torch.ones(1)], Surroundings(side)

    def forward() -> Any:
        with torch.set_grad_enabled(True):
            return module(x)

    def results() -> Any:
        out = forward()
        surroundings.before_backward(grads)
        return out

    def backward(outs: Any) -> None:
        torch.autograd.grad(outs, [x], grads, allow_unused=True)

    own = calmest(lambda: timed(forward, 20, clock, before=lambda: surroundings.before_forward([x.detach()])))
    return own, calmest(lambda: timed(backward, 20, clock, before=results))


def time_operator(program: _C.Program, graph: Graph, sample: _C.OpSample, side: int) -> tuple[Timing, Timing]:
    """Of one tile of one operator: forward and backward, each as a step finds it: what was computed just before it, a small operand or gradient, is in the
    cache; parameters, and what forward has kept for backward, are not."""
    module, shapes, dtypes, needs = build_item(program, sample.node, sample.tile, sample.chunk, graph)
    node = program.graph.nodes[sample.node]
    inputs = []
    for shape, dtype, need in zip(shapes, dtypes, needs, strict=True):
        if DTYPES[dtype].is_floating_point:
            inputs.append(torch.rand(shape, dtype=DTYPES[dtype]).requires_grad_(need))
        else:
            inputs.append(torch.zeros(shape, dtype=DTYPES[dtype]))
    random = CounterState(0, 1)
    differentiable = any(program.graph.tensors[t].requires_grad for t in node.outputs)
    present = [t for t, box in zip(node.inputs, _C.compute_item(program, sample.node, sample.tile, sample.chunk).operand_boxes, strict=True) if box is not None]
    stored = [program.graph.nodes[program.graph.tensors[t].producer].kind == _C.NodeKind.param for t in present]
    computed = [x.detach() for x, is_stored in zip(inputs, stored, strict=True) if not is_stored]
    surroundings = Surroundings(side)

    def run() -> Any:
        with torch.set_grad_enabled(differentiable):
            return module(*inputs, random)

    begin = time.perf_counter_ns()
    first = run()
    repeats = 1 if time.perf_counter_ns() - begin > 100_000_000 else REPEATS
    clock = own_clock()
    # What nobody differentiates (running averages, counts, masks) is small and follows small operators: behind a product it took two to six times as long.
    before = surroundings.before_forward if differentiable else surroundings.before_backward
    forward = calmest(lambda: timed(run, repeats, clock, before=lambda: before(computed)))
    outputs = [i for i, r in enumerate(first) if r.requires_grad]
    leaves = [x for x in inputs if x.requires_grad]
    if not outputs or not leaves:
        return forward, NOTHING
    grads = [torch.ones_like(first[i]) for i in outputs]
    del first

    def results() -> Any:
        out = run()
        surroundings.before_backward(grads)
        return [out[i] for i in outputs]

    def back(outs: Any) -> None:
        torch.autograd.grad(outs, leaves, grads, allow_unused=True)

    return forward, calmest(lambda: timed(back, repeats, clock, before=results))
