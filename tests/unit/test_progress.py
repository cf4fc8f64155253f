"""A search that tells how far it is, and ends with the best plan so far when it is asked to: by Ctrl-C, on one process or several."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_soap
from tests.unit.planning import graph_of, p100
from torch_soap import _C
from torch_soap.planner import search_plan
from torch_soap.progress import SearchProgress
from torch_soap.runtime import ThreadComm
from torch_soap.runtime.comm import ThreadWorld

PHASES = ["seeds", "optcnn", "descent", "mcmc"]


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """A job in the background starts with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(16, 64), torch.arange(16) % 8


def graph() -> _C.OpGraph:
    return graph_of(model(), *batch(), loss=nn.functional.cross_entropy)


def options(simulations: int = 300, memory_limit: int | None = None) -> _C.SearchOptions:
    out = _C.SearchOptions()
    out.descent_simulations = out.mcmc_simulations = simulations
    if memory_limit is not None:
        out.memory_limit_bytes = memory_limit
    return out


def search(observer: Callable[[_C.Progress], bool] | None, **how: Any) -> _C.SearchResult:
    return _C.search(graph(), [4] * 4, _C.CostModel(p100(4)), options(**how), observer, every_ms=0)


def test_the_observer_sees_every_simulation_and_changes_nothing() -> None:
    told: list[tuple[str, int, int, int]] = []
    watched = search(lambda p: told.append((p.phase, p.simulations, p.budget, p.best_ns)) or True)
    alone = search(None)
    assert watched.candidates[watched.best].strategy == alone.candidates[alone.best].strategy and watched.simulations == alone.simulations
    assert [count for _, count, _, _ in told] == list(range(1, watched.simulations + 1))
    assert list(dict.fromkeys(phase for phase, _, _, _ in told)) == PHASES
    assert all(count <= budget for _, count, budget, _ in told)
    best = [ns for _, _, _, ns in told if ns >= 0]
    assert best == sorted(best, reverse=True)
    assert not watched.interrupted


def test_the_result_has_the_curve() -> None:
    result = search(None)
    points = [(p.simulations, p.best_ns) for p in result.progress]
    assert points == sorted(points, key=lambda p: (p[0], -p[1])) and 2 <= len(points) <= 257
    assert points[-1] == (result.simulations, result.candidates[result.best].step_ns)
    assert points[0][0] == 1 and points[0][1] == result.candidates[0].step_ns
    assert [p for p in PHASES if p in {q.phase for q in result.progress}] == PHASES


@pytest.mark.parametrize("stop_at", [1, 5, 30, 200])
def test_it_ends_when_told_with_a_legal_plan(stop_at: int) -> None:
    result = search(lambda p: p.simulations < stop_at, simulations=100_000)
    best = result.candidates[result.best]
    assert result.interrupted and result.simulations <= stop_at + 4 * 33  # a round of four chains
    program = _C.lower(graph(), best.strategy, [4] * 4)
    assert _C.simulate(program, _C.CostModel(p100(4))).step_ns == best.step_ns == min(c.step_ns for c in result.candidates if c.step_ns >= 0)


def test_it_goes_on_until_something_fits() -> None:
    everything = search(None)
    ddp, smallest = everything.candidates[0], min(everything.candidates, key=lambda c: c.memory_bytes)
    assert smallest.memory_bytes < ddp.memory_bytes
    limit = ddp.memory_bytes - 1  # what is priced first doesn't fit
    result = search(lambda p: False, memory_limit=limit)
    best = result.candidates[result.best]
    assert result.interrupted and best.fits and best.memory_bytes <= limit
    with pytest.raises(ValueError, match="interrupted before anything was found that fits"):
        search(lambda p: False, memory_limit=1)


def test_what_the_observer_raises_ends_the_search() -> None:
    def observer(_: _C.Progress) -> bool:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        search(observer)


def endless(of: _C.OpGraph) -> _C.SearchOptions:
    """Starts enough for a minute: the walks end by themselves when they have no luck."""
    out = options()
    out.starts = [("ddp", _C.seeds(of, 4)[0][1])] * 100_000
    return out


def press(times: int) -> None:
    """Ctrl-C on this process, from another thread, after 0.2 s."""

    def run() -> None:
        for _ in range(times):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=run, daemon=True).start()


def test_ctrl_c_reaches_a_search_without_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    with SearchProgress(None) as progress:
        searched = graph()
        without_end = endless(searched)
        press(1)
        result = _C.search(searched, [4] * 4, _C.CostModel(p100(4)), without_end, progress)
    assert progress.interrupted and result.interrupted and result.candidates[result.best].step_ns > 0
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_ends_all() -> None:
    class Deaf(SearchProgress):
        def __call__(self, now: _C.Progress) -> bool:
            return True

    with pytest.raises(KeyboardInterrupt), Deaf(None) as progress:
        searched = graph()
        without_end = endless(searched)
        press(2)
        _C.search(searched, [4] * 4, _C.CostModel(p100(4)), without_end, progress)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_stays() -> None:
    def own(*_: Any) -> None: ...

    before = signal.signal(signal.SIGINT, own)
    try:
        with SearchProgress(None):
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, simulations: int) -> None:
    def call(self: SearchProgress, now: _C.Progress) -> bool:
        self.interrupted |= now.simulations >= simulations
        return not self.interrupted

    monkeypatch.setattr(SearchProgress, "__call__", call)


def test_plan_says_that_it_was_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = p100(4)
    whole = torch_soap.plan(model(), batch(), loss=nn.functional.cross_entropy, machine=machine)
    assert not whole.stats["interrupted"] and whole.stats["chains"] >= 1 and whole.stats["search_seconds"] > 0 and whole.stats["capture_seconds"] > 0
    assert whole.stats["progress"][-1] == [whole.stats["simulations"], whole.predicted["step_time_ns"], "mcmc"]
    assert capsys.readouterr().err == ""  # no terminal, no bar
    interrupt_after(monkeypatch, 1)
    plan = torch_soap.plan(model(), batch(), loss=nn.functional.cross_entropy, machine=machine)
    assert plan.stats["interrupted"] and plan.stats["simulations"] < whole.stats["simulations"]
    said = capsys.readouterr().err
    assert said.startswith("[plan] interrupted: the best plan after") and said.count("\n") == 1
    assert torch_soap.verify(model(), batch(), plan, loss=nn.functional.cross_entropy, steps=1).ok


@pytest.mark.parametrize("pressed_on", [0, 1])
def test_all_ranks_get_the_same_plan(pressed_on: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Pressed on rank 0 while it searches; on another rank before, which all hear of when they next meet."""
    if pressed_on == 0:
        interrupt_after(monkeypatch, 1)
    else:
        real = SearchProgress.__enter__

        def enter(self: SearchProgress) -> SearchProgress:
            self.interrupted = self.comm is not None and self.comm.rank == 1
            return real(self)

        monkeypatch.setattr(SearchProgress, "__enter__", enter)
    world, op_graph, plans = ThreadWorld(2), graph(), {}

    def rank(number: int) -> None:
        plans[number] = search_plan(op_graph, None, [8, 8], comm=ThreadComm(world, number), machine=p100(2))  # type: ignore[arg-type]

    threads = [threading.Thread(target=rank, args=(r,)) for r in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert plans[0].text == plans[1].text and plans[0].stats["interrupted"] and plans[1].stats["interrupted"]
    assert capsys.readouterr().err.count("[plan] interrupted") == 1


def test_a_later_search_that_is_interrupted_keeps_what_was_found() -> None:
    """The second search ends at its first seed; the first one's plan is better and stays."""
    from torch_soap.planner import searched

    op_graph, rows, cost = graph(), [4] * 4, _C.CostModel(p100(4))
    progress = SearchProgress(None)
    first = searched(op_graph, rows, cost, options(), None, progress)
    assert first["step_ns"] < first["seeds"]["ddp"]["step_time_ns"]
    progress.interrupted = True
    second = searched(op_graph, rows, cost, options(), None, progress, first)
    assert second["step_ns"] == first["step_ns"] and second["plan"] == first["plan"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with SearchProgress(None) as progress:
        result = _C.search(graph(), [4] * 4, _C.CostModel(p100(4)), options(), progress, every_ms=0)
    text = terminal.getvalue()
    assert all(f"plan: {phase}" in text for phase in PHASES)
    assert f"{result.simulations - 1}/" in text and "simulations, best step" in text
