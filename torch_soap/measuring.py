"""Times and how far to trust them: a figure taken on a busy machine is taken again.

Each figure in the cache has a mark [spread, load, tries]: the spread of its repeats as a part of their median, the load of the host (processes that
want to run for each core) when its job began to measure, and how often it was measured. `forget_doubtful` says which are measured again.

A virtual machine's core is half of a core, and somebody else's work on the other half costs ours up to half of its speed: for milliseconds, or for most of a
minute. No load shows it, and the thread's own clock neither. So a reading of the machine's pace stands before and after each sample, and samples of slow
moments are taken again.

Its cores are moved about as well, every now and then: with a cache in common they exchange data several times as fast as without, and get less of it each.
Where ranks measure together, all samples are of moments when the cores were as far apart as at first (`Cores`).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

Sample = TypeVar("Sample")

REPEATS = 3
NOISY = 0.3  # spread above which a figure is doubtful
DOUBTFUL = 1.01 * NOISY
JITTER_NS = 50_000  # a spread below this says nothing of the machine
ATTEMPTS = 3  # of a doubtful figure in one run
TRIES = 3  # runs that try a doubtful figure: a machine that is never quiet gets on with what it has
BUSY = 0.5  # load above which a figure is doubtful once the host is quieter
SMALL = 100  # operators of one reading of the pace: a quarter of a millisecond
CALM = 1.3  # readings up to so many times the fastest are the machine's usual pace; with a neighbour at work they are 1.6 to 1.8
NEAR = 2.0  # distances of cores up to so many times another are alike: with a cache in common they were 50 to 90 ns apart, without 270 to 320
MOVED = 10.0  # the pace while cores are elsewhere
NAP_S, NAPS = 0.2, 100  # a wait until cores are back, and how many of them in one run
AGAIN, PATIENCE_NS = 2, 20_000_000  # in slow moments up to so many times as many samples as wanted are taken, and for so long


@dataclass(frozen=True)
class Timing:
    ns: int  # median
    spread: float  # of the repeats, as a part of the median

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY and self.spread * self.ns > JITTER_NS


def own_clock() -> Callable[[], int]:
    """Of what this thread computes: processes that share its core don't count. The wall's where torch computes with several threads."""
    return time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns


class Pace:
    """What small operators take now, in times of the fastest reading: they show best how fast this core is at the moment."""

    def __init__(self) -> None:
        self.value = torch.ones(16)
        self.fastest_ns = 0  # nothing read yet

    def __call__(self) -> float:
        clock, value = own_clock(), self.value
        for _ in range(SMALL // 5):  # what ran before has taken the cache
            value.add_(1.0)
        begin = clock()
        for _ in range(SMALL):
            value.add_(1.0)
        taken = clock() - begin
        self.fastest_ns = min(self.fastest_ns or taken, taken)
        return taken / self.fastest_ns


PACE = Pace()  # of this process


class Cores:
    """How far apart this host's cores are, as figures count on it; the same on all ranks."""

    def __init__(self) -> None:
        self.distance_ns, self.naps = 0, NAPS  # 0: nothing counts on it

    def alike(self, distance_ns: int) -> bool:
        return 0 in (distance_ns, self.distance_ns) or apart(distance_ns, self.distance_ns) <= NEAR


def apart(a_ns: int, b_ns: int) -> float:
    """How many times one distance of cores is another. What isn't known (0) is like nothing else."""
    return max(a_ns, b_ns) / min(a_ns, b_ns) if a_ns and b_ns else 1.0 if a_ns == b_ns else float("inf")


CORES = Cores()  # of this process


class Together(Protocol):
    """Ranks that measure together, and decide alike."""

    def worst(self, value: float) -> float:
        """Of all ranks'. Collective."""

    def all_of(self, chosen: Sequence[int]) -> list[int]:
        """What any rank has chosen, in order. Collective."""

    def moved(self) -> bool:
        """Whether cores are elsewhere than CORES says. Collective."""


def settled(together: Together) -> bool:
    """Waits until cores are back, as long as there are naps left. Whether they are. Collective."""
    while together.moved():
        if CORES.naps <= 0:
            return False
        CORES.naps -= 1
        time.sleep(NAP_S)
    return True


def undisturbed(measure: Callable[[], Sample], together: Together) -> tuple[Sample, float]:
    """What it measures while cores stay where they are, and the pace: 1, or MOVED where they didn't."""
    for _ in range(ATTEMPTS):
        here = settled(together)
        value = measure()
        if here and not together.moved():
            return value, 1.0
        if not here:
            break
    return value, MOVED


class Calm(Generic[Sample]):
    """Samples of the calmest moments."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.taken, self.begin_ns = wanted, list[tuple[float, Sample]](), time.perf_counter_ns()

    def wants_more(self, patient: bool) -> bool:
        """Samples go on until as many as wanted are calm, or for long enough; `patient`: for PATIENCE_NS at least. Where nobody
        waits for cores any more, nobody wants them back."""
        if sum(pace <= CALM or (pace == MOVED and CORES.naps <= 0) for pace, _ in self.taken) >= self.wanted:
            return False
        return len(self.taken) <= AGAIN * self.wanted or (patient and time.perf_counter_ns() - self.begin_ns < PATIENCE_NS)

    def calmest(self) -> tuple[list[Sample], float]:
        """So many, and the slowest pace among them."""
        calmest_first = sorted(enumerate(self.taken), key=lambda t: (max(t[1][0], CALM), t[0]))[: self.wanted]
        return [value for _, (_, value) in calmest_first], max(pace for _, (pace, _) in calmest_first)


def calm_samples(sample: Callable[[], Sample], wanted: int, pace: Callable[[], float] = PACE, together: Together | None = None) -> tuple[list[Sample], float]:
    """So many samples of the calmest moments, and the slowest pace among them. `together`: with other ranks; all take as many."""

    def read(wait: bool) -> float:
        if together is None:
            return pace()
        here = settled(together) if wait else not together.moved()
        return together.worst(pace()) if here else MOVED

    calm, last = Calm[Sample](wanted), read(wait=True)
    while calm.wants_more(patient=together is None):
        value, first = sample(), last
        last = read(wait=False)
        calm.taken.append((max(first, last), value))
        if last == MOVED and calm.wants_more(patient=together is None):
            last = read(wait=True)
    return calm.calmest()


def quiet(samples: Sequence[float]) -> float:
    """The lower quartile: what others do to the memory, which no pace shows, only adds."""
    ordered = sorted(samples)
    return ordered[(len(ordered) - 1) // 4]


def lesser(before: Sequence[Any], now: Sequence[Any]) -> list[list[int]]:
    """Of two tables of pairs [bytes, ns]: what else goes on in the machine only adds."""
    again = dict(now)
    return [[size, min(ns, again.get(size, ns))] for size, ns in before]


def timed(
    fn: Callable[..., Any],
    repeats: int = REPEATS,
    clock: Callable[[], int] = time.perf_counter_ns,
    *,
    before: Callable[[], Any] | None = None,
    pace: Callable[[], float] = PACE,
    together: Together | None = None,
) -> Timing:
    """Median of a few runs after one to warm up. `before`: runs before each of them, untimed; what it gives, if anything, is fn's argument."""

    def sample() -> int:
        given = None if before is None else before()
        arguments = () if given is None else (given,)
        begin = clock()
        result = fn(*arguments)
        end = clock()
        del result, given, arguments
        return end - begin

    sample()
    return middle(*calm_samples(sample, repeats, pace, together))


def timed_in_turns(runs: Sequence[Callable[[], int]], wanted: int, pace: Callable[[], float] = PACE, together: Together | None = None) -> list[Timing]:
    """Median of what each run says that it took, in rounds over all of them after one to warm up; those that are noisy again, as `calmest`. `together`: with
    other ranks, all the same at the same time."""

    def anybodys(mine: list[int]) -> list[int]:
        return mine if together is None else together.all_of(mine)

    def rounds(chosen: Sequence[int]) -> dict[int, Timing]:
        for i in chosen:
            runs[i]()
        samples = {i: Calm[int](wanted) for i in chosen}
        while more := anybodys([i for i in chosen if samples[i].wants_more(patient=False)]):
            here = together is None or settled(together)
            taken, last = [], pace()
            for position, i in enumerate(more):
                if i > 0 and (position == 0 or more[position - 1] != i - 1):
                    runs[i - 1]()  # what it follows
                value, first = runs[i](), last
                last = pace()
                taken.append((i, max(first, last), value))
            here = here and (together is None or not together.moved())
            for i, slowest, value in taken:
                samples[i].taken.append((slowest if here else MOVED, value))
        return {i: middle(*calm.calmest()) for i, calm in samples.items()}

    best = rounds(range(len(runs)))
    for _ in range(ATTEMPTS - 1):
        for i, again in rounds(anybodys([i for i, taken in best.items() if taken.noisy])).items():
            best[i] = min(best[i], again, key=lambda t: t.spread)
    return [best[i] for i in range(len(runs))]


def middle(samples: Sequence[int], slowest_pace: float) -> Timing:
    """Their median. A spread is at least what the pace was off."""
    median = int(statistics.median(samples))
    return Timing(median, max((max(samples) - min(samples)) / max(median, 1), spread_of(slowest_pace)))


def spread_of(pace: float) -> float:
    """At least so much do samples differ that were taken at such a pace, for all that is known; cores elsewhere make a figure doubtful, no more."""
    return 0.0 if pace <= CALM else DOUBTFUL if pace == MOVED else pace - 1


def at_pace(pace: float) -> Timing:
    """For the mark of a figure that isn't a time."""
    return Timing(10**9, spread_of(pace))


def calmest(measure: Callable[[], Timing]) -> Timing:
    """Measures again while it is noisy, and takes the attempt with the least spread. Where ranks measure together, `measure` must give the same on all."""
    best = measure()
    for _ in range(ATTEMPTS - 1):
        if not best.noisy:
            break
        best = min(best, measure(), key=lambda t: t.spread)
    return best


def load_per_core() -> float:
    """Of the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def mark(known: dict[str, Any], name: str, *timings: Timing) -> None:
    """Notes how good a figure is; a spread that is jitter counts as none."""
    tries = known["marks"].get(name, [0.0, 0.0, 0])[2]
    spread = max((t.spread for t in timings if t.noisy), default=0.0)
    known["marks"][name] = [round(spread, 3), known["load"], tries + 1]


def forget_doubtful(known: dict[str, Any], load: float) -> list[str]:
    """Drops the figures that are to be measured again, and gives their names: those with a large spread, TRIES times at most, and those of a time when the
    host was busy, now that it has at most half of that load. `known` keeps their marks, and `load` for those to come."""
    dropped = []
    for name, (spread, load_then, tries) in known["marks"].items():
        if not ((spread > NOISY and tries < TRIES) or (load_then > BUSY and load < load_then / 2)):
            continue
        kind, _, key = name.partition("/")
        found = known.pop(kind, None) if not key else known[kind].pop(key, None)
        if found is not None:
            dropped.append(name)
    known["load"] = round(load, 2)
    return dropped


def known_error(known: dict[str, Any]) -> float:
    """How far off a prediction is likely to be, relative: what a training's `health` has noted, or how much the figures it rests on differ between
    repeats."""
    spreads = [spread for spread, _, _ in known["marks"].values()]
    return max(float(known.get("error", 0.0)), statistics.median(spreads) if spreads else 0.0)
