"""When plans are tried though nobody asked: where the simulator is less certain than the best plan's lead."""

from __future__ import annotations

import pytest

from torch_soap import _C
from torch_soap.measuring import known_error
from torch_soap.plan import Plan
from torch_soap.planner import lead
from torch_soap.trial import STEPS, steps_wanted


def plan_with(**stats: float) -> Plan:
    return Plan(strategy=_C.Strategy(2), text="", stats=stats)


@pytest.mark.parametrize(
    ("asked", "stats", "steps"),
    [
        (None, {"known_error": 0.10, "lead": 0.04}, STEPS),
        (None, {"known_error": 0.03, "lead": 0.04}, 0),
        (None, {}, 0),
        (0, {"known_error": 0.10, "lead": 0.04}, 0),
        (7, {"known_error": 0.0, "lead": 1.0}, 7),
    ],
)
def test_steps(asked: int | None, stats: dict[str, float], steps: int) -> None:
    assert steps_wanted(plan_with(**stats), asked) == steps


def test_lead_is_over_another_kind() -> None:
    """Plans that are predicted alike are one kind."""
    assert lead([("ddp", 1_000_000), ("descent", 1_000_100), ("megatron", 1_100_000)]) == pytest.approx(0.1)
    assert lead([("ddp", 1_000_000)]) == float("inf")


def test_known_error_is_what_training_or_the_repeats_say() -> None:
    marks = {"operators/a": [0.0, 0, 1], "operators/b": [0.4, 0, 1], "operators/c": [0.5, 0, 1]}
    assert known_error({"marks": marks}) == 0.4
    assert known_error({"marks": marks, "error": 0.6}) == 0.6
