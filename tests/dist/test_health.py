"""A training knows how far off its prediction was, names what is, and can plan anew; plans can be tried before one stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist.launch import torchrun


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("cache")
    done = torchrun(2, "tests.dist.worker_health", timeout_s=240, env={"TORCH_SOAP_CACHE": str(folder)})
    assert done.returncode == 0 and None not in done.results, done.output
    return done.results


def test_all_ranks_are_told_the_same(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["health"]["right"] == ranks[1]["health"]["right"]
    assert ranks[0]["health"]["rows"] == ["step", "matmul", "other", "pointwise", "all_reduce of 2 ranks within a host"]


def test_the_next_search_is_told_how_far_off_this_one_was(ranks: list[dict[str, Any]]) -> None:
    (noted,) = ranks[0]["health"]["noted"]
    assert noted >= 0


def test_a_wrong_operator_family_is_named(ranks: list[dict[str, Any]]) -> None:
    """Three times too fast in the figures: the one suspect; backward is attributed, so not three to the point."""
    (suspect,) = ranks[0]["health"]["matmul"]
    assert suspect[0] == "matmul" and suspect[1] == pytest.approx(3, rel=0.4)


def test_a_wrong_link_is_named(ranks: list[dict[str, Any]]) -> None:
    """Four times too slow in the figures."""
    (suspect,) = ranks[0]["health"]["links"]
    assert suspect[0] == "all_reduce of 2 ranks within a host" and suspect[1] == pytest.approx(1 / 4, rel=0.1)


def test_training_goes_on_under_the_new_plan(ranks: list[dict[str, Any]]) -> None:
    """Parameters, and AdamW's state, move: losses are those of one process."""
    mean = [(a + b) / 2 for a, b in zip(*(r["health"]["losses"] for r in ranks), strict=True)]
    assert ranks[0]["health"]["after"].startswith("param:0.weight  d0=2\n")
    assert mean == pytest.approx(ranks[0]["health"]["reference"], rel=1e-4)


def test_a_trial_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    """Parameters, buffers, losses and random numbers are to the bit those of a training on the same plan without one."""
    assert len(ranks[0]["trial"]["trial"]) >= 2
    assert ranks[0]["trial"]["plan"] == ranks[1]["trial"]["plan"]
    assert all(r["trial"]["equal"] for r in ranks)
