"""What one step has at one time: values, gradients, and the graphs of its segments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.autograd.graph import GradientEdge

from torch_soap.random import CounterState


@dataclass
class StepState:
    """What a forward leaves for its backward."""

    values: dict[int, torch.Tensor] = field(default_factory=dict)
    leaves: dict[int, dict[int, torch.Tensor | GradientEdge]] = field(default_factory=dict)  # segment -> value -> where it enters its autograd graph
    outputs: dict[int, dict[int, tuple[GradientEdge, torch.dtype]]] = field(default_factory=dict)  # segment -> value -> its place in that graph
    grads: dict[int, torch.Tensor] = field(default_factory=dict)
    sums: set[int] = field(default_factory=set)  # values whose gradient is a sum made here, to which more is added in place
    copies: dict[int, torch.Tensor] = field(default_factory=dict)  # gathered parameters whose storage is given back until backward
    random: CounterState | None = None
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)  # around the forward
    versions: dict[int, int] = field(default_factory=dict)  # of the values that backward computes again on
    position: int = 0  # next instruction
    retain_graph: bool = False
    deferred: bool = False  # the gradient fills of parameters are left out

    def copy(self) -> StepState:
        """For a backward after which another one may come."""
        return replace(
            self, values=dict(self.values), leaves=dict(self.leaves), outputs=dict(self.outputs), grads=dict(self.grads), copies=dict(self.copies), sums=set()
        )
