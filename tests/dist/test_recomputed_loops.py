"""Recomputation on two real processes: training loops give the bits of the same plan without it."""

from __future__ import annotations

import functools

import pytest

from tests.dist.launch import Outcome, torchrun
from tests.dist.worker_recompute import CHECKS


@functools.cache
def outcome() -> Outcome:
    return torchrun(2, "tests.dist.worker_recompute")


@pytest.mark.parametrize("name", CHECKS)
def test_bits_are_the_same(name: str) -> None:
    done = outcome()
    for rank, results in enumerate(done.results):
        assert results is not None and name in results, f"rank {rank} did not come to {name}\n{done.output}"
        assert results[name] == 0.0, f"rank {rank}: {results[name]}"
