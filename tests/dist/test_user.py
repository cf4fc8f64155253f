"""What users do to a parallelized model, on two real processes: optimizers, checkpoints, modes, structures, refusals."""

from __future__ import annotations

import functools

import pytest

from tests.dist.launch import Outcome, torchrun
from tests.dist.worker_user import CHECKS

BOUND = 1e-10


@functools.cache
def outcome() -> Outcome:
    return torchrun(2, "tests.dist.worker_user")


@pytest.mark.parametrize("name", CHECKS)
def test_as_in_one_process(name: str) -> None:
    done = outcome()
    for rank, results in enumerate(done.results):
        assert results is not None and name in results, f"rank {rank} did not come to {name}\n{done.output}"
        assert isinstance(results[name], float), f"rank {rank}: {results[name]}"
        assert results[name] <= BOUND, f"rank {rank}: difference {results[name]}"
