"""Training steps against peers: `pytest benchmarks/test_training_speed.py` runs what is missing of the sweep (benchmarks/training_speed.py) and writes
benchmarks/results/training_speed.{md,json,png}.

Asserts only what must hold on any machine: every launch runs, and contenders train alike. The bars are in the table.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import training_speed, training_table
from benchmarks.training_models import MODELS
from tests.dist.launch import torchrun

ALIKE = 1e-3  # of how far losses have gone: sums in float32 in other orders


@pytest.mark.parametrize("backend", training_speed.BACKENDS)
def test_small_contenders_train_alike(backend: str) -> None:
    done = torchrun(2, "benchmarks.worker_contenders", backend, timeout_s=300)
    assert done.returncode == 0, done.output
    for name, errors in done.results[0].items():
        assert errors and max(errors.values()) < ALIKE, f"{name}: {errors}"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    every = list(MODELS), list(training_speed.RANKS), list(training_speed.NETWORKS), list(training_speed.BACKENDS)
    training_speed.sweep(*every, rounds=training_speed.ROUNDS, resume=True)
    return training_speed.read_rows()


def row_of(ours: list[float], peer: list[float]) -> dict[str, Any]:
    return {"contenders": {"ours": {"ms": ours, "losses": [1.0]}, "DDP 25 MB": {"ms": peer, "losses": [1.0]}, "one process": {"ms": [3.0], "losses": [1.0]}}}


def test_ratio_holds() -> None:
    """By hand: all pairs are as fast, 5 % slower (too much, as nothing says it's less) and 10 % slower but for noise that is as large."""
    assert training_table.paired(row_of([2.0] * 30, [2.0] * 30), "ours", "DDP 25 MB") == {"median": 1, "low": 1, "high": 1, "rounds": 30, "holds": True}
    assert not training_table.figures(row_of([2.1] * 30, [2.0] * 30))["peer"]["holds"]
    assert not training_table.figures(row_of([1.0, 2.2] * 15, [1.0, 2.0] * 15))["peer"]["holds"]
    assert training_table.figures(row_of([1.0, 2.2, 1.0] * 10, [1.0, 2.0, 1.0] * 10))["peer"]["holds"]


def test_pairs_are_of_the_same_round() -> None:
    """A peer that left, or rounds in which all were slow, don't shift the ratio."""
    ratio = training_table.paired({"contenders": {"a": {"ms": [1.0, 10.0, 3.0]}, "b": {"ms": [2.0, 20.0, None]}}}, "a", "b")
    assert ratio is not None and (ratio["median"], ratio["rounds"]) == (0.5, 2)


def test_table() -> None:
    """A row that is complete, and one of a launch that failed."""
    head = {"model": "gpt", "ranks": 2, "network": "1gbit", "backend": "soap", "machine": "m", "revision": "r"}
    more = {"rows": 4, "plan": ["* n=fed"], "chosen": "ddp", "predicted_ms": 2.0, "left_out": {"FSDP2": "needs 2 MiB, 1 are there"}}
    lines = training_table.table([head | more | row_of([2.2] * 30, [2.0] * 30), {**head, "model": "mlp", "failed": "a\nb"}])
    assert "| gpt, 4 | 3 | 2 | - | - | - | - | 2 | - | 0.91 | **1.10 (1.10-1.10)** DDP 25 MB | - | - | 0e+00, 0e+00 | 30 |" in lines
    assert any("Not slower than the best peer: 0 of 1" in line and "Left out: gpt: FSDP2 (needs 2 MiB" in line for line in lines)
    assert any("mlp on 2 ranks, 1gbit, soap, failed: b" in line for line in lines)


def test_contenders_train_alike(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        where = f"{row['model']} on {row['ranks']} ranks, {row['network']}, {row['backend']}"
        assert "contenders" in row, f"{where}: {row['failed']}"
        for name, error in training_table.loss_errors(row).items():
            if name == "ours" or row["model"] not in training_table.LOCAL_STATISTICS:
                assert error < ALIKE, f"{where}: {name} is {error:.1e} of its loss' way from one process'"


def test_write_table(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    lines = training_table.write(rows)
    with capsys.disabled():
        print("\n".join(["", *lines]))
