"""Times of operators that were taken in a slow minute don't stay: a few are looked at again, and all where these take less (`operator_times.doubt`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torch_soap
from torch_soap import _C, cache, calibrate, movement_times, operator_times
from torch_soap.measuring import Timing
from torch_soap.operator_times import HEAVY, OTHERS, doubt, measure_operators, representative
from torch_soap.planner import graph_for

WIDTHS = [10 + i for i in range(20)]


class Other:
    """A second rank, for which operators take `speed` times as long."""

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def gather_objects(self, mine: list[list[int]]) -> list[list[list[int]]]:
        return [mine, [[int(ns * self.speed) for ns in both] for both in mine]]


class Machine:
    """On which a product takes a millisecond for each column forward, and two backward, times `pace`; `timed` is what was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pace, self.unit_ns, self.timed = 1.0, 1_000_000, list[str]()
        monkeypatch.setattr(operator_times, "time_tiles", self.time_tiles)
        module = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(WIDTHS)))
        graph, self.captured, rows = graph_for(module, torch.randn(4, WIDTHS[0]), None, 1)
        self.program = _C.lower(graph, _C.parse_plan(graph, "* @ [0]", 1), rows)
        self.known = cache.nothing_known()

    def time_tiles(self, program: _C.Program, graph: Any, samples: Sequence[_C.OpSample], comm: Any) -> list[tuple[Timing, Timing]]:
        self.timed += [sample.key for sample in samples]
        columns = [program.graph.tensors[program.graph.nodes[sample.node].outputs[0]].shape[-1] for sample in samples]
        return [(Timing(ns, 0.0), Timing(2 * ns, 0.0)) for ns in (int(c * self.unit_ns * self.pace) for c in columns)]

    def measure(self, comm: Other | None = None) -> tuple[int, int, list[tuple[int, int]]]:
        """How many figures are new, how many operators were timed, and the prices."""
        self.timed.clear()
        cost = _C.CostModel(_C.Machine(1, 1))
        fresh = measure_operators(cost, self.program, self.captured, comm, self.known)  # type: ignore[arg-type]
        ops = [n.id for n in self.program.graph.nodes if n.kind == _C.NodeKind.op]
        return fresh, len(self.timed), [cost.time(self.program, n) for n in ops]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


NUM, FEW = len(WIDTHS) - 1, 3  # operators; those looked at again: each takes longer than a check may
CALM = [(columns * 1_000_000, columns * 2_000_000) for columns in WIDTHS[1:]]


def test_times_of_a_slow_minute_are_measured_again(machine: Machine) -> None:
    machine.pace = 1.2
    assert machine.measure()[:2] == (NUM, NUM)
    assert machine.measure()[:2] == (0, 0), "nobody doubts them"
    machine.pace = 1.0
    doubt(machine.known)
    assert machine.measure() == (NUM, NUM, CALM)
    assert machine.known["doubted"] == ["update", "tables"] and machine.measure() == (0, 0, CALM)


@pytest.mark.parametrize("pace", [1.0, 1.04, 1.3])
def test_times_that_hold_stay_and_a_slow_minute_now_changes_nothing(machine: Machine, pace: float) -> None:
    machine.measure()
    machine.pace = pace
    doubt(machine.known)
    assert machine.measure() == (0, FEW, CALM)
    assert machine.measure() == (0, 0, CALM), "looked at once"


def test_operators_that_take_nothing_are_not_looked_at(machine: Machine) -> None:
    machine.unit_ns = 500
    machine.measure()
    machine.pace = 0.5
    doubt(machine.known)
    assert machine.measure()[:2] == (0, 0)


def test_ranks_decide_by_the_mean_over_ranks(machine: Machine) -> None:
    machine.measure(Other(1.0))
    doubt(machine.known)
    machine.pace = 0.9
    assert machine.measure(Other(1.3))[:2] == (0, FEW), "as slow as before: 1.035"
    doubt(machine.known)
    fresh, timed, prices = machine.measure(Other(1.0))
    assert (fresh, timed) == (NUM, NUM) and prices[0] == (9_900_000, 19_800_000)


def test_a_cache_is_doubted_when_it_is_read(machine: Machine, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SOAP_CACHE", str(tmp_path))
    machine.pace = 1.2
    machine.measure()
    cache.save(1, machine.known)
    machine.pace, machine.known = 1.0, cache.load(1)
    assert machine.measure() == (NUM, NUM, CALM)
    machine.known["looks"] = cache.LOOKS
    cache.save(1, machine.known)
    machine.pace, machine.known = 0.5, cache.load(1)
    assert machine.measure() == (0, 0, CALM), "looked at often enough"


def test_the_heaviest_and_some_others_are_looked_at_the_same_on_all_ranks() -> None:
    times = {f"operator {i}": [1000 * i, 1000 * i] for i in range(40)}
    chosen = representative(times)
    assert chosen == representative(dict(reversed(times.items()))) and len(chosen) == len(set(chosen)) == HEAVY + OTHERS
    assert chosen[:HEAVY] == [f"operator {i}" for i in range(39, 39 - HEAVY, -1)]
    assert representative({"one": [5, 5]}) == ["one"]


@pytest.mark.parametrize(("known_ns", "now_ns", "timed", "kept_ns"), [(1200, 1000, 6, 1000), (1000, 1020, 1, 1000), (1000, 1300, 1, 1000), (1000, 0, 0, 1000)])
def test_the_update_is_looked_at_again(known_ns: int, now_ns: int, timed: int, kept_ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """now_ns 0: nobody doubts it."""
    known, seen = cache.nothing_known() | {"update": [[size, known_ns] for size in calibrate.UPDATES]}, list[int]()

    def time_update(size: int, comm: Any) -> Timing:
        seen.append(size)
        return Timing(now_ns, 0.0)

    monkeypatch.setattr(calibrate, "time_update", time_update)
    if now_ns:
        doubt(known)
    assert calibrate.measure_update(None, known) == [(size, kept_ns) for size in calibrate.UPDATES]
    assert calibrate.measure_update(None, known) == [(size, kept_ns) for size in calibrate.UPDATES] and len(seen) == timed


@pytest.mark.parametrize(("known_ns", "now_ns", "kept_ns"), [(1300, 1000, 1000), (1100, 1000, 1100), (1000, 2000, 1000)])
def test_movements_are_looked_at_again(known_ns: int, now_ns: int, kept_ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, seen = ("exchange/2/1", "all_reduce/2/1"), list[int]()
    known = cache.nothing_known() | {"tables": {key: [[size, known_ns] for size in movement_times.SIZES] for key in keys}}
    comm, machine = SimpleNamespace(rank=0, world_size=2, join=lambda groups: None), torch_soap.Machine(2, 1)

    def time_movement(comm: Any, kind: str, ranks: list[int], size: int, own_core: bool) -> Timing:
        seen.append(size)
        return Timing(now_ns, 0.0)

    monkeypatch.setattr(movement_times, "time_movement", time_movement)
    movement_times.measure_movements(machine, comm, known, True)  # type: ignore[arg-type]
    assert not seen, "nobody doubts them"
    doubt(known)
    for _ in range(2):  # looked at once
        movement_times.measure_movements(machine, comm, known, True)  # type: ignore[arg-type]
        assert machine.tables == {key: [(size, kept_ns) for size in movement_times.SIZES] for key in keys}
    assert len(seen) == (2 if kept_ns == known_ns else 2 * (2 + len(movement_times.SIZES)))  # and a large one


def test_ranks_with_fewer_at_work_are_not_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow moment while one computes is no property of the machine, nor is one that falls on some samples."""
    rounds = calibrate.SHARING_ROUNDS
    of_name = [wall + (300 if number % 3 == wall % 4 else 0) for number in range(rounds) for wall in (10, 135, 110, 210)]  # barriers', one's to three ranks'
    walls = iter(of_name + of_name)
    monkeypatch.setattr(calibrate, "calm_samples", lambda *_, **__: ([(next(walls), 100)], 1.0))
    comm: Any = SimpleNamespace(rank=0, gather_ints=lambda mine: [mine])
    machine: Any = torch_soap.Machine(3, 3)
    machine.cores_of = [0, 0, 0]  # as three hosts on one machine
    monkeypatch.setattr(calibrate, "UPDATE_LOOKED_AT", 64 << 20)
    known = cache.nothing_known()
    assert calibrate.measure_sharing(machine, comm, known) == ([1.0, 1.0, 0.5], [1.0, 1.0, 0.5])
    assert known["busy_speed"] == [0.8, 1.0, 0.5] and calibrate.measure_sharing(machine, comm, known)[0] == [1.0, 1.0, 0.5], "from the cache too"
