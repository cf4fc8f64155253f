"""Times of operators' tiles on this machine, forward and backward, as a step finds them."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torch_soap import _C, _backend
from torch_soap.capture.graph import Graph
from torch_soap.measuring import CORES, REPEATS, Timing, calmest, mark, own_clock, timed, timed_in_turns
from torch_soap.random import CounterState
from torch_soap.rewrite.segment import DTYPES, build_item
from torch_soap.runtime.comm import Comm

READINGS = 3  # of the distance of cores: one may be off
RECENT = 512 << 10  # bytes of a tensor that is still in the core's cache when what follows begins
HEAVY, OTHERS, CHECK_NS = 8, 4, 500_000_000  # operators whose times are looked at again: those that take most, others, and how long their runs take at most
OFF, WORTH_NS = 1.05, 1_000_000  # times of slow minutes are so many times what they are now; of operators that take less than this in all nobody asks
ROUNDS, MOST_TURNS, AT_ONCE = 5, 8, 512 << 20  # over operators that are timed in turns; turns of each in a round, and bytes of those in one round


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
    mine = []
    for sample, timings in zip(samples, time_tiles(program, graph, samples, comm), strict=True):
        mine.append([t.ns for t in timings])
        mark(known, f"operators/{sample.key}", *timings)
    everyone = [mine] if comm is None else comm.gather_objects(mine)
    return {s.key: [int(statistics.mean(way)) for way in zip(*taken, strict=True)] for s, taken in zip(samples, zip(*everyone, strict=True), strict=True)}


NOTHING = Timing(0, 0.0)


class Ranks:
    """All of a job, which measure together (`measuring.Together`)."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def worst(self, value: float) -> float:
        return max(v for (v,) in self.comm.gather_ints([int(1000 * value)])) / 1000

    def all_of(self, chosen: Sequence[int]) -> list[int]:
        return sorted(set().union(*self.comm.gather_objects(list(chosen))))

    def slowest(self, mine: Timing) -> Timing:
        """Of all ranks', the longest time and the largest spread. Collective."""
        everyone = self.comm.gather_ints([mine.ns, int(mine.spread * 1000)])
        return Timing(max(v[0] for v in everyone), max(v[1] for v in everyone) / 1000)

    def core_distance_ns(self) -> int:
        """On rank 0's host, the middle of a few readings; the same on all ranks."""
        mine = int(statistics.median(_backend.core_distance_ns() for _ in range(READINGS))) if self.comm.rank == 0 else 0
        return self.comm.gather_ints([mine])[0][0]

    def moved(self) -> bool:
        mine = self.comm.rank == 0 and not any(CORES.alike(_backend.core_distance_ns()) for _ in range(READINGS))
        return self.comm.gather_ints([int(mine)])[0][0] == 1


def touch(recent: Sequence[torch.Tensor]) -> None:
    """What was made last is in the cache where it is small."""
    for _ in range(2):
        for tensor in recent:
            if tensor.numel() * tensor.element_size() <= RECENT:
                tensor.clone()


@functools.cache
def harness() -> Timing:
    """What autograd takes to begin and to end, around an operator that only makes a view."""
    x, grads = torch.ones(1, requires_grad=True), [torch.ones(1)]

    def results() -> Any:
        out = x.view_as(x)
        touch(grads)
        return out

    def backward(out: Any) -> None:
        torch.autograd.grad([out], [x], grads, allow_unused=True)

    return calmest(lambda: timed(backward, 20, own_clock(), before=results))


class Stopwatch:
    """Reads the clock inside of a module, between its inputs and its results: what the call takes around them is the segment's, not the operator's."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.clock, self.begin_ns, self.end_ns = own_clock(), 0, 0
        inside = [node for node in module.graph.nodes if node.op != "placeholder"]
        for node, read in ((inside[0], self.begin), (inside[-1], self.end)):
            with module.graph.inserting_before(node):
                module.graph.call_function(read)
        module.recompile()

    def begin(self) -> None:
        self.begin_ns = self.clock()

    def end(self) -> None:
        self.end_ns = self.clock()

    def reading(self) -> int:
        return self.end_ns - self.begin_ns


def example_inputs(program: _C.Program, node: _C.Node, operands: Sequence[int], shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> list[torch.Tensor]:
    """Operands of a tile. `operands`: which each is. Indices into a table are anywhere in it: the rows of one index would stay in the cache."""
    num_rows = 1
    if _C.family_of(node) == "embedding":
        table = node.operand_names.index("weight") if "weight" in node.operand_names else 0
        dim = node.attrs.get("dim")
        num_rows = program.graph.tensors[node.inputs[table]].shape[dim if isinstance(dim, int) else 0]
    inputs = []
    for operand, shape, name in zip(operands, shapes, dtypes, strict=True):
        dtype = DTYPES[name]
        if dtype.is_floating_point:
            inputs.append(torch.rand(shape, dtype=dtype))
        elif dtype == torch.bool:
            inputs.append(torch.zeros(shape, dtype=dtype))
        else:
            inputs.append(torch.randint(num_rows, shape, dtype=dtype, generator=torch.Generator().manual_seed(operand)))
    return inputs


class Tile:
    """One tile of one operator, to be run as a step finds it: what was computed just before it, a small operand or gradient, is in the cache; parameters, and
    what forward has kept for backward, are not."""

    def __init__(self, program: _C.Program, graph: Graph, sample: _C.OpSample) -> None:
        self.module, shapes, dtypes, needs = build_item(program, sample.node, sample.tile, sample.chunk, graph)
        node, tensors = program.graph.nodes[sample.node], program.graph.tensors
        boxes = _C.compute_item(program, sample.node, sample.tile, sample.chunk).operand_boxes
        present = [i for i, box in enumerate(boxes) if box is not None]
        self.inputs = [x.requires_grad_(need) for x, need in zip(example_inputs(program, node, present, shapes, dtypes), needs, strict=True)]
        stored = [program.graph.nodes[tensors[node.inputs[i]].producer].kind == _C.NodeKind.param for i in present]
        self.computed = [x.detach() for x, is_stored in zip(self.inputs, stored, strict=True) if not is_stored]
        self.leaves = [x for x in self.inputs if x.requires_grad]
        self.stored = [is_stored for x, is_stored in zip(self.inputs, stored, strict=True) if x.requires_grad]  # of leaves
        self.differentiable = any(tensors[t].requires_grad for t in node.outputs)
        self.random, self.stopwatch = CounterState(0, 1), Stopwatch(self.module)
        first = self.forward()
        self.num_bytes = sum(t.numel() * t.element_size() for t in (*self.inputs, *first))
        self.outputs = [i for i, r in enumerate(first) if r.requires_grad] if self.leaves else []
        self.grads = [torch.ones_like(first[i]) for i in self.outputs]

    def forward(self) -> Any:
        with torch.set_grad_enabled(self.differentiable):
            return self.module(*self.inputs, self.random)


class Turn:
    """A tile's turn in a round: its forward, and its backward after everybody's forward."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.kept: list[torch.Tensor] | None = None
        self.gradients: list[torch.Tensor | None] = []  # of parameters: they stay until the next step

    def forward(self) -> int:
        """ns that it took."""
        self.gradients = []
        touch(self.tile.computed)
        results = self.tile.forward()
        self.kept = [results[i] for i in self.tile.outputs]
        return self.tile.stopwatch.reading()

    def backward(self) -> int:
        if self.kept is None:
            self.forward()
        kept, self.kept, clock = self.kept or [], None, self.tile.stopwatch.clock
        touch(self.tile.grads)
        begin = clock()
        gradients = torch.autograd.grad(kept, self.tile.leaves, self.tile.grads, allow_unused=True)
        end = clock()
        self.gradients = [g for g, stays in zip(gradients, self.tile.stored, strict=True) if stays]
        return end - begin


def time_tiles(program: _C.Program, graph: Graph, samples: Sequence[_C.OpSample], comm: Comm | None) -> list[tuple[Timing, Timing]]:
    """On this rank, forward and backward of each sample, in rounds as steps are: one forward after another and then all backwards, of about
    AT_ONCE bytes at a time. So what ran before an operator has taken the caches, or has brought its code and data there."""
    wanted = {sample.key for sample in samples}
    of_step = [turn.key for turn in _C.CostModel.turns(program, wanted)]
    occurrences = Counter[str]()
    turns = []
    for key in [*of_step, *sorted(wanted - set(of_step))]:
        occurrences[key] += 1
        if occurrences[key] <= MOST_TURNS:
            turns.append(key)
    found = dict[str, tuple[Timing, Timing]]()
    group, num_bytes = dict[str, Tile](), 0
    for sample in samples:
        group[sample.key] = Tile(program, graph, sample)
        num_bytes += group[sample.key].num_bytes * min(occurrences[sample.key], MOST_TURNS)
        if num_bytes >= AT_ONCE or sample is samples[-1]:
            found |= time_group(group, [key for key in turns if key in group], occurrences, comm)
            group, num_bytes = {}, 0
    return [found[sample.key] for sample in samples]


def time_group(tiles: dict[str, Tile], keys: Sequence[str], occurrences: Mapping[str, int], comm: Comm | None) -> dict[str, tuple[Timing, Timing]]:
    """`keys`: whose turn it is, in the order of a step's forward. `occurrences`: of each in a step."""
    turns = [Turn(tiles[key]) for key in keys]
    back = [i for i in reversed(range(len(turns))) if turns[i].tile.outputs]
    runs = [*(turn.forward for turn in turns), *(turns[i].backward for i in back)]
    timings = timed_in_turns(runs, ROUNDS, together=None if comm is None else Ranks(comm))
    forwards, backwards = defaultdict(list), defaultdict(list)
    for key, timing in zip(keys, timings[: len(turns)], strict=True):
        forwards[key].append(timing)
    for i, timing in zip(back, timings[len(turns) :], strict=True):
        backwards[keys[i]].append(timing)
    found = {}
    for key in tiles:
        forward, backward = mean(forwards[key], occurrences[key]), NOTHING
        if key in backwards:
            whole = mean(backwards[key], occurrences[key])
            backward = Timing(max(whole.ns - harness().ns, 0), whole.spread)
        found[key] = forward, backward
    return found


def mean(timings: Sequence[Timing], of: int) -> Timing:
    """Of so many turns, of which these are the first. The rest are as the later half of these: who comes again and again finds its code in the cache."""
    later = statistics.mean(t.ns for t in timings[len(timings) // 2 :])
    total = sum(t.ns for t in timings) + (max(of, len(timings)) - len(timings)) * later
    return Timing(int(total / max(of, len(timings))), statistics.mean(t.spread for t in timings))
