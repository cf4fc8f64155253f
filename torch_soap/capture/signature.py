"""Shapes of a call's input tensors, and which of their dims are rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

Shape = tuple[int, ...]
Signature = tuple[tuple[Shape, torch.dtype], ...]

MAX_CHOICES = 6


def signature_of(inputs: Any) -> Signature:
    """Of the tensors in any structure; a signature is its own."""
    if isinstance(inputs, tuple) and all(isinstance(i, tuple) and len(i) == 2 and isinstance(i[1], torch.dtype) for i in inputs):
        return inputs
    return tuple((tuple(t.shape), t.dtype) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor))


def batch_dim_choices(signature: Signature) -> list[list[int | None]]:
    """Which dims may be the rows, likeliest first: the rows are dim 0 of the first input that has dims, and of every other
    input the first dim of that size. A coincidence of sizes ([T, T] masks, h0 of as many layers as rows) is told by replay."""
    rows = next((shape[0] for shape, _ in signature if shape), None)
    first = next((i for i, (shape, _) in enumerate(signature) if shape), None)
    options: list[list[int | None]] = []
    for i, (shape, _) in enumerate(signature):
        fitting: list[int | None] = [d for d, size in enumerate(shape) if size == rows]
        options.append([0] if i == first else [*fitting, None])
    likely = [[o[0] for o in options]]
    for pick in itertools.islice(itertools.product(*options), 64):
        if list(pick) not in likely:
            likely.append(list(pick))
    changes = [sum(a != b for a, b in zip(c, likely[0], strict=True)) for c in likely]
    return [c for _, c in sorted(zip(changes, likely, strict=True), key=lambda pair: pair[0])][:MAX_CHOICES]


def example_rows(signature: Signature, dims: Sequence[int | None]) -> int:
    return next((shape[d] for (shape, _), d in zip(signature, dims, strict=True) if d is not None), 0)


def scaled(signature: Signature, dims: Sequence[int | None], factor: int, add: int = 0) -> Signature:
    """The signature with `rows * factor + add` rows (at least one, where there are none)."""
    out = []
    for (shape, dtype), dim in zip(signature, dims, strict=True):
        new = list(shape)
        if dim is not None:
            new[dim] = (max(new[dim], 1) if factor > 1 else new[dim]) * factor + add
        out.append((tuple(new), dtype))
    return tuple(out)


def without_rows(signature: Signature, dims: Sequence[int | None]) -> tuple[tuple[tuple[int | None, ...], torch.dtype], ...]:
    """What a trace with dynamic rows is baked for.

    Raises:
        ValueError: the inputs have different numbers of rows.
    """
    rows = {shape[d] for (shape, _), d in zip(signature, dims, strict=True) if d is not None}
    if len(rows) > 1:
        raise ValueError(f"[capture] the inputs have different numbers of rows: {[list(s) for s, _ in signature]}, rows in dims {list(dims)}")
    return tuple((tuple(None if d == dim else s for d, s in enumerate(shape)), dtype) for (shape, dtype), dim in zip(signature, dims, strict=True))


def moved_dims(shape: Shape, with_one_row_more: Shape) -> tuple[int | None, int]:
    """The dim that moved with the batch and how far; (None, 1) if none did."""
    for d, (a, b) in enumerate(zip(shape, with_one_row_more, strict=True)):
        if a != b:
            return d, b - a
    return None, 1
