"""Functional forms that capture writes into the graph and that tiles are computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F


# -- losses --------------------------------------------------------------------------------------------------------------
def ce_rows(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy of each row."""
    return F.cross_entropy(input, target, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")


def nll_rows(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, ignore_index: int = -100) -> torch.Tensor:
    return F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction="none")


def ce_count(target: torch.Tensor, weight: torch.Tensor | None = None, ignore_index: int = -100, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a mean loss divides by: the rows that count, or their summed class weight."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum(dtype=dtype)
    return torch.where(counted, weight[torch.where(counted, target, torch.zeros_like(target))], torch.zeros((), dtype=weight.dtype)).sum(dtype=dtype)


# -- products and indexing -----------------------------------------------------------------------------------------------
def einsum(equation: str, operands: list[torch.Tensor]) -> torch.Tensor:
    """Explicit output, no ellipsis, each letter at most once in an operand."""
    return torch.einsum(equation, *operands)


def index_take(input: torch.Tensor, indices: list[torch.Tensor], dim: int) -> torch.Tensor:
    """input[:, .., i, j, .., :] with the index tensors side by side from `dim`."""
    before: list[Any] = [slice(None)] * dim
    return input[(*before, *indices)]


def index_write(input: torch.Tensor, values: torch.Tensor, indices: list[torch.Tensor], dim: int, accumulate: bool = False) -> torch.Tensor:
    """A copy of input with `values` at input[:, .., i, j, .., :], added where accumulate."""
    return torch.ops.aten.index_put(input, [*[None] * dim, *indices], values, accumulate)  # type: ignore[no-any-return]


def rewritten(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What autograd makes of a tensor whose memory was written past it: the new values, the old one's gradient."""
    return new.detach() + (old - old.detach())


# -- statistics ----------------------------------------------------------------------------------------------------------
def running_average(old: torch.Tensor, new: torch.Tensor, share: Any) -> torch.Tensor:
    """A batch norm's: `share` (a number or a tensor) of the new value."""
    return old * (1 - share) + new * share


def batch_norm_and_statistics(
    input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's batch norm in training, and the mean and unbiased variance of each channel: what it would write into running averages of this dtype,
    had they no memory."""
    mean, var = torch.zeros(input.shape[1], dtype=dtype, device=input.device), torch.zeros(input.shape[1], dtype=dtype, device=input.device)
    y = torch.ops.aten.batch_norm.default(input, weight, bias, mean, var, True, 1.0, eps, False)
    return y, mean, var


# -- embedding bags of equal length --------------------------------------------------------------------------------------
def embedding_bag_fixed(
    weight: torch.Tensor, indices: torch.Tensor, per_sample_weights: torch.Tensor | None = None, mode: int = 0, sparse: bool = False
) -> torch.Tensor:
    """weight [v, d], indices [n, b] -> [n, d]; mode 0 sum, 1 mean, 2 max."""
    return F.embedding_bag(indices, weight, mode=("sum", "mean", "max")[mode], per_sample_weights=per_sample_weights, sparse=sparse)


# -- recurrent layers, one direction each --------------------------------------------------------------------------------
def lstm_layer(
    input: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: Any = None,
    b_hh: Any = None,
    w_hr: Any = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input [t, n, i], h0 [n, o or p], c0 [n, o] -> y [t, n, o or p], hn, cn; torch's own kernel. w_hr [p, o] projects what a step gives."""
    if reverse:
        y, h, c = lstm_layer(input.flip(0), h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        return y.flip(0), h, c
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    y, hn, cn = torch.ops.aten.lstm.input(input, [h0.unsqueeze(0), c0.unsqueeze(0)], weights, b_ih is not None, 1, 0.0, False, False, False)
    return y, hn[0], cn[0]


def lstm_step(
    input: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor, b_ih: Any, b_hh: Any, w_hr: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One time step for some hidden units: w_* hold these units' gate rows, c0 these units, h0 all. Projected, h is these units' share."""
    i, f, g, o = (F.linear(input[0], w_ih, b_ih) + F.linear(h0, w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c0 + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    h = h if w_hr is None else F.linear(h, w_hr)
    return h.unsqueeze(0), h, c


def unrolled(
    cell: Callable[..., torch.Tensor], input: torch.Tensor, h0: torch.Tensor, h0_own: torch.Tensor, weights: Sequence[Any], reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step by step: cell(gates of the input, gates of the state, the state's own units) -> these units."""
    w_ih, w_hh, b_ih, b_hh = weights
    steps = range(input.shape[0])
    gates = F.linear(input, w_ih, b_ih)
    whole = h0_own.shape[1] == h0.shape[1]
    h, own = h0, h0_own
    outputs: list[torch.Tensor] = []
    for t in reversed(steps) if reverse else steps:
        own = cell(gates[t], F.linear(h, w_hh, b_hh), own)
        if whole:
            h = own
        outputs.append(own)
    return torch.stack(outputs[::-1] if reverse else outputs), own


def gru_layer(
    input: torch.Tensor,
    h0: torch.Tensor,
    h0_own: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: Any = None,
    b_hh: Any = None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As lstm_layer; `h0_own` is h0, or the units of it that this tile computes (then one time step)."""

    def cell(x: torch.Tensor, state: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), state.chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return n + z * (own - n)

    return unrolled(cell, input, h0, h0_own, (w_ih, w_hh, b_ih, b_hh), reverse)


def rnn_layer(
    input: torch.Tensor,
    h0: torch.Tensor,
    h0_own: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: Any = None,
    b_hh: Any = None,
    reverse: bool = False,
    relu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As gru_layer."""
    activation = torch.relu if relu else torch.tanh
    return unrolled(lambda x, state, own: activation(x + state), input, h0, h0_own, (w_ih, w_hh, b_ih, b_hh), reverse)


def layer_weights(weights: Sequence[torch.Tensor], has_biases: bool, count: int, index: int) -> dict[str, torch.Tensor]:
    """The `count` weights of layer-direction `index` in torch's flat list, by name; w_hr where the layer projects."""
    names = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if has_biases else ("w_ih", "w_hh", "w_hr")
    return dict(zip(names, weights[count * index : count * (index + 1)], strict=False))


def layer_dropout(input: torch.Tensor, p: float, layer: int, num_masks: int) -> torch.Tensor:
    """Dropout between recurrent layers; a rank draws slice `layer` of one mask [num_masks, t, n, units]."""
    return F.dropout(input, p, True)
