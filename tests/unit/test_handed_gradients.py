"""Gradients that the engine hands to autograd: hooks of the user see them, and each parameter's is memory of its own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from torch_soap import _backend
from torch_soap.runtime.deferred import hooks_of
from torch_soap.runtime.watch import GradientWatch

SHAPES = [[4, 1], [4]]


def backward(watch: GradientWatch, p: nn.Parameter, ours: bool = True) -> None:
    grad = torch.full_like(p, 2.0)
    watch.core.expect(watch.indices(["param:p"]), [grad if ours else None])
    torch.autograd.backward([p], [grad])


@pytest.mark.parametrize("when", ["before", "once before, again after", "after"])
def test_hooks_of_the_user_and_ours_both_run(when: str) -> None:
    p, watch, seen = nn.Parameter(torch.ones(3)), GradientWatch(), list[float]()

    def halve(grad: torch.Tensor) -> torch.Tensor:
        seen.append(float(grad[0]))
        return grad / 2

    if when != "after":
        handle = p.register_hook(halve)
        assert hooks_of(p)
    if when == "once before, again after":
        handle.remove()
    watch.attach({"p": p})
    watch.attach({"p": p})  # the same once more: nothing to do
    assert hooks_of(p) == (when == "before"), "ours isn't the user's"
    if when != "before":
        p.register_hook(halve)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(watch, p)
        assert p.grad is not None and p.grad.tolist() == [1.0] * 3
    with pytest.warns(UserWarning, match="the gradient of p has a part from outside"):
        backward(watch, p, ours=False)
    assert seen == [2.0] * 2
    if when == "before":
        handle.remove()
        backward(watch, p)
        assert len(seen) == 2 and not hooks_of(p)


class Planned(torch.autograd.Function):
    """(a + b) * x, as a segment that the engine runs, with a and b of one gradient."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kind, inputs = _backend.Kind, [(i, True, True) for i in range(2)]
        instructions = [(k, 0, back, False, [], [], [], [], []) for k, back in ((kind.segment, False), (kind.segment_backward, True))]
        stores = [(i, f"p{i}", shape) for i, shape in enumerate(SHAPES)]
        ctx.engine = _backend.Engine([(inputs, [2], [], True, False, [False])], [], instructions, [*SHAPES, [4]], stores)
        ctx.state, ctx.forwards = _backend.State(3, 1), [lambda a, b, random: ((a.view(4) + b) * x,)]
        ctx.engine.begin(ctx.state, [a, b])
        ctx.engine.run(ctx.state, 0, 1, True, ctx.forwards, None, lambda position: None)
        return ctx.state.values[2].detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        _backend.accumulate(ctx.state, 2, grad / 1)
        ctx.engine.run(ctx.state, 1, 2, True, ctx.forwards, None, lambda position: None)
        return *ctx.engine.take_gradients(ctx.state, [0, 1], [torch.float32] * 2), None


def test_gradients_of_two_parameters_are_not_the_same_memory() -> None:
    """Clipping, unscaling and a second backward change each in place."""
    a, b = (nn.Parameter(torch.ones(shape)) for shape in SHAPES)
    Planned.apply(a, b, torch.arange(1.0, 5.0)).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad.flatten().tolist() == b.grad.tolist() == [1.0, 2.0, 3.0, 4.0]
    torch.nn.utils.clip_grad_norm_([a, b], 1.0, foreach=True)
    assert torch.cat([a.grad.flatten(), b.grad]).norm().item() == pytest.approx(1.0, abs=1e-5)
