"""Canonical forms: many ATen operators are one operator written differently. Each entry maps a call to canonical calls.

A rewrite gets the emitter and the call's arguments (tensors are `Tensor`-like handles with `.shape`) and returns the
result handle(s), or None when the call is already canonical. Sizes are ints here, so every view is `view`, every
reordering of dims is `permute`, every part of a dim is `narrow`, and random in-place fills have an operator of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from torch_soap import functional

aten = torch.ops.aten


class Emitter(Protocol):
    def emit(self, target: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...


def view(e: Emitter, x: Any, size: list[int]) -> Any:
    return e.emit("view", torch.reshape, x, list(size))


def permute(e: Emitter, x: Any, dims: list[int]) -> Any:
    return e.emit("permute", torch.permute, x, [d % len(dims) for d in dims])


def narrow(e: Emitter, x: Any, dim: int, start: int, length: int) -> Any:
    dim %= x.dim()
    if start == 0 and length == x.shape[dim]:
        return x
    return e.emit("narrow", torch.narrow, x, dim, start, length)


def _like_shape(e: Emitter, x: Any, fn: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad():
        shape = fn(torch.empty(tuple(x.shape), device="meta", dtype=x.dtype), *args, **kwargs).shape
    return view(e, x, list(shape))


def _reshape_by(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda e, x, *args, **kwargs: _like_shape(e, x, fn, args, kwargs)


def _transpose(e: Emitter, x: Any, dim0: int = 0, dim1: int = 1) -> Any:
    dims = list(range(x.dim()))
    if dims:
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permute(e, x, dims)


def _reverse(e: Emitter, x: Any) -> Any:
    return permute(e, x, list(range(x.dim()))[::-1])


def _movedim(e: Emitter, x: Any, source: Any, destination: Any) -> Any:
    src = [source] if isinstance(source, int) else list(source)
    dst = [destination] if isinstance(destination, int) else list(destination)
    n = x.dim()
    order = [-1] * n
    for s, d in zip(src, dst, strict=True):
        order[d % n] = s % n
    rest = iter(d for d in range(n) if d not in [s % n for s in src])
    return permute(e, x, [d if d >= 0 else next(rest) for d in order])


def _select(e: Emitter, x: Any, dim: int, index: int) -> Any:
    dim %= x.dim()
    shape = list(x.shape)
    part = narrow(e, x, dim, index % shape[dim], 1)
    return view(e, part, shape[:dim] + shape[dim + 1 :])


def _unbind(e: Emitter, x: Any, dim: int = 0) -> list[Any]:
    return [_select(e, x, dim, i) for i in range(x.shape[dim])]


def _slice(e: Emitter, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    begin, stop, _ = slice(start, end, step).indices(x.shape[dim])
    if step == 1:
        return narrow(e, x, dim, begin, max(stop - begin, 0))
    return e.emit("slice", aten.slice.Tensor, x, dim % x.dim(), begin, stop, step)


def _sections(e: Emitter, x: Any, sizes: list[int], dim: int) -> list[Any]:
    out, start = [], 0
    for size in sizes:
        out.append(narrow(e, x, dim, start, size))
        start += size
    return out


def _split(e: Emitter, x: Any, size: Any, dim: int = 0) -> list[Any]:
    total = x.shape[dim]
    if not isinstance(size, int):
        return _sections(e, x, list(size), dim)
    sizes = [size] * (total // size) + ([total % size] if total % size else [])
    return _sections(e, x, sizes or [0], dim)


def _chunk(e: Emitter, x: Any, chunks: int, dim: int = 0) -> list[Any]:
    return _split(e, x, max(1, -(-x.shape[dim] // chunks)), dim)


def _tensor_split(e: Emitter, x: Any, sections: Any, dim: int = 0) -> list[Any]:
    total = x.shape[dim]
    if isinstance(sections, int):
        sizes = [total // sections + (i < total % sections) for i in range(sections)]
    else:
        points = [0, *sections, total]
        sizes = [max(b - a, 0) for a, b in itertools.pairwise(points)]
    return _sections(e, x, sizes, dim)


def _stack(e: Emitter, tensors: list[Any], dim: int = 0) -> Any:
    dim %= tensors[0].dim() + 1
    parts = []
    for t in tensors:
        shape = list(t.shape)
        parts.append(view(e, t, [*shape[:dim], 1, *shape[dim:]]))
    return e.emit("cat", torch.cat, parts, dim)


def _cat(e: Emitter, tensors: list[Any], dim: int = 0) -> Any:
    # torch ignores old-style empty 1-D tensors.
    parts = [t for t in tensors if not (t.dim() == 1 and t.shape[0] == 0)]
    return e.emit("cat", torch.cat, parts, dim % parts[0].dim())


def _expand(e: Emitter, x: Any, size: list[int], implicit: bool = False) -> Any:
    lead = len(size) - x.dim()
    full = [x.shape[d - lead] if s == -1 else s for d, s in enumerate(size)]
    if list(x.shape) == full:
        return x
    return e.emit("expand", torch.Tensor.expand, x, full)


def _expand_as(e: Emitter, x: Any, other: Any) -> Any:
    return _expand(e, x, list(other.shape))


def _new(fill: float | int | bool | None) -> Callable[..., Any]:
    def rewrite(e: Emitter, x: Any, size: list[int], *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        value = args[0] if fill is None else fill
        return e.emit("full", torch.full, list(size), value, dtype=dtype or x.dtype)

    return rewrite


def _same(e: Emitter, x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _type_as(e: Emitter, x: Any, other: Any) -> Any:
    return x if x.dtype == other.dtype else e.emit("to", aten.to.dtype, x, other.dtype)


def _t(e: Emitter, x: Any) -> Any:
    return _transpose(e, x, 0, 1) if x.dim() == 2 else x


def _fill(e: Emitter, x: Any, value: Any) -> Any:
    return e.emit("full", torch.full, list(x.shape), value, dtype=x.dtype) if not hasattr(value, "shape") else _expand(e, value, list(x.shape))


def _zero(e: Emitter, x: Any) -> Any:
    return _fill(e, x, 0)


def _copy(e: Emitter, x: Any, src: Any, non_blocking: bool = False) -> Any:
    if src.dtype != x.dtype:
        src = e.emit("to", aten.to.dtype, src, x.dtype)
    return _expand(e, src, list(x.shape))


def _bernoulli(e: Emitter, x: Any, p: Any = 0.5, generator: Any = None) -> Any:
    if hasattr(p, "shape"):
        return e.emit("bernoulli", aten.bernoulli.Tensor, x, _expand(e, p, list(x.shape)))
    return e.emit("bernoulli", aten.bernoulli.p, x, p)


def _normal(e: Emitter, x: Any, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Any:
    return e.emit("normal", aten.normal_functional.default, x, mean, std)


def _reduced(e: Emitter, rows: Any, reduction: int) -> Any:
    if reduction == 0:
        return rows
    if reduction == 1:
        return e.emit("mean", aten.mean.default, rows)
    return e.emit("sum", aten.sum.default, rows)


def _mean_of_rows(e: Emitter, rows: Any, target: Any, weight: Any, ignore_index: int) -> Any:
    """sum(rows * (1 / count)), count over the whole batch: the backward of a part of the rows needs only the count."""
    dtype = rows.dtype
    if dtype in (torch.bfloat16, torch.float16):  # which have neither the range nor the digits of a count
        rows = e.emit("to", aten.to.dtype, rows, torch.float32)
    count = e.emit("ce_count", functional.ce_count, target, weight, ignore_index, rows.dtype)
    share = e.emit("reciprocal", aten.reciprocal.default, count)
    mean = e.emit("sum", aten.sum.default, e.emit("mul", aten.mul.Tensor, rows, share))
    return mean if mean.dtype == dtype else e.emit("to", aten.to.dtype, mean, dtype)


def _cross_entropy(e: Emitter, x: Any, target: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100, label_smoothing: float = 0.0) -> Any:
    rows = e.emit("ce_rows", functional.ce_rows, x, target, weight, ignore_index, label_smoothing)
    if reduction != 1:
        return _reduced(e, rows, reduction)
    if target.is_floating_point():
        share = 1.0 / max(rows.numel(), 1)
        return e.emit("sum", aten.sum.default, e.emit("mul", aten.mul.Tensor, rows, share))
    return _mean_of_rows(e, rows, target, weight, ignore_index)


def _nll(e: Emitter, x: Any, target: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100) -> Any:
    rows = e.emit("nll_rows", functional.nll_rows, x, target, weight, ignore_index)
    return _mean_of_rows(e, rows, target, weight, ignore_index) if reduction == 1 else _reduced(e, rows, reduction)


def _rowwise(fn: Any) -> Callable[..., Any]:
    """A loss that is elementwise but for its reduction."""

    def rewrite(e: Emitter, *args: Any, **kwargs: Any) -> Any:
        names = [a.name for a in fn._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        reduction = given.pop("reduction", 1)
        required = [given.pop(n) for n in names if n in given and n in ("self", "target")]
        return _reduced(e, e.emit(fn._schema.name.split("::")[1], fn, *required, **given, reduction=0), reduction)

    return rewrite


def _lstm(e: Emitter, x: Any, hx: list[Any], *args: Any) -> Any:
    y, h, c = _recurrent(e, "lstm_layer", functional.lstm_layer, {}, x, hx, *args)
    return (y, _stack(e, h), _stack(e, c))


def _one_state(target: str, fn: Any, **more: Any) -> Callable[..., Any]:
    def rewrite(e: Emitter, x: Any, h: Any, *args: Any) -> Any:
        y, states = _recurrent(e, target, fn, more, x, [h, h], *args)
        return (y, _stack(e, states))

    return rewrite


def _recurrent(
    e: Emitter, target: str, fn: Any, more: dict[str, Any], x: Any, hx: list[Any], weights: list[Any], has_biases: bool, layers: int, p: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Layer by layer and direction by direction, with dropout between layers: y, and the last states, one list of each kind."""
    x = _transpose(e, x, 0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // (layers * directions)
    states: list[Any] = []
    for layer in range(layers):
        outputs = []
        for d in range(directions):
            index = layer * directions + d
            first = [_select(e, h, 0, index) for h in hx]
            made = e.emit(target, fn, x, *first, **functional.layer_weights(weights, has_biases, per_layer, index), reverse=d == 1, **more)
            outputs.append(made[0])
            states.append(made[1:])
        x = _cat(e, outputs, 2) if directions == 2 else outputs[0]
        if layer + 1 < layers and p > 0 and train:
            x = e.emit("layer_dropout", functional.layer_dropout, x, p, layer, layers - 1)
    return (_transpose(e, x, 0, 1) if batch_first else x, *(list(kind) for kind in zip(*states, strict=True)))


# By canonical name (overload and in-place suffix removed).
REWRITES: dict[str, Callable[..., Any]] = {
    "view": _reshape_by(torch.reshape),
    "reshape": _reshape_by(torch.reshape),
    "_unsafe_view": _reshape_by(torch.reshape),
    "reshape_as": lambda e, x, other: view(e, x, list(other.shape)),
    "view_as": lambda e, x, other: view(e, x, list(other.shape)),
    "flatten": _reshape_by(torch.flatten),
    "unflatten": _reshape_by(torch.unflatten),
    "squeeze": _reshape_by(torch.squeeze),
    "unsqueeze": _reshape_by(torch.unsqueeze),
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "t": _t,
    "numpy_T": _reverse,
    "mT": lambda e, x: _transpose(e, x, -1, -2),
    "permute": lambda e, x, dims: permute(e, x, list(dims)),
    "movedim": _movedim,
    "moveaxis": _movedim,
    "select": _select,
    "unbind": _unbind,
    "slice": _slice,
    "narrow": narrow,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "tensor_split": _tensor_split,
    "stack": _stack,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "expand": _expand,
    "broadcast_to": _expand,
    "expand_as": _expand_as,
    "new_zeros": _new(0),
    "new_ones": _new(1),
    "new_empty": _new(0),
    "new_full": _new(None),
    "cross_entropy_loss": _cross_entropy,
    "nll_loss": _nll,
    "nll_loss_nd": _nll,
    "mse_loss": _rowwise(aten.mse_loss.default),
    "l1_loss": _rowwise(aten.l1_loss.default),
    "smooth_l1_loss": _rowwise(aten.smooth_l1_loss.default),
    "huber_loss": _rowwise(aten.huber_loss.default),
    "binary_cross_entropy": _rowwise(aten.binary_cross_entropy.default),
    "binary_cross_entropy_with_logits": _rowwise(aten.binary_cross_entropy_with_logits.default),
    "lstm": _lstm,
    "gru": _one_state("gru_layer", functional.gru_layer),
    "rnn_tanh": _one_state("rnn_layer", functional.rnn_layer, relu=False),
    "rnn_relu": _one_state("rnn_layer", functional.rnn_layer, relu=True),
    "type_as": _type_as,
    "contiguous": _same,
    "alias": _same,
    "lift_fresh_copy": _same,
    "lift_fresh": _same,
    "lift": _same,
}

# In-place operators whose functional twin is not simply the name without the underscore.
INPLACE: dict[str, Callable[..., Any]] = {"fill": _fill, "zero": _zero, "copy": _copy, "bernoulli": _bernoulli, "normal": _normal}
