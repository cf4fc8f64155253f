"""Random numbers that don't depend on the plan.

Each number is a pure function of (seed, call, operator, global element index), defined bit by bit in
csrc/kernels/counter_rng.h. So a tile holds exactly its part of what one process draws, whatever the tiling, and a
recomputation draws the same again.

Every function takes `Where`: the key and, for a tile of a larger tensor, `tile` and `global_sizes`. A function returns
NotImplemented where nothing random happens and only the operator itself knows the result (attention or an RNN without
dropout); the caller then runs the operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, Unpack

import torch

import torch_soap._ops  # noqa: F401  (registers torch.ops.torch_soap)

Tile = Sequence[Sequence[tuple[int, int]]]

# Minus SELU's limit for x -> -inf: what dropped units become (Klambauer et al. 2017, arXiv 1706.02515, alpha dropout).
ALPHA = 1.7580993408473766


@dataclass(frozen=True)
class RandomKey:
    """op_index: n-th random operator (random_ops.is_random) of the forward and of its graph, active or not."""

    seed: int
    call: int
    op_index: int


class Where(TypedDict):
    """Which numbers.

    tile: per dim of the *random* tensor the runs [begin, end) of global indices that the tile holds, in storing order.
    global_sizes: the sizes of the whole random tensor. Without these two the tensor is whole.
    """

    key: RandomKey
    tile: NotRequired[Tile | None]
    global_sizes: NotRequired[Sequence[int] | None]


@dataclass
class CounterState:
    """What the next forward draws from. `next_call()` goes before every top-level forward, train or eval.

    Where `torch_seed` is set, `seed` follows torch: another `torch.manual_seed` starts again at call 0. Seeding torch
    again with the *same* number can't be seen; `restart()` does it.
    """

    seed: int
    call: int = 0
    torch_seed: int | None = None
    changed: bool = False  # torch was seeded anew, or a state loaded, since ranks last agreed

    @classmethod
    def from_torch(cls) -> CounterState:
        seed = torch.initial_seed()
        return cls(seed=seed, torch_seed=seed)

    def restart(self, seed: int | None = None) -> None:
        """Back to call 0, of `seed` if given."""
        self.seed = self.seed if seed is None else seed
        self.call = 0

    def reseeded(self) -> bool:
        """The next call begins a new sequence, or one that the other ranks may not know."""
        return self.changed or (self.torch_seed is not None and torch.initial_seed() != self.torch_seed)

    def next_call(self) -> None:
        if self.torch_seed is not None and torch.initial_seed() != self.torch_seed:
            self.torch_seed = torch.initial_seed()
            self.restart(self.torch_seed)
            self.changed = True
        self.call += 1

    def key(self, op_index: int) -> RandomKey:
        return RandomKey(self.seed, self.call, op_index)

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "call": self.call}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The loaded seed holds until torch is seeded anew."""
        self.seed, self.call = state["seed"], state["call"]
        if self.torch_seed is not None:
            self.torch_seed = torch.initial_seed()


def _draw(
    name: str,
    *args: Any,
    sizes: Sequence[int],
    key: RandomKey,
    tile: Tile | None = None,
    global_sizes: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    global_sizes = sizes if global_sizes is None else global_sizes
    tile = [[(0, n)] for n in global_sizes] if tile is None else tile
    seed = (key.seed + 2**63) % 2**64 - 2**63  # torch seeds are unsigned, an operator's int is not
    drawn: torch.Tensor = getattr(torch.ops.torch_soap, name)(
        *args,
        seed,
        key.call,
        key.op_index,
        list(global_sizes),
        [bound for runs in tile for run in runs for bound in run],
        [len(runs) for runs in tile],
        dtype=dtype or torch.get_default_dtype(),
        device=device or torch.get_default_device(),
    )
    return drawn


def _draw_like(
    name: str,
    *args: Any,
    like: torch.Tensor,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **where: Unpack[Where],
) -> torch.Tensor:
    drawn = _draw(name, *args, sizes=like.shape, dtype=dtype or like.dtype, device=device or like.device, **where)
    if drawn.shape != like.shape:
        raise RuntimeError(f"the random tile has shape {list(drawn.shape)}, its tensor {list(like.shape)}")
    return drawn


def rand(
    sizes: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **where: Unpack[Where],
) -> torch.Tensor:
    """Uniform in [0, 1). `sizes` are the whole tensor's unless `global_sizes` is given; a `tile` gives its shape."""
    return _draw("counter_uniform", sizes=sizes, dtype=dtype, device=device, **where)


def randn(
    sizes: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **where: Unpack[Where],
) -> torch.Tensor:
    return _draw("counter_normal", sizes=sizes, dtype=dtype, device=device, **where)


def randint(
    low: int,
    high: int,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **where: Unpack[Where],
) -> torch.Tensor:
    return _draw("counter_randint", low, high, sizes=sizes, dtype=dtype or torch.int64, device=device, **where)


def rand_like(x: torch.Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **where: Unpack[Where]) -> torch.Tensor:
    return _draw_like("counter_uniform", like=x, dtype=dtype, device=device, **where)


def randn_like(x: torch.Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **where: Unpack[Where]) -> torch.Tensor:
    return _draw_like("counter_normal", like=x, dtype=dtype, device=device, **where)


def randint_like(
    x: torch.Tensor,
    low: int,
    high: int,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **where: Unpack[Where],
) -> torch.Tensor:
    return _draw_like("counter_randint", low, high, like=x, dtype=dtype, device=device, **where)


def bernoulli(x: torch.Tensor, p: float | torch.Tensor, **where: Unpack[Where]) -> torch.Tensor:
    """Ones with probability p, in x's shape and dtype. A tensor p broadcasts and draws what the same scalar draws."""
    if not isinstance(p, torch.Tensor):
        return _draw_like("counter_bernoulli", p, like=x, **where)
    unit = _draw_like("counter_uniform", like=x, dtype=torch.float64, **where)
    return (unit < p.detach().to(torch.float64)).to(x.dtype)


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _dropped(x: torch.Tensor, keep: torch.Tensor, p: float, alpha: bool) -> torch.Tensor:
    """x where `keep` is 1, rescaled to the same expectation (and, with alpha, variance)."""
    if p == 1:
        return x * torch.zeros_like(keep)
    if not alpha:
        return x * (keep / (1 - p))
    scale = 1 / math.sqrt((ALPHA**2 * p + 1) * (1 - p))
    return x * (keep * scale) + ((keep - 1) * (ALPHA * scale) + ALPHA * scale * p)


def dropout(x: torch.Tensor, p: float, train: bool, *, alpha: bool = False, **where: Unpack[Where]) -> torch.Tensor:
    _check_probability(p)
    if p == 0 or not train or x.numel() == 0:
        return x
    keep = _draw_like("counter_bernoulli", 1 - p, like=x, **where)
    return _dropped(x, keep, p, alpha)


def feature_dropout(x: torch.Tensor, p: float, train: bool, *, alpha: bool = False, **where: Unpack[Where]) -> torch.Tensor:
    """dropout1d/2d/3d: whole channels; the mask is [N, C]. Of `tile` and `global_sizes` only these two dims count."""
    _check_probability(p)
    if x.dim() < 2:
        raise ValueError(f"feature dropout needs a batch and a channel dim, got shape {list(x.shape)}")
    if p == 0 or not train or x.numel() == 0:
        return x
    channels = x.detach().flatten(2)[:, :, 0] if x.dim() > 2 else x.detach()
    tile, global_sizes = where.get("tile"), where.get("global_sizes")
    keep = _draw_like(
        "counter_bernoulli",
        1 - p,
        like=channels,
        key=where["key"],
        tile=tile and tile[:2],
        global_sizes=global_sizes and global_sizes[:2],
    )
    return _dropped(x, keep.reshape([*keep.shape, *[1] * (x.dim() - 2)]), p, alpha)


def alpha_dropout(x: torch.Tensor, p: float, train: bool, **where: Unpack[Where]) -> torch.Tensor:
    return dropout(x, p, train, alpha=True, **where)


def feature_alpha_dropout(x: torch.Tensor, p: float, train: bool, **where: Unpack[Where]) -> torch.Tensor:
    return feature_dropout(x, p, train, alpha=True, **where)


def _global_indices(size: int, runs: Sequence[tuple[int, int]] | None, device: torch.device) -> torch.Tensor:
    parts = [torch.arange(begin, end, device=device) for begin, end in ([(0, size)] if runs is None else runs)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key_tensor: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **where: Unpack[Where],
) -> Any:
    """Attention with dropout on its weights [..., S, T], written out: softmax in fp32 or wider, then the mask.

    `tile` is the tile of the weights. `is_causal` is torch's: global row i sees global columns <= i. All of T must be
    here, as the softmax runs over it. NotImplemented when dropout_p is 0.
    """
    if dropout_p == 0:
        return NotImplemented
    _check_probability(dropout_p)
    if enable_gqa:
        key_tensor = key_tensor.repeat_interleave(query.size(-3) // key_tensor.size(-3), dim=-3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query.to(dtype) * scale) @ key_tensor.to(dtype).transpose(-2, -1)
    if is_causal:
        tile = where.get("tile")
        rows = _global_indices(scores.size(-2), tile[-2] if tile else None, scores.device)
        columns = _global_indices(scores.size(-1), tile[-1] if tile else None, scores.device)
        scores = scores.masked_fill(rows[:, None] < columns, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # A row that sees nothing gives zeros, as torch does.
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, torch.softmax(scores, -1))
    weights = dropout(weights, dropout_p, True, **where)
    return (weights @ value.to(dtype)).to(query.dtype)


def rnn(
    op: Any,
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    hx: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout_p: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    key: RandomKey,
) -> Any:
    """A stack of recurrent layers, an `op` call for each, dropout between them; NotImplemented without active dropout.

    The layers' masks are one random tensor [layers - 1, T, N, H * directions] (time before batch also with
    batch_first), or [layers - 1, rows, H * directions] for packed data. A layer elsewhere draws its tile, the run
    (l, l + 1) of the first dim, with `dropout`.
    hx: one state [layers * directions, N, H] or, for an LSTM, two.
    """
    if not train or dropout_p == 0 or num_layers == 1:
        return NotImplemented
    directions = 2 if bidirectional else 1
    per_layer = len(params) // num_layers
    finals: list[Sequence[torch.Tensor]] = []
    for layer in range(num_layers):
        states = [h.narrow(0, layer * directions, directions) for h in hx]
        state = states if len(states) == 2 else states[0]
        weights = params[layer * per_layer : (layer + 1) * per_layer]
        if batch_sizes is None:
            x, *final = op(x, state, weights, has_biases, 1, 0.0, train, bidirectional, batch_first)
        else:
            x, *final = op(x, batch_sizes, state, weights, has_biases, 1, 0.0, train, bidirectional)
        finals.append(final)
        if layer < num_layers - 1:
            ordered = x.transpose(0, 1) if batch_first else x
            tile = [[(layer, layer + 1)], *([(0, n)] for n in ordered.shape)]
            sizes = [num_layers - 1, *ordered.shape]
            ordered = dropout(ordered.unsqueeze(0), dropout_p, True, key=key, tile=tile, global_sizes=sizes)
            x = ordered.squeeze(0).transpose(0, 1) if batch_first else ordered.squeeze(0)
    return (x, *(torch.cat(parts, 0) for parts in zip(*finals, strict=True)))
