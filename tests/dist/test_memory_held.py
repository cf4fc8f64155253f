"""Ranks that share memory hold no messages: what the engine holds there is what is predicted (`Machine.packs`). Others: tests/unit/test_memory.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.launch import torchrun


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    done = torchrun(2, "tests.dist.worker_memory", timeout_s=120)
    assert done.returncode == 0 and None not in done.results, done.output
    assert all(result["transport"] == "soap" for result in done.results)
    return done.results


@pytest.mark.parametrize("plan", ["ddp", "zero-2", "zero-3", "megatron", "pipeline"])
def test_ranks_hold_what_is_predicted(ranks: list[dict[str, Any]], plan: str) -> None:
    fullest = max((r["plans"][plan] for r in ranks), key=lambda p: p["measured"])
    assert max(r["plans"][plan]["False"] for r in ranks) == pytest.approx(fullest["measured"], rel=0.03)


def test_messages_would_be_held_where_movements_pack(ranks: list[dict[str, Any]]) -> None:
    zero = ranks[0]["plans"]["zero-3"]
    assert zero["False"] == pytest.approx(zero["measured"], rel=0.01) and zero["True"] > 1.02 * zero["measured"]
