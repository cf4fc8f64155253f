"""What capture can't look into still runs as a part of a plan, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.unit.test_capture import Branches, Counts, Custom, Writes, around
from torch_soap.verify import verify


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
