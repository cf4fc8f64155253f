"""Beside a user's gloo our tensors go over shared memory, unless told otherwise; what was measured over one isn't taken for the other."""

from __future__ import annotations

import pytest

from tests.dist.launch import Outcome, torchrun


def run(transport: str, **env: str) -> Outcome:
    done = torchrun(3, "tests.dist.worker_transports", transport, timeout_s=120, env=env)
    assert done.returncode == 0 and None not in done.results, done.output
    return done


def test_sums_are_the_same_on_all_ranks_over_either_transport_and_each_has_a_cache() -> None:
    soap, gloo = run("soap"), run("gloo", TORCH_SOAP_TRANSPORT="gloo")
    for done in (soap, gloo):
        assert done.results[0] == done.results[1] == done.results[2]
    assert soap.results[0]["cache"] != gloo.results[0]["cache"]
    assert soap.results[0]["alone"] == gloo.results[0]["alone"]  # one process moves nothing


def test_a_transport_that_there_is_not() -> None:
    done = torchrun(1, "tests.dist.worker_transports", "soap", timeout_s=60, env={"TORCH_SOAP_TRANSPORT": "nccl"})
    assert done.returncode != 0 and "TORCH_SOAP_TRANSPORT is 'nccl': soap or gloo" in done.output


@pytest.mark.parametrize("ranks", [2, 3])
def test_movements_without_packing_are_the_same_to_the_bit(ranks: int) -> None:
    done = torchrun(ranks, "tests.dist.worker_movements")
    assert done.returncode == 0 and all(r is not None for r in done.results), done.output
    assert [r["wrong"] for r in done.results] == [[]] * ranks
    assert all(r["taken"] > 10 and r["copied"] == [] for r in done.results), done.results
