"""A virtual machine's cores are moved about by its host: figures are of moments when they were as far apart as at first (`measuring.Cores`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torch_soap import _C, _backend, cache, calibrate, measuring, operator_times
from torch_soap.measuring import MOVED, Timing, apart, calm_samples, timed_in_turns, undisturbed
from torch_soap.operator_times import ROUNDS, Stopwatch, Tile, time_tiles
from torch_soap.planner import graph_for


class Moved:
    """Ranks that measure together, of which this is the only one; `answers`: whether cores are elsewhere, the last for ever."""

    def __init__(self, *answers: bool) -> None:
        self.answers, self.asked = list(answers), 0

    def worst(self, value: float) -> float:
        return value

    def all_of(self, chosen: Sequence[int]) -> list[int]:
        return list(chosen)

    def moved(self) -> bool:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[measuring.Cores]:
    cores = measuring.Cores()
    for module in (measuring, calibrate, operator_times):
        monkeypatch.setattr(module, "CORES", cores)
    monkeypatch.setattr(measuring, "NAP_S", 0.0)
    yield cores


def test_cores_are_alike_up_to_a_factor(cores: measuring.Cores) -> None:
    assert apart(50, 100) == apart(100, 50) == 2 and apart(0, 0) == 1 and apart(0, 50) == float("inf")
    assert cores.alike(50) and cores.alike(0), "nothing counts on it"
    cores.distance_ns = 60
    assert cores.alike(90) and not cores.alike(250) and cores.alike(0), "not known: as before"


def test_this_machine_says_how_far_its_cores_are_apart() -> None:
    code = "from torch_soap import _backend; import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(_backend.core_distance_ns())"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert alone.stdout.strip() == "0"
    distances = [_backend.core_distance_ns() for _ in range(20)]  # others may want the cores
    assert (10 < max(distances) < 100_000) if len(os.sched_getaffinity(0)) > 1 else not any(distances)


def test_samples_of_other_moments_are_taken_again(cores: measuring.Cores) -> None:
    """Cores are elsewhere after the second of four samples, and when it is asked again before the third."""
    samples = iter(range(99))
    together = Moved(False, False, True, True, False)
    assert calm_samples(lambda: next(samples), 3, pace=lambda: 1.0, together=together) == ([0, 2, 3], 1.0)
    assert cores.naps == measuring.NAPS - 1


def test_who_waits_too_long_measures_all_the_same_and_trusts_it_less(cores: measuring.Cores) -> None:
    cores.naps = 3
    values, pace = calm_samples(lambda: 5, 2, pace=lambda: 1.0, together=Moved(True))
    assert values == [5, 5] and pace == measuring.MOVED and cores.naps == 0
    assert measuring.middle([10**6, 10**6], pace).noisy
    assert undisturbed(lambda: "value", Moved(True)) == ("value", MOVED)


def test_a_measurement_is_done_again_where_cores_moved_in_it() -> None:
    tries = iter(range(9))
    assert undisturbed(lambda: next(tries), Moved(False, True, False, False)) == (1, 1.0)


def test_turns_are_taken_in_rounds_and_rounds_of_other_moments_again() -> None:
    order = list[str]()

    def run(name: str, ns: int) -> Any:
        def once() -> int:
            order.append(name)
            return ns

        return once

    timings = timed_in_turns([run("a", 10), run("b", 20)], 2, pace=lambda: 1.0, together=Moved(False, False, False, True, False))
    assert [t.ns for t in timings] == [10, 20]
    assert "".join(order) == "ab" + 3 * "ab", "one to warm up, two, and one for that in which cores moved"


def test_ranks_take_turns_alike() -> None:
    """Another rank wants the second turn once more, and it again for its noise."""
    order = list[str]()
    others = iter([[], [], [1], [], [1]])

    class Two(Moved):
        def all_of(self, chosen: Sequence[int]) -> list[int]:
            return sorted({*chosen, *next(others, [])})

    def run(name: str) -> Any:
        def once() -> int:
            order.append(name)
            return 10**6

        return once

    timed_in_turns([run("a"), run("b")], 2, pace=lambda: 1.0, together=Two(False))
    assert "".join(order) == "ab" + "ab" * 2 + "ab" + "b" + "ab" + "ab", order


def test_a_noisy_turn_is_taken_again_behind_what_it_follows() -> None:
    order, second = list[str](), iter([0, 10**6, 5 * 10**6, *[10**6] * 9])

    def first() -> int:
        order.append("a")
        return 10**6

    def noisy() -> int:
        order.append("b")
        return next(second)

    timings = timed_in_turns([first, noisy], 2, pace=lambda: 1.0)
    assert timings == [Timing(10**6, 0.0), Timing(10**6, 0.0)]
    assert "".join(order) == "ababab" + "b" + "abab"


def test_the_first_turns_are_colder_than_the_rest() -> None:
    turns = [Timing(ns, 0.0) for ns in (100, 60, 20, 20)]
    assert operator_times.mean(turns, 4).ns == 50
    assert operator_times.mean(turns, 8).ns == (200 + 4 * 20) // 8


def test_the_cache_keeps_moments_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SOAP_CACHE", str(tmp_path))
    for distance_ns, mean_ns in ((50, 1), (250, 2), (60, 3)):  # the last takes the first one's place
        cache.save(2, cache.nothing_known(distance_ns) | {"operators": {"op": [mean_ns, mean_ns]}})
    now = [0]

    class Alone:
        rank, world_size = 0, 2

        def gather_ints(self, mine: list[int]) -> list[list[int]]:
            return [mine]

        def gather_objects(self, mine: Any) -> list[Any]:
            return [mine]

    monkeypatch.setattr(_backend, "core_distance_ns", lambda: now[0])
    found = []
    for now[0] in (55, 300, 900):
        known = cache.load(2, Alone())  # type: ignore[arg-type]
        found.append((known["cores_ns"], known["operators"].get("op")))
    assert found == [(60, [3, 3]), (250, [2, 2]), (900, None)]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(self.table(tokens)))).square().mean()  # type: ignore[no-any-return]


def test_operators_are_timed_in_the_order_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards, then backwards the other way round; two layers with one key have a turn each."""
    torch.manual_seed(0)
    graph, captured, rows = graph_for(TwoLayers(), torch.randint(1000, (4, 16)), None, 1)
    program = _C.lower(graph, _C.parse_plan(graph, "* @ [0]", 1), rows)
    order, times = list[str](), iter(range(1, 10**6))

    def in_turns(runs: Any, rounds: int, together: Any) -> list[Timing]:
        assert rounds == ROUNDS and together is None
        for run in runs:
            turn = run.__self__
            order.append(f"{turn.tile.name}{'' if run.__name__ == 'forward' else ' back'}")
            run()
        return [Timing(10**9 + next(times), 0.0) for _ in runs]

    original = Tile.__init__

    def named(self: Any, program: Any, graph: Any, sample: Any) -> None:
        original(self, program, graph, sample)
        self.name = program.graph.nodes[sample.node].target

    monkeypatch.setattr(Tile, "__init__", named)
    monkeypatch.setattr(operator_times, "timed_in_turns", in_turns)
    monkeypatch.setattr(operator_times, "harness", lambda: Timing(0, 0.0))
    samples = _C.CostModel(_C.Machine(1, 1)).missing(program)
    found = time_tiles(program, captured, samples, None)
    forward = [name for name in order if not name.endswith("back")]
    assert forward[:4] == ["embedding", "linear", "relu", "linear"] and len(samples) == len(forward) - 1, "the layers are alike"
    assert order[len(forward) :] == [f"{name} back" for name in reversed(forward)]
    (linear,) = [both for sample, both in zip(samples, found, strict=True) if sample.key.startswith("linear")]
    last = 2 * len(forward)
    assert (linear[0].ns - 10**9, linear[1].ns - 10**9) == ((2 + 4) / 2, (last - 1 + last - 3) / 2)


def test_a_stopwatch_reads_inside_of_the_module() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.neg, (x,)),))
    module = torch.fx.GraphModule(nn.Module(), graph)
    watch, clock = Stopwatch(module), iter([100, 130])
    watch.clock = lambda: next(clock)
    (out,) = module(torch.ones(2))
    assert out.tolist() == [-1, -1] and watch.reading() == 30


def test_indices_are_anywhere_in_a_table() -> None:
    graph, captured, rows = graph_for(TwoLayers(), torch.randint(1000, (4, 64)), None, 1)
    program = _C.lower(graph, _C.parse_plan(graph, "* @ [0]", 1), rows)
    (sample,) = [s for s in _C.CostModel(_C.Machine(1, 1)).missing(program) if s.key.startswith("embedding")]
    indices = next(x for x in Tile(program, captured, sample).inputs if not x.is_floating_point())
    assert indices.unique().numel() > 100 and int(indices.max()) > 900 and int(indices.min()) >= 0
