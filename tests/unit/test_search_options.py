"""Searches that count no memory, and those that don't end for want of luck."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.planning import graph_of, p100
from torch_soap import _C

ROWS = [8] * 4


def graph() -> _C.OpGraph:
    return graph_of(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)), torch.randn(sum(ROWS), 64))


def options(**changes: object) -> _C.SearchOptions:
    out = _C.SearchOptions()
    out.descent_simulations, out.mcmc_simulations, out.chains = 0, 2000, 2
    for name, value in changes.items():
        setattr(out, name, value)
    return out


def test_without_memory_the_times_are_the_simulators() -> None:
    ops, cost = graph(), _C.CostModel(p100(4))
    counted, free = (_C.search(ops, ROWS, cost, options(count_memory=counts)) for counts in (True, False))
    for candidate in free.candidates:
        assert candidate.memory_bytes == -1 and candidate.fits
        if candidate.step_ns >= 0:
            assert candidate.step_ns == _C.simulate(_C.lower(ops, candidate.strategy, ROWS), cost).step_ns, candidate.name
    assert [(c.name, c.step_ns) for c in free.candidates] == [(c.name, c.step_ns) for c in counted.candidates]
    assert all(c.memory_bytes > 0 for c in counted.candidates if c.step_ns >= 0)


def test_a_limit_on_memory_that_is_not_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="a memory limit of 1000 bytes, and memory isn't counted"):
        _C.search(graph(), ROWS, _C.CostModel(p100(4)), options(count_memory=False, memory_limit_bytes=1000))


def test_a_search_may_go_on_to_its_budget() -> None:
    ops, cost = graph(), _C.CostModel(p100(4))
    early, whole = (_C.search(ops, ROWS, cost, options(stops_early=stops)) for stops in (True, False))
    assert 256 <= early.simulations < 2000 <= whole.simulations
    assert whole.candidates[whole.best].step_ns <= early.candidates[early.best].step_ns
