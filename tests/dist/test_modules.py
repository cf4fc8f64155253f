"""Parametrizations, tables that are written or have sparse gradients, bfloat16: on two real processes."""

from __future__ import annotations

import functools

import pytest

from tests.dist.launch import Outcome, torchrun
from tests.dist.worker_modules import CHECKS

BOUND = 1e-10


@functools.cache
def outcome() -> Outcome:
    return torchrun(2, "tests.dist.worker_modules")


@pytest.mark.parametrize("name", CHECKS)
def test_as_in_one_process(name: str) -> None:
    done = outcome()
    for rank, results in enumerate(done.results):
        assert results is not None and name in results, f"rank {rank} did not come to {name}\n{done.output}"
        assert isinstance(results[name], float), f"rank {rank}: {results[name]}"
        assert results[name] <= BOUND, f"rank {rank}: difference {results[name]}"
