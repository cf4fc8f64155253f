"""Measures movements between ranks by size, and how much longer they take in a step than by themselves."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from torch_soap import _C
from torch_soap.measuring import REPEATS, Timing, at_pace, calm_samples, calmest, lesser, mark, own_clock, quiet, spread_of, timed, undisturbed
from torch_soap.operator_times import RECENT, Ranks
from torch_soap.runtime.comm import Comm
from torch_soap.runtime.movement import PlannedMove, PlannedStep, PlannedTransfer, execute

SIZES = (4 << 10, 32 << 10, 256 << 10, 1 << 20, 8 << 20)  # of movements, bytes
# Beyond all caches; measured where it doesn't take long.
LARGE, LARGE_NS = 40 << 20, 50_000_000
LOOKED_AT, OFF_MOVING = 256 << 10, 1.2  # of the sizes of movements; what a table of a slow minute is off by: movements differ from time to time
COLD_SIZES, COLD_MEETINGS = (32 << 10, 256 << 10), 30  # of movements after short and after long computations
TURNS, PRODUCTS = 15, 20  # meetings of ranks that take turns on cores, and products that each computes before one: a millisecond
SMALL_PIECE, PIECES = 64, (2, 66)  # elements of a piece, and how many of them
OTHER = 8 << 20  # bytes that a core's own cache doesn't hold
UNCACHED = 64 << 20  # bytes that no cache holds beside what else goes on


def measure_movements(machine: _C.Machine, comm: Comm, known: dict[str, Any], own_core: bool) -> None:
    """Exchange and all-reduce by size: over the world, in groups of a power of two within each host, and in such groups over hosts, all groups of a kind at
    once. Other sets of ranks are priced by the nearest of these."""
    tables, doubted = dict(machine.tables), "tables" in known.get("doubted", [])
    layouts = group_layouts(machine.host_of)
    comm.join({tuple(group) for groups in layouts.values() for group in groups})
    for (num_ranks, num_hosts), groups in layouts.items():
        ranks = next((g for g in groups if comm.rank in g), [])
        for kind in ("exchange", "all_reduce"):
            key = f"{kind}/{num_ranks}/{num_hosts}"
            if key not in known["tables"]:
                known["tables"][key] = time_movements(comm, kind, ranks, known, key, own_core)
            elif doubted and dict(known["tables"][key])[LOOKED_AT] > OFF_MOVING * time_movement(comm, kind, ranks, LOOKED_AT, own_core).ns:
                known["tables"][key] = lesser(known["tables"][key], time_movements(comm, kind, ranks, known, key, own_core))
            tables[key] = [tuple(p) for p in known["tables"][key]]
    known["doubted"] = [name for name in known.get("doubted", []) if name != "tables"]
    machine.tables = tables


def time_movements(comm: Comm, kind: str, ranks: list[int], known: dict[str, Any], key: str, own_core: bool) -> list[list[int]]:
    """[bytes, ns] of each size. `key`: of the table."""
    sizes = list(SIZES)
    timings = [calmest(lambda s=size: time_movement(comm, kind, ranks, s, own_core)) for size in sizes]  # type: ignore[misc]
    if timings[-1].ns < LARGE_NS:
        sizes.append(LARGE)
        timings.append(time_movement(comm, kind, ranks, LARGE, own_core))
    mark(known, f"tables/{key}", *timings)
    return [[size, t.ns] for size, t in zip(sizes, timings, strict=True)]


def measure_pieces(comm: Comm, known: dict[str, Any]) -> float:
    """What one more piece of a tensor takes that is put together of small ones (`Machine.piece_ns`)."""
    if "piece_ns" not in known:
        source, a, ranks = torch.zeros(SMALL_PIECE), torch.randn(128, 128), Ranks(comm)
        timings = []
        for count in PIECES:
            indices = [[(0, [(i * SMALL_PIECE, (i + 1) * SMALL_PIECE)])] for i in range(count)]
            moves = [PlannedMove(-1, False, 0, 1, [], index, [SMALL_PIECE], SMALL_PIECE) for index in indices]
            step = PlannedStep([], [PlannedTransfer(False, False, False, source.dtype, [], moves, [(1, [count * SMALL_PIECE])], _C.Reduce.none)])

            def assemble(_: Any, step: PlannedStep = step) -> None:
                execute(step, comm, lambda value, dtype: source)

            comm.gather_ints([0])
            timings.append(ranks.slowest(timed(assemble, 10 * REPEATS, own_clock(), before=lambda: a @ a, together=ranks)))
        few, many = timings
        known["piece_ns"] = max(many.ns - few.ns, 1) / (PIECES[1] - PIECES[0])
        mark(known, "piece_ns", *timings)
    return float(known["piece_ns"])


def measure_cold(machine: _C.Machine, comm: Comm, known: dict[str, Any]) -> float:
    """How much longer small movements take after computations of some milliseconds than after short ones (`Machine.cold_ns`): from when the last rank comes
    until all have what they wait for."""
    if "cold_ns" not in known:
        world = list(range(comm.world_size))
        short = torch.randn(128, 128), torch.zeros((64 << 10) // 4)
        long = torch.randn(512, 512), torch.zeros(OTHER // 4)
        more, paces = [], []
        for kind in ("exchange", "all_reduce"):
            for size in COLD_SIZES:
                source = torch.zeros(size // 4)
                step = movement(comm, kind, world, source)

                def meet(before: tuple[torch.Tensor, torch.Tensor], step: PlannedStep = step, source: torch.Tensor = source) -> list[int]:
                    product, written = before
                    product @ product
                    written.add_(1.0)
                    begin = time.perf_counter_ns()
                    execute(step, comm, lambda value, dtype: source)
                    return [begin, time.perf_counter_ns()]

                def meetings(meet: Any = meet) -> list[list[list[int]]]:
                    return [[meet(before) for _ in range(COLD_MEETINGS)] for before in (short, long)]

                taken, pace = undisturbed(meetings, Ranks(comm))
                paces.append(pace)
                both = [after_the_last(comm.gather_ints([ns for pair in each for ns in pair]), machine.host_of) for each in taken]
                more.append(both[1] - both[0])
        known["cold_ns"] = float(max(statistics.median(more), 0.0))
        mark(known, "cold_ns", at_pace(max(paces)))
    return float(known["cold_ns"])


def measure_turns(comm: Comm, known: dict[str, Any]) -> float:
    """How much longer movements of ranks that take turns on cores take after each has computed for a millisecond than back to back (`Machine.turn_ns`): who
    waits sleeps, and has to be woken; where more are left on one core than on another, one is idle; and the caches are others'."""
    if "turn_ns" not in known:
        world, a = list(range(comm.world_size)), torch.randn(128, 128)
        recent, other = torch.zeros((64 << 10) // 4), torch.zeros(OTHER // 4)
        more, paces = [], []
        for kind in ("exchange", "all_reduce"):
            for size in COLD_SIZES:
                source = torch.zeros(size // 4)
                step = movement(comm, kind, world, source)

                def loop(computing: bool, moving: bool, step: PlannedStep = step, source: torch.Tensor = source) -> float:
                    comm.gather_ints([0])
                    begin = time.perf_counter_ns()
                    for _ in range(TURNS):
                        for _ in range(PRODUCTS if computing else 0):
                            a @ a
                            recent.add_(1.0)
                        if computing:
                            other.add_(1.0)
                        if moving:
                            execute(step, comm, lambda value, dtype: source)
                    comm.gather_ints([0])  # all have done theirs
                    return (time.perf_counter_ns() - begin) / TURNS

                def differences(loop: Any = loop) -> tuple[float, float, float]:
                    return loop(True, True), loop(True, False), loop(False, True)

                samples, pace = calm_samples(differences, 2 * REPEATS - 1, together=Ranks(comm))
                paces.append(pace)
                both, computing, moving = (quiet(values) for values in zip(*samples, strict=True))
                more.append(int(both - computing - moving))
        everyone = comm.gather_ints(more)
        known["turn_ns"] = float(max(statistics.mean(max(ns) for ns in zip(*everyone, strict=True)), 0.0))
        mark(known, "turn_ns", at_pace(max(paces)))
    return float(known["turn_ns"])


def after_the_last(everyone: Sequence[Sequence[int]], host_of: Sequence[int]) -> float:
    """Median over meetings of how long they took once all ranks were there. `everyone`: of each rank, begin and end of each meeting, in turns. The clocks of
    hosts differ: where the last rank came it took least."""
    taken = []
    for i in range(0, len(everyone[0]), 2):
        hosts = [[times[i : i + 2] for times, h in zip(everyone, host_of, strict=True) if h == host] for host in sorted(set(host_of))]
        taken.append(min(max(end for _, end in host) - max(begin for begin, _ in host) for host in hosts))
    return statistics.median(taken)


def group_layouts(host_of: Sequence[int]) -> dict[tuple[int, int], list[list[int]]]:
    """(ranks of a group, hosts that it lies on) -> disjoint groups of that kind, as many as there is room for."""
    hosts = [[r for r, h in enumerate(host_of) if h == host] for host in sorted(set(host_of))]
    world = len(host_of)
    layouts = {(world, len(hosts)): [list(range(world))]}
    fewest = min(len(h) for h in hosts)
    size = 2
    while size <= fewest:
        layouts.setdefault((size, 1), [h[i : i + size] for h in hosts for i in range(0, len(h) - size + 1, size)])
        size *= 2
    if len(hosts) > 1 and fewest > 1:  # a rank of each host
        layouts.setdefault((len(hosts), len(hosts)), [[h[i] for h in hosts] for i in range(fewest)])
    return layouts


def movement(comm: Comm, kind: str, ranks: list[int], source: torch.Tensor) -> PlannedStep:
    """An exchange in which every rank sends `source`, each peer another part of it, or an all-reduce of it, as the engine plans them."""
    moves, results = [], []
    if kind == "all_reduce":
        whole = list(source.shape)
        moves, results = [PlannedMove(-1, False, 0, 1, [], [], whole, source.numel())], [(1, whole)]
    elif ranks:
        others = [r for r in ranks if r != comm.rank]
        part = source.numel() // len(others)
        for i, peer in enumerate(others):
            index = [(0, [(i * part, (i + 1) * part)])]
            moves.append(PlannedMove(peer, True, 0, -1, index, [], [part], part))
            moves.append(PlannedMove(peer, False, -1, 1, [], index, [part], part))
        results = [(1, [part * len(others)])]
    transfer = PlannedTransfer(kind == "all_reduce", False, kind == "all_reduce", source.dtype, ranks, moves, results, _C.Reduce.sum)
    return PlannedStep(ranks if kind == "exchange" else [], [transfer])


def time_movement(comm: Comm, kind: str, ranks: list[int], size: int, own_core: bool) -> Timing:
    """What a movement adds to what computes before and after it, as the engine makes it, packing and unpacking too: an exchange in which every rank sends
    `size` bytes in all, or an all-reduce of a tensor of `size` bytes. Back to back, movements take half as long: nobody has to be woken, and no rank comes
    late. So are they timed where ranks take turns on cores (not `own_core`): what those lose after computation says how they share cores, whatever the size
    (`measure_turns`). The slowest rank's, on all ranks; a rank without a group (`ranks` empty) only waits."""
    small = size <= RECENT  # long computations differ between ranks by more than such a movement takes, and hide it
    source, a, other = (
        torch.zeros(max(size // 4, len(ranks))),
        torch.randn(*(128, 128) if small else (256, 256)),
        torch.zeros((64 << 10 if small else OTHER) // 4),
    )
    step = movement(comm, kind, ranks, source)
    # What is moved in training was made a while ago, and what comes is kept: large ones are in no cache.
    sources = [source] if small else [source, *(torch.zeros_like(source) for _ in range(UNCACHED // size))]
    turns, kept = itertools.cycle(sources), deque[Any](maxlen=len(sources) - 1)
    # One of a small tensor now and then takes ten times as long: the mean counts.
    cycles = (30 if own_core else 100) if size <= 256 << 10 else 10 if size <= 1 << 20 else 3

    def loop(moving: bool) -> float:
        comm.gather_ints([0])
        begin = time.perf_counter_ns()
        for _ in range(cycles if ranks else 0):
            if own_core:
                a @ a
                other.add_(1.0)
                if small:
                    source.clone()
            if moving:
                mine = next(turns)
                kept.append(execute(step, comm, lambda value, dtype, mine=mine: mine))  # type: ignore[misc]
        return (time.perf_counter_ns() - begin) / cycles

    loop(True)
    wanted = REPEATS if size > 1 << 20 else 2 * REPEATS - 1
    pairs, pace = calm_samples(lambda: (loop(True), loop(False)), wanted, together=Ranks(comm))  # in turns: a machine gets slower and faster
    together, alone = zip(*pairs, strict=True)
    mine = [int(quiet(together) - quiet(alone)), int(max(together) - min(together)), int(statistics.median(together))]
    taken, spread, total = (max(v) for v in zip(*comm.gather_ints(mine), strict=True))
    return Timing(max(taken, 1), max(spread / max(total, 1), spread_of(pace)))
