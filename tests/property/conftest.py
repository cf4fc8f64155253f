from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=300, help="random plans to try")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
