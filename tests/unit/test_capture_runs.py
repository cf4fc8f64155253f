"""What capture can't look into still runs as a part of a plan, exactly."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.unit.test_capture import Branches, Counts, Custom, Writes, around
from torch_soap.capture import capture
from torch_soap.capture.interpret import run_graph
from torch_soap.verify import verify


class Undecided(nn.Module):
    """A branch on data: no trace. Rows don't depend on each other unless `coupled`."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.linear, self.coupled = nn.Linear(4, 4), coupled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if bool((y.abs() > 1e6).any()):
            return y * 0
        return torch.tanh(y - y.mean(0)) if self.coupled else torch.tanh(y)


def test_opaque_rows_are_split_where_whole_and_split_runs_agree() -> None:
    x = torch.randn(5, 4)
    captured = capture(around(Undecided(coupled=False)), (x,))
    assert captured.opaque == ["child"] and captured.rows_apart and not captured.exact
    report = verify(around(Undecided(coupled=False)), (x,), "first o=2\nchild n=[0,1,5]\n* n=fed", world_size=2)
    assert report.ok, str(report)


def test_opaque_rows_that_depend_on_each_other_stay_together() -> None:
    x = torch.randn(5, 4)
    captured = capture(around(Undecided(coupled=True)), (x,))
    assert captured.opaque == ["child"] and not captured.rows_apart and captured.exact
    assert any("run whole" in r for r in captured.reasons), captured.reasons
    with pytest.raises(ValueError, match="can only be placed or replicated"):
        verify(around(Undecided(coupled=True)), (x,), "child o=2", world_size=2)
    report = verify(around(Undecided(coupled=True)), (x,), "* n=fed", world_size=2)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("module", "width", "plan"),
    [
        (Custom, 4, "a o=2\nb i=2"),  # custom autograd.Functions
        (lambda: around(Branches()), 4, "first n=fed\nlast o=2"),  # an opaque child with batch norm
        (Branches, 4, ""),  # all of it opaque
        (lambda: Writes("two views"), 6, "linear o=2"),
        (Counts, 4, "* n=fed"),
    ],
)
def test_opaque_operators_and_writes_in_a_plan(module: type[nn.Module], width: int, plan: str) -> None:
    torch.manual_seed(0)
    report = verify(module(), (torch.randn(4, width),), plan, world_size=2, steps=2)
    assert report.ok, str(report)


class Router(nn.Module):
    """What a mixture of experts does: sizes as Python numbers, read from data."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        expert = (x[:, 0] > 0).long()
        count = int(expert.sum())
        return x[expert.sort()[1]], [len(x) - count, count if count >= 0 else 0]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, sizes = self.router(x)
        return torch.cat([expert(part) for expert, part in zip(self.experts, x.split(sizes), strict=True)])


def test_numbers_that_an_opaque_child_returns_are_not_baked() -> None:
    torch.manual_seed(0)
    module, x = around(Experts()), torch.randn(6, 4)
    captured = capture(module, (x,))
    assert captured.opaque == ["child"], captured.reasons
    assert any("child.router" in r and "as on the example" in r for r in captured.reasons), captured.reasons
    assert verify(module, (x,), "first o=2\nlast i=2", world_size=2).ok
    for other in (-x, x * x + 1):
        graph = captured.instantiate((other,))
        assert torch.equal(run_graph(graph, captured.stored_tensors(graph) | {"in:0": other})[0][0], module(other))


def test_a_number_that_changes_later_is_an_error() -> None:
    class Larger(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
            return x * 2, bool(x.max() > 100)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.larger = Larger()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, large = self.larger(x)
            return y / 100 if large else y

    x = torch.randn(6, 4)
    captured = capture(Scaled(), (x,))
    assert captured.opaque == ["larger"], captured.reasons
    graph = captured.instantiate((x,))
    with pytest.raises(RuntimeError, match="Larger is opaque and returned True, not False"):
        run_graph(graph, {"in:0": x + 200})


def test_a_module_without_forward_is_opaque_with_its_caller() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router()

        def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
            return self.router(x)

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, sizes = self.pair.halves(x)
            return torch.cat([x[: sizes[0]], x[sizes[0] :] * 2])

    captured = capture(around(Caller()), (torch.randn(6, 4),))
    assert captured.opaque == ["child"], captured.reasons


def test_replicas_of_what_is_opaque_and_random_are_equal() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.dropout(self.linear(x), 0.5)
            return y * random.random() if bool((y.abs() < 1e6).all()) else y

    report = verify(around(Drops()), (torch.randn(4, 4),), "first n=fed\nchild replicas=2\nlast n=fed", world_size=2)
    assert report.differences and not report.failures, str(report)
