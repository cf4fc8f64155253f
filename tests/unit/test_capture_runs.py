"""What capture can't look into still runs as a part of a plan, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.test_capture import Branches, Counts, Custom, Writes, around
from torch_soap.capture import capture
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
