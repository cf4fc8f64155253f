"""Canonical forms of compound operators: what can be said with views, parts, elementwise operators and sums needs no rule of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from torch_soap import functional
from torch_soap.capture.canonical import Emitter, _cat, _expand, _rowwise, _slice, narrow, permute, view

aten = torch.ops.aten


def add(e: Emitter, a: Any, b: Any) -> Any:
    return e.emit("add", aten.add.Tensor, a, b)


def sub(e: Emitter, a: Any, b: Any) -> Any:
    return e.emit("sub", aten.sub.Tensor, a, b)


def mul(e: Emitter, a: Any, b: Any) -> Any:
    return e.emit("mul", aten.mul.Tensor, a, b)


# -- creation ----------------------------------------------------------------------------------------------------------
def full(e: Emitter, size: list[int], value: Any, dtype: torch.dtype) -> Any:
    return e.emit("full", torch.full, list(size), value, dtype=dtype)


def _created(value: int) -> Callable[..., Any]:
    return lambda e, size, dtype=None, **_: full(e, size, value, dtype or torch.get_default_dtype())


def _created_like(value: int) -> Callable[..., Any]:
    return lambda e, x, dtype=None, **_: full(e, list(x.shape), value, dtype or x.dtype)


def _full(e: Emitter, size: list[int], value: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    with torch.no_grad():
        return full(e, size, value, dtype or torch.full([], value).dtype)


def _full_like(e: Emitter, x: Any, value: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return full(e, list(x.shape), value, dtype or x.dtype)


def arange(e: Emitter, count: int) -> Any:
    return e.emit("arange", aten.arange.start_step, 0, count, 1)


def _triangle(upper: bool) -> Callable[..., Any]:
    """The other triangle is filled with zeros where column - row lies beyond the diagonal."""

    def rewrite(e: Emitter, x: Any, diagonal: int = 0) -> Any:
        rows, columns = x.shape[-2:]
        offset = sub(e, arange(e, columns), view(e, arange(e, rows), [rows, 1]))
        compare = ("lt", aten.lt.Scalar) if upper else ("gt", aten.gt.Scalar)
        return e.emit("masked_fill", aten.masked_fill.Scalar, x, e.emit(*compare, offset, diagonal), 0)

    return rewrite


def _one_hot(e: Emitter, x: Any, num_classes: int = -1) -> Any:
    if num_classes < 0:
        return e.emit("one_hot", aten.one_hot.default, x, num_classes)
    equal = e.emit("eq", aten.eq.Tensor, view(e, x, [*x.shape, 1]), arange(e, num_classes))
    return e.emit("to", aten.to.dtype, equal, torch.int64)


# -- moves -------------------------------------------------------------------------------------------------------------
def _diff(e: Emitter, x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    parts = [t for t in (prepend, x, append) if t is not None]
    x = _cat(e, parts, dim) if len(parts) > 1 else x
    for _ in range(n):
        size = x.shape[dim]
        after, before = narrow(e, x, dim, min(1, size), max(size - 1, 0)), narrow(e, x, dim, 0, max(size - 1, 0))
        x = e.emit("ne", aten.ne.Tensor, after, before) if x.dtype == torch.bool else sub(e, after, before)
    return x


def _roll(e: Emitter, x: Any, shifts: list[int], dims: list[int] | None = None) -> Any:
    if not dims:
        return view(e, _roll(e, view(e, x, [math.prod(x.shape)]), shifts, [0]), list(x.shape))
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        by = shift % size if size else 0
        if by:
            x = _cat(e, [narrow(e, x, dim, size - by, by), narrow(e, x, dim, 0, size - by)], dim)
    return x


def _repeat(e: Emitter, x: Any, repeats: list[int]) -> Any:
    shape = [1] * (len(repeats) - x.dim()) + list(x.shape)
    apart = _expand(e, view(e, x, [n for s in shape for n in (1, s)]), [n for r, s in zip(repeats, shape, strict=True) for n in (r, s)])
    return view(e, apart, [r * s for r, s in zip(repeats, shape, strict=True)])


def _tile(e: Emitter, x: Any, repeats: list[int]) -> Any:
    return _repeat(e, x, [1] * (x.dim() - len(repeats)) + list(repeats))


def _repeat_interleave(e: Emitter, x: Any, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None) -> Any:
    if not isinstance(repeats, int):
        names = {"output_size": output_size}
        return e.emit("repeat_interleave", aten.repeat_interleave.self_Tensor, x, repeats, dim, **names)
    if dim is None:
        x, dim = view(e, x, [math.prod(x.shape)]), 0
    dim %= x.dim()
    shape = list(x.shape)
    apart = _expand(e, view(e, x, [*shape[: dim + 1], 1, *shape[dim + 1 :]]), [*shape[: dim + 1], repeats, *shape[dim + 1 :]])
    return view(e, apart, [*shape[:dim], shape[dim] * repeats, *shape[dim + 1 :]])


def _im2col(e: Emitter, x: Any, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> Any:
    """Windows of the padded image, one dim after the other: [n, c, h, w, kh, kw] -> [n, c kh kw, h w]."""
    batched = x.dim() == 4
    x = x if batched else view(e, x, [1, *x.shape])
    n, c = x.shape[:2]
    if any(padding):
        x = e.emit("pad", aten.pad.default, x, [padding[1], padding[1], padding[0], padding[0]])
    for d in range(2):
        x = e.emit("unfold", aten.unfold.default, x, 2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])
        x = _slice(e, x, x.dim() - 1, 0, None, dilation[d])
    columns = view(e, permute(e, x, [0, 1, 4, 5, 2, 3]), [n, c * kernel[0] * kernel[1], x.shape[2] * x.shape[3]])
    return columns if batched else view(e, columns, list(columns.shape[1:]))


def _pixel_shuffle(e: Emitter, x: Any, r: int) -> Any:
    *lead, c, h, w = x.shape
    n = len(lead)
    x = permute(e, view(e, x, [*lead, c // (r * r), r, r, h, w]), [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return view(e, x, [*lead, c // (r * r), h * r, w * r])


def _pixel_unshuffle(e: Emitter, x: Any, r: int) -> Any:
    *lead, c, h, w = x.shape
    n = len(lead)
    x = permute(e, view(e, x, [*lead, c, h // r, r, w // r, r]), [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return view(e, x, [*lead, c * r * r, h // r, w // r])


def _channel_shuffle(e: Emitter, x: Any, groups: int) -> Any:
    n, c, *rest = x.shape
    x = permute(e, view(e, x, [n, groups, c // groups, *rest]), [0, 2, 1, *range(3, 3 + len(rest))])
    return view(e, x, [n, c, *rest])


def _broadcast(e: Emitter, tensors: list[Any]) -> list[Any]:
    size = list(torch.broadcast_shapes(*(tuple(t.shape) for t in tensors)))
    return [_expand(e, t, size) for t in tensors]


def _meshgrid(e: Emitter, tensors: list[Any], indexing: str = "ij") -> list[Any]:
    if indexing == "xy" and len(tensors) >= 2:
        swapped = _meshgrid(e, [tensors[1], tensors[0], *tensors[2:]])
        return [swapped[1], swapped[0], *swapped[2:]]
    size = [t.shape[0] if t.dim() else 1 for t in tensors]
    return [_expand(e, view(e, t, [size[i] if j == i else 1 for j in range(len(size))]), size) for i, t in enumerate(tensors)]


# -- arithmetic --------------------------------------------------------------------------------------------------------
def _outer(e: Emitter, a: Any, b: Any) -> Any:
    return mul(e, view(e, a, [a.shape[0], 1]), b)


def _glu(e: Emitter, x: Any, dim: int = -1) -> Any:
    half = x.shape[dim] // 2
    return mul(e, narrow(e, x, dim, 0, half), e.emit("sigmoid", aten.sigmoid.default, narrow(e, x, dim, half, half)))


def _prelu(e: Emitter, x: Any, weight: Any) -> Any:
    slope = view(e, weight, [math.prod(weight.shape), *[1] * (x.dim() - 2)]) if x.dim() >= 2 else weight
    return e.emit("_prelu_kernel", aten._prelu_kernel.default, x, slope)


def _instance_norm(
    e: Emitter, x: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float, eps: float, cudnn: bool = False
) -> Any:
    if not use_input_stats:
        return e.emit("instance_norm", aten.instance_norm.default, x, weight, bias, mean, var, use_input_stats, momentum, eps, cudnn)
    return e.emit("group_norm", aten.group_norm.default, x, x.shape[1], weight, bias, eps)


def _extreme(name: str) -> Callable[..., Any]:
    """max and min: over everything, over a dim with the places, or of two tensors."""

    def rewrite(e: Emitter, x: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("dim", "keepdim"), args, strict=False)) | kwargs
        if isinstance(given.get("dim"), int):
            return e.emit(f"{name}_dim", getattr(aten, name).dim, x, given["dim"], given.get("keepdim", False))
        if given:
            return e.emit(f"{name}imum", getattr(aten, f"{name}imum").default, x, *args)
        return e.emit(f"a{name}", getattr(aten, f"a{name}").default, x, list(range(x.dim())), False)

    return rewrite


def _weight_norm(e: Emitter, v: Any, g: Any, dim: int = 0) -> Any:
    """v / norm(v) * g, the norm over all dims but `dim` (-1: over all)."""
    others = [d for d in range(v.dim()) if dim == -1 or d != dim]
    norm = e.emit("linalg_vector_norm", aten.linalg_vector_norm.default, v, 2, others, True)
    return mul(e, v, e.emit("div", aten.div.Tensor, g, norm))


def _cosine_similarity(e: Emitter, a: Any, b: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """ATen's: x / norm(x) each; a norm below eps counts as eps, but its gradient is the norm's."""
    a, b = _broadcast(e, [a, b])

    def unit(x: Any) -> Any:
        norm = e.emit("linalg_vector_norm", aten.linalg_vector_norm.default, x, 2, [dim], True)
        fixed = e.emit("detach", aten.detach.default, norm)
        missing = sub(e, e.emit("clamp_min", aten.clamp_min.default, fixed, eps), fixed)
        return e.emit("div", aten.div.Tensor, x, add(e, norm, missing))

    return e.emit("sum", aten.sum.dim_IntList, mul(e, unit(a), unit(b)), [dim])


def _einsum(e: Emitter, equation: str, tensors: list[Any], path: Any = None) -> Any:
    """Explicit output, no ellipsis, no dims of size 1 that broadcast; a letter twice in one operand (a diagonal) stays as it is."""
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    free = iter(c for c in map(chr, itertools.chain(range(97, 123), range(65, 91))) if c not in equation)
    dots = max((t.dim() - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True) if "..." in term), default=0)
    letters = "".join(itertools.islice(free, dots))

    def spelled(term: str, count: int) -> str:
        return term.replace("...", letters[dots - count :])

    terms = [spelled(term, t.dim() - len(term.replace("...", ""))) for t, term in zip(tensors, terms, strict=True)]
    if len(sides) == 2:
        out = spelled(sides[1], dots)
    else:
        every = "".join(terms)
        out = letters + "".join(sorted(c for c in set(every) if every.count(c) == 1 and c not in letters))
    if any(len(set(term)) < len(term) for term in terms):
        return e.emit("einsum_diagonal", torch.einsum, f"{','.join(terms)}->{out}", *tensors)
    sizes: dict[str, int] = {}
    for t, term in zip(tensors, terms, strict=True):
        for c, n in zip(term, t.shape, strict=True):
            sizes[c] = max(sizes.get(c, 1), n) if n else 0
    given = set()
    operands, names = [], []
    for t, term in zip(tensors, terms, strict=True):
        keep = [i for i, c in enumerate(term) if t.shape[i] == sizes[c]]
        operands.append(t if len(keep) == len(term) else view(e, t, [t.shape[i] for i in keep]))
        names.append("".join(term[i] for i in keep))
        given |= set(names[-1])
    if not set(out) <= given:
        return e.emit("einsum_diagonal", torch.einsum, equation, *tensors)
    return e.emit("einsum", functional.einsum, f"{','.join(names)}->{out}", operands)


# -- advanced indexing -------------------------------------------------------------------------------------------------
def _placed(x: Any, indices: list[Any]) -> tuple[list[int], list[Any], list[int]] | None:
    """(indexed dims, their index tensors, order of x's dims with the indexed ones side by side); None where an index is a mask."""
    dims = [d for d, i in enumerate(indices) if i is not None]
    if not dims or any(indices[d].dtype in (torch.bool, torch.uint8) for d in dims):
        return None
    beside = dims == list(range(dims[0], dims[0] + len(dims)))
    order = list(range(x.dim())) if beside else [*dims, *(d for d in range(x.dim()) if d not in dims)]
    return ([order.index(d) for d in dims], [indices[d] for d in dims], order)


def _index(e: Emitter, x: Any, indices: list[Any]) -> Any:
    placed = _placed(x, indices)
    if placed is None:
        return e.emit("index", aten.index.Tensor, x, indices)
    dims, tensors, order = placed
    x = x if order == sorted(order) else permute(e, x, order)
    return e.emit("index_take", functional.index_take, x, tensors, dims[0])


def _index_put(e: Emitter, x: Any, indices: list[Any], values: Any, accumulate: bool = False, *_: Any) -> Any:
    mask = indices[0] if len(indices) == 1 else None
    if mask is not None and mask.dtype == torch.bool and math.prod(values.shape) == 1 and not accumulate:
        return e.emit("where", aten.where.self, view(e, mask, [*mask.shape, *[1] * (x.dim() - mask.dim())]), view(e, values, []), x)
    placed = _placed(x, indices)
    if placed is None:
        return e.emit("index_put", aten.index_put.default, x, indices, values, accumulate)
    dims, tensors, order = placed
    if order == sorted(order):
        return e.emit("index_write", functional.index_write, x, values, tensors, dims[0], accumulate)
    y = e.emit("index_write", functional.index_write, permute(e, x, order), values, tensors, dims[0], accumulate)
    return permute(e, y, [order.index(d) for d in range(len(order))])


# Not under autocast, which casts these as wholes.
WHOLE_UNDER_AUTOCAST = {"prelu", "cosine_similarity"}

REWRITES: dict[str, Callable[..., Any]] = {
    "zeros": _created(0),
    "ones": _created(1),
    "empty": _created(0),
    "zeros_like": _created_like(0),
    "ones_like": _created_like(1),
    "empty_like": _created_like(0),
    "full": _full,
    "full_like": _full_like,
    "tril": _triangle(upper=False),
    "triu": _triangle(upper=True),
    "one_hot": _one_hot,
    "diff": _diff,
    "roll": _roll,
    "repeat": _repeat,
    "tile": _tile,
    "repeat_interleave": _repeat_interleave,
    "im2col": _im2col,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    "broadcast_tensors": _broadcast,
    "meshgrid": _meshgrid,
    "outer": _outer,
    "ger": _outer,
    "glu": _glu,
    "prelu": _prelu,
    "instance_norm": _instance_norm,
    "max": _extreme("max"),
    "min": _extreme("min"),
    "_weight_norm": _weight_norm,
    "cosine_similarity": _cosine_similarity,
    "kl_div": _rowwise(aten.kl_div.default),
    "einsum": _einsum,
    "index": _index,
    "index_put": _index_put,
    "_unsafe_index": _index,
    "_unsafe_index_put": _index_put,
}
