"""Parameters that forward writes: exact where the writes can be traced (cases `max_norm`, `clamped`), refused where not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_soap.capture import capture


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear.weight.data.clamp_(-0.1, 0.1)
        return self.linear(x)


def test_a_write_that_cannot_be_traced_is_refused() -> None:
    module = Clamped()
    before = module.linear.weight.detach().clone()
    with pytest.raises(ValueError, match=r"forward writes the parameter model\.linear\.weight, in code that can't be traced"):
        capture(module, (torch.randn(2, 4),))
    assert torch.equal(module.linear.weight, before)


def test_checking_leaves_the_parameters_as_they_were() -> None:
    table = nn.Embedding(5, 3, max_norm=0.5)
    before = table.weight.detach().clone()
    captured = capture(table, (torch.randint(5, (2, 4)),))
    assert captured.opaque == [] and captured.exact
    assert torch.equal(table.weight, before)
