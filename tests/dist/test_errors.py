"""Ranks that disagree are told, on all ranks, within the timeout, with the rank and the first difference in the message."""

from __future__ import annotations

import pytest

from tests.dist.launch import Outcome, torchrun
from tests.dist.worker_errors import TIMEOUT_S

# scenario -> what the message says besides the rank
EXPECTED = {
    "shape": ["shape", "[2, 5, 6]", "[2, 5, 5]"],
    "dtype": ["float64", "float32"],
    "dims": ["inputs"],
    "mode": ["mode", "train", "eval"],
    "grad": ["grad", "True", "False"],
    "unsynced": ["no_sync", "True", "False"],
    "wider": ["parameter 0.weight", "(7, 5)", "(6, 5)"],
    "frozen": ["parameter 0.bias", "True", "False"],
    "arguments": ["example_inputs", "given", "none"],
    "order": ["model"],
    "order_back": ["different models"],
    "plans": ["plan", "n=fed", "o=2"],
}


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """All of them in one launch: after an error on all ranks the process group still works."""
    return torchrun(2, "tests.dist.worker_errors", *EXPECTED, "illegal", timeout_s=180)


def seen_in(outcome: Outcome, scenario: str) -> list[dict[str, object]]:
    for results in outcome.results:
        assert results is not None and scenario in results, outcome.output
    return [results[scenario] for results in outcome.results]


@pytest.mark.parametrize("scenario", EXPECTED)
def test_disagreement_is_told_on_all_ranks(outcome: Outcome, scenario: str) -> None:
    for rank, seen in enumerate(seen_in(outcome, scenario)):
        assert seen["type"] == "RankMismatchError", f"rank {rank}: {seen}"
        for text in ["rank 1", *EXPECTED[scenario]]:
            assert text in seen["message"], f"rank {rank}: {seen['message']}"
        assert seen["seconds"] < TIMEOUT_S + 5


def test_illegal_plan_changes_nothing(outcome: Outcome) -> None:
    for seen in seen_in(outcome, "illegal"):
        assert seen["type"] == "ValueError", seen
        assert "line 2" in seen["message"] and "7" in seen["message"]


def test_missing_rank_is_named() -> None:
    seen = seen_in(torchrun(2, "tests.dist.worker_errors", "absent", timeout_s=120), "absent")[0]
    assert "[1]" in seen["message"] and "did not come" in seen["message"] and "for validation too" in seen["message"], seen
    assert seen["seconds"] < TIMEOUT_S + 5


def test_groups_of_some_ranks() -> None:
    for seen in seen_in(torchrun(3, "tests.dist.worker_errors", "pairs", timeout_s=120), "pairs"):
        assert seen["type"] == "none", seen
