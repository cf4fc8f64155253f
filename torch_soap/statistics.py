"""Batch norm in parts: moments of each part, their merging, and the normalisation by what is given.

Each has a gradient of its own, made of torch's kernels for batch norm: autograd's, operator by operator, passes over the input several times more.
Moments are merged as Chan, Golub & LeVeque do ("Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979): no large
numbers are subtracted from each other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


class ChannelMoments(torch.autograd.Function):
    """x [n, c, ...] -> [2, c]: mean of each channel, and sum of squared differences from it. Zeros where there are no rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            mean = var = x.new_zeros(x.shape[1])
        else:
            mean, var = aten.batch_norm_update_stats(x, None, None, 0.0)
        ctx.save_for_backward(x, mean)
        return torch.stack([mean, var * (x.numel() // max(x.shape[1], 1))])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, mean = ctx.saved_tensors
        if x.numel() == 0:
            return torch.zeros_like(x)
        # (x - mean) * 2 * grad of M2 + grad of the mean / count, in one pass
        slope, level = 2 * grad[1], grad[0] / (x.numel() // x.shape[1])
        return aten.native_batch_norm(x, slope, level, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1 << 10)
def shares(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of each part in the whole, [parts, 1]."""
    total = max(sum(counts), 1)
    return torch.tensor([[count / total] for count in counts], dtype=dtype, device=device)


class MergeMoments(torch.autograd.Function):
    """Moments of parts [..., 2, c] of so many elements -> mean and variance of each channel of the whole [2, c], mean [c], unbiased variance [c].

    The last two have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, moments: torch.Tensor, counts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts, total, share = moments.reshape(len(counts), *moments.shape[-2:]), sum(counts), shares(counts, moments.dtype, moments.device)
        means, squares = parts.unbind(1)
        mean = (means * share).sum(0)
        apart = (means - mean).mul_(share)  # times the share of the part
        var = squares.sum(0).div_(max(total, 1)).add_((apart * (means - mean)).sum(0))
        ctx.save_for_backward(apart, share)
        ctx.total, ctx.shape = total, moments.shape
        unbiased = var * (total / max(total - 1, 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return torch.stack([mean, var]), mean, unbiased

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None]:
        apart, share = ctx.saved_tensors
        of_means = torch.addcmul(share * grad[0], apart, 2 * grad[1])
        of_squares = (grad[1] / max(ctx.total, 1)).expand_as(of_means)
        return torch.stack([of_means, of_squares], 1).reshape(ctx.shape), None


class ChannelNormalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias by the given statistics [2, c], whose gradient is made of the weight's and the bias's: both are
    the sums of the gradient and of its product with what is normalised."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        mean, var = statistics.unbind(0)
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        return aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, mean, var, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_x, of_weight, of_bias = aten.native_batch_norm_backward(grad, x, weight, mean, var, None, None, False, ctx.eps, [needs[0], True, True])
        of_statistics = None
        if needs[1]:
            scale = (var + ctx.eps).rsqrt_()
            slope = scale if weight is None else scale * weight
            of_statistics = torch.stack([-slope * of_bias, -0.5 * scale * slope * of_weight])
        return of_x if needs[0] else None, of_statistics, of_weight if needs[2] else None, of_bias if needs[3] else None, None


def channel_moments(x: torch.Tensor) -> torch.Tensor:
    return ChannelMoments.apply(x)  # type: ignore[no-any-return]


def merge_moments(moments: torch.Tensor, counts: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return MergeMoments.apply(moments, counts)  # type: ignore[no-any-return]


def channel_normalize(x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """All in x's dtype."""
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return ChannelNormalize.apply(x, statistics, weight, bias, eps)  # type: ignore[no-any-return]
