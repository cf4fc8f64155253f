"""What users do to a parallelized model, on two real processes: optimizers, checkpoints, modes, structures, refusals."""

from __future__ import annotations

import functools

import pytest

from tests.dist.launch import Outcome, torchrun
from tests.dist import worker_loops, worker_user

BOUND = 1e-10


@functools.cache
def outcome(worker: str) -> Outcome:
    return torchrun(2, worker)


@pytest.mark.parametrize("worker,name", [(w.__name__, name) for w in (worker_user, worker_loops) for name in w.CHECKS])
def test_as_in_one_process(worker: str, name: str) -> None:
    done = outcome(worker)
    for rank, results in enumerate(done.results):
        assert results is not None and name in results, f"rank {rank} did not come to {name}\n{done.output}"
        assert isinstance(results[name], float), f"rank {rank}: {results[name]}"
        assert results[name] <= BOUND, f"rank {rank}: difference {results[name]}"
