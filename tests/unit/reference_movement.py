"""What a movement is, element by element: the definition that the compiled one is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_soap.rewrite.segment import identity
from torch_soap.runtime.movement import Index, PlannedStep, PlannedTransfer, positions, sums_in

Read = Callable[[int, torch.dtype], torch.Tensor]


def places(index: Index, shape: list[int]) -> tuple[torch.Tensor, ...]:
    """Of each element of a box of that shape, its position in each dim."""
    runs = dict(index)
    by_dim = [positions(runs[d]) if d in runs else torch.arange(size) for d, size in enumerate(shape)]
    return tuple(torch.meshgrid(*by_dim, indexing="ij")) if by_dim else ()


def part_of(tensor: torch.Tensor, index: Index, shape: list[int]) -> torch.Tensor:
    return tensor[places(index, shape)] if shape else tensor.clone()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8)


def packed(step: PlannedStep, read: Read) -> dict[int, torch.Tensor]:
    parts: dict[int, list[torch.Tensor]] = {}
    for t in step.transfers:
        for m in t.moves:
            if m.send:
                parts.setdefault(m.peer, []).append(bytes_of(part_of(read(m.src, t.dtype), m.src_index, m.src_shape)))
    return {peer: torch.cat(parts[peer]) for peer in step.ranks if peer in parts}


def combined(transfers: list[PlannedTransfer], read: Read, received: dict[int, torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    out: list[tuple[int, torch.Tensor]] = []
    begins = dict.fromkeys(received, 0)
    for t in transfers:
        how: Any = (torch.maximum if t.maximum else torch.add) if t.adds else None
        dtype = sums_in(t.dtype) if t.adds and not t.maximum else t.dtype
        for value, shape in t.results:
            target: torch.Tensor | None = None
            for m in t.arriving.get(value, []):
                if m.peer < 0:
                    piece = part_of(read(m.src, t.dtype), m.src_index, m.src_shape)
                else:
                    end = begins[m.peer] + m.num_elements * t.dtype.itemsize
                    piece = received[m.peer][begins[m.peer] : end].clone().view(t.dtype).reshape(m.src_shape)
                    begins[m.peer] = end
                piece = piece.to(dtype)
                if not m.dst_index and (target is None or how is None):
                    target = piece.clone()
                    continue
                if target is None:
                    target = torch.full(shape, identity(t.reduce, dtype), dtype=dtype)
                where = places(m.dst_index, m.src_shape)
                target[where] = piece if how is None else how(target[where], piece)
            if target is None:
                target = torch.full(shape, identity(t.reduce, dtype), dtype=dtype)
            out.append((value, target.to(t.dtype)))
    return out
