"""The autograd graph of one segment: where values enter it, and its backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge

from torch_soap.runtime.state import StepState

_enter: Any = torch._C._functions.DelayedError  # type: ignore[attr-defined]
_anchor = torch.empty(0, requires_grad=True)


def stand_in_for(grad: torch.Tensor) -> torch.Tensor:
    """Zeros of its shape, without memory."""
    return torch.zeros(1, dtype=grad.dtype).expand(grad.shape)


def entering(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors as results of one node of autograd, whose edges take their gradients. A leaf would hold its memory as long as the graph is there; of
    these the graph holds what its operators save. The node itself is never run: gradients end there."""
    with torch.enable_grad():
        return tuple(_enter("[engine] backward went beyond a segment", len(tensors) + 1)(_anchor, *tensors)[1:])


def run_backward(
    state: StepState,
    leaves: dict[int, torch.Tensor | GradientEdge],
    outputs: dict[int, tuple[GradientEdge, torch.dtype]],
    add: Callable[[int, torch.Tensor], None],
) -> None:
    """Takes the gradients of `outputs` out of the state, and gives those of `leaves` to `add`."""
    edges, grads = [], []
    for value, (edge, dtype) in outputs.items():
        if value in state.grads:
            edges.append(edge)
            grads.append(state.grads.pop(value).to(dtype))
    if not edges or not leaves:
        return

    def as_it_comes(value: int, grad: torch.Tensor) -> torch.Tensor:  # those of a whole segment are never there beside their sums
        add(value, grad)
        return stand_in_for(grad)

    known = {v: leaf for v, leaf in leaves.items() if v in state.grads and isinstance(leaf, torch.Tensor)}
    handles = [leaf.register_hook(partial(as_it_comes, v)) for v, leaf in known.items()]
    # As torch.autograd.grad(edges, leaves, grads, retain_graph=..., allow_unused=True), whose checks of its arguments take as long as a small segment.
    results = Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
        tuple(edges), tuple(grads), state.retain_graph, False, tuple(leaves.values()), allow_unreachable=True, accumulate_grad=False
    )
    for handle in handles:
        handle.remove()
    for value, result in zip(leaves, results, strict=True):
        if result is not None and value not in known:
            add(value, result)
