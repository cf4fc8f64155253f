"""Times and how far to trust them: a figure taken on a busy machine is taken again.

Each figure in the cache has a mark [spread, load, tries]: the spread of its repeats as a part of their median, the load of the host (processes that
want to run for each core) when its job began to measure, and how often it was measured. `forget_doubtful` says which are measured again.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 3
NOISY = 0.3  # spread above which a figure is doubtful
JITTER_NS = 50_000  # a spread below this says nothing of the machine
ATTEMPTS = 3  # of a doubtful figure in one run
TRIES = 3  # runs that try a doubtful figure: a machine that is never quiet gets on with what it has
BUSY = 0.5  # load above which a figure is doubtful once the host is quieter


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


def timed(
    fn: Callable[..., Any], repeats: int = REPEATS, clock: Callable[[], int] = time.perf_counter_ns, *, before: Callable[[], Any] | None = None
) -> Timing:
    """Median of a few runs after one to warm up. `before`: runs before each of them, untimed; what it gives, if anything, is fn's argument."""
    samples = []
    for _ in range(1 + repeats):
        given = None if before is None else before()
        arguments = () if given is None else (given,)
        begin = clock()
        result = fn(*arguments)
        samples.append(clock() - begin)
        del result, given, arguments
    samples = samples[1:]
    median = int(statistics.median(samples))
    return Timing(median, (max(samples) - min(samples)) / max(median, 1))


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
