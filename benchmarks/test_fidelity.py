"""How right the simulator is: `make benchmark` runs what is missing of the sweep (benchmarks/fidelity.py) and writes benchmarks/results/fidelity.{md,json}.

Asserts only what must hold on any machine: every launch runs, and plans of a model train alike. The bars are in the table.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import fidelity
from benchmarks.fidelity_models import MODELS


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    fidelity.sweep(list(MODELS), list(fidelity.RANKS), list(fidelity.NETWORKS), rounds=2, steps=5, resume=True)
    return fidelity.read_rows()


def test_kendall_tau() -> None:
    """By hand: of six pairs one is the other way round, and one is a tie in the prediction."""
    assert fidelity.kendall_tau([1.0, 2.0, 3.0], [5.0, 6.0, 7.0]) == pytest.approx(1.0)
    assert fidelity.kendall_tau([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx((4 - 1) / (5 * 6) ** 0.5)
    assert fidelity.kendall_tau([1.0, 2.0, 3.0], [5.0, 4.9, 7.0], [0.1, 0.2, 0.0]) == pytest.approx(1.0), "the first two are within the noise"
    assert fidelity.kendall_tau([1.0, 2.0, 3.0], [5.0, 4.7, 7.0], [0.1, 0.2, 0.0]) == pytest.approx(1 / 3)


def test_plans_train_alike(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert "plans" in row, f"{row['model']} on {row['ranks']} ranks, {row['network']}: {row['failed']}"
        losses = {label: plan["first_loss"] for label, plan in row["plans"].items()}
        assert list(losses.values()) == pytest.approx([losses["found"]] * len(losses), rel=1e-3), f"{row['model']}: {losses}"


def test_write_table(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    lines = fidelity.write(rows)
    with capsys.disabled():
        print("\n".join(["", *lines]))
