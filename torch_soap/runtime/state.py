"""What one step has at one time: values, gradients, and the graphs of its segments."""

from __future__ import annotations

from typing import Self

import torch

from torch_soap import _backend
from torch_soap.random import CounterState


class StepState(_backend.State):
    """What a forward leaves for its backward.

    Attributes:
        autocast: around the forward.
        versions: of the values that backward computes again on.
        position: next instruction.
    """

    random: CounterState | None = None
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    position = 0

    def of(self, random: CounterState | None, autocast: tuple[bool, torch.dtype]) -> Self:
        self.random, self.autocast = random, autocast
        self.versions: dict[int, int] = {}
        return self

    def copy(self) -> StepState:
        """For a backward after which another one may come."""
        out = StepState(self).of(self.random, self.autocast)
        out.versions, out.position = self.versions, self.position
        return out
