"""A seeded sweep over (module, plan, ranks 1-8, uneven rows, hostile values): every one is exact in float64.

`pytest tests/property --cases N`; a failing case prints the line that runs it again and shrinks it.
"""

from __future__ import annotations

import pytest

from tests.property.sweep import CASES, Setting

NAMES = sorted(CASES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("--cases")
    metafunc.parametrize("index", range(count), ids=[f"{NAMES[i % len(NAMES)]}-{i // len(NAMES)}" for i in range(count)])


def test_random_plan(index: int) -> None:
    name, seed = NAMES[index % len(NAMES)], index // len(NAMES)
    wrong = Setting(name, seed).failure()
    assert not wrong, f"python -m tests.property.sweep {name} {seed}\n{wrong}"
