from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from tests.dist.launch import ROOT, revision

LONG = 1000  # cases from which on a report is written
RESULTS = ROOT / "benchmarks" / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=300, help="random plans to try")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """`make test-long` leaves its report in benchmarks/results."""
    cases = config.getoption("--cases")
    if cases < LONG:
        return
    ended = {how: [r.nodeid for r in terminalreporter.stats.get(how, []) if "test_random_plan[" in r.nodeid] for how in ("passed", "failed")}
    if ended["passed"] or ended["failed"]:
        write_report(cases, len(ended["passed"]), [name.split("[")[-1].rstrip("]") for name in ended["failed"]], revision())


def write_report(cases: int, passed: int, failed: list[str], of: str) -> None:
    lines = [
        "# Random plans against one process",
        "",
        f"`make test-long`: {cases} random (module, plan, 1-8 ranks, rows, values), each 2 steps in float64 against the plain module, bound 1e-10: "
        f"{passed} exact, {len(failed)} failures. Revision {of}, torch {torch.__version__}, {platform.machine()}.",
        *(f"- {name}" for name in failed),
    ]
    (RESULTS / "random_plans.md").write_text("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
