"""Executes the movements of a step: pack, one collective, unpack. One definition serves values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_soap import _C
from torch_soap.rewrite.segment import identity
from torch_soap.runtime.comm import Comm

Box = list[Any]
LOW = (torch.bfloat16, torch.float16)
ALIGNMENT = 64  # bytes, of torch's CPU allocator


def sums_in(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are added up in, over ranks and chunks."""
    return torch.float32 if dtype in LOW else dtype


@dataclass
class PlannedMove:
    peer: int
    send: bool
    src: int
    dst: int
    src_index: list[tuple[int, Any]]  # (dim, slice or index tensor) for the dims that aren't read whole
    dst_index: list[tuple[int, Any]]
    src_shape: list[int]
    num_elements: int


@dataclass
class PlannedTransfer:
    all_reduce: bool
    maximum: bool
    adds: bool  # several pieces may land on one element
    dtype: torch.dtype
    ranks: list[int]
    moves: list[PlannedMove]
    results: list[tuple[int, list[int]]]  # value, its local shape
    reduce: Any


@dataclass
class PlannedStep:
    ranks: list[int]
    transfers: list[PlannedTransfer]


def index_of(box: Box, shape: list[int]) -> list[tuple[int, Any]]:
    """How to reach a box of positions: a slice where it is contiguous, an index tensor where not; whole dims are left out."""
    out: list[tuple[int, Any]] = []
    for dim, (part, size) in enumerate(zip(box, shape, strict=True)):
        if part.is_all(size):
            continue
        if part.is_interval:
            out.append((dim, slice(part.begin, part.end)))
        else:
            out.append((dim, torch.cat([torch.arange(b, e) for b, e in part.runs])))
    return out


def take(tensor: torch.Tensor, index: list[tuple[int, Any]]) -> torch.Tensor:
    for dim, part in index:
        tensor = tensor.narrow(dim, part.start, part.stop - part.start) if isinstance(part, slice) else tensor.index_select(dim, part)
    return tensor


def put(target: torch.Tensor, index: list[tuple[int, Any]], piece: torch.Tensor, how: Callable[..., torch.Tensor] | None) -> None:
    """Writes the piece into a part of the target; `how` combines it with what is there."""
    slices = [(d, p) for d, p in index if isinstance(p, slice)]
    lists = [(d, p) for d, p in index if not isinstance(p, slice)]
    view = take(target, slices)
    if not lists:
        if how is None:
            view.copy_(piece)
        else:
            how(view, piece, out=view)
        return
    where: list[Any] = [slice(None)] * target.dim()
    if len(lists) == 1:
        where[lists[0][0]] = lists[0][1]
    else:
        for (dim, _), grid in zip(lists, torch.meshgrid(*[p for _, p in lists], indexing="ij"), strict=True):
            where[dim] = grid
        # Advanced indices next to each other keep their place; apart they come first. Move them all to the front.
        dims = [d for d, _ in lists]
        rest = [d for d in range(target.dim()) if d not in dims]
        view = view.permute(dims + rest)
        piece = piece.permute(dims + rest)
        where = [where[d] for d in dims]
    current = None if how is None else view[tuple(where)]
    view[tuple(where)] = piece if how is None or current is None else how(current, piece)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """With the strides of what comes by wire, also along dims of size 1, which `contiguous` leaves: kernels choose by strides how they
    sum, and replicas must agree to the last bit."""
    tensor = tensor.contiguous()
    strides = [1] * tensor.dim()
    for d in reversed(range(tensor.dim() - 1)):
        strides[d] = strides[d + 1] * max(tensor.shape[d + 1], 1)
    return tensor if list(tensor.stride()) == strides else tensor.as_strided(tensor.shape, strides)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return dense(tensor).reshape(-1).view(torch.uint8)


def plan_step(program: _C.Program, rank_program: _C.RankProgram, instruction: _C.Instruction, dtypes: dict[str, torch.dtype]) -> PlannedStep:
    values = rank_program.values
    transfers = []
    for t in instruction.transfers:
        tensor = program.graph.tensors[program.groups[t.item.id].tensor]
        moves = []
        for m in t.moves:
            src_shape = [len(s) for s in m.src_box] if m.src >= 0 else [len(s) for s in m.dst_box]
            moves.append(
                PlannedMove(
                    peer=m.peer,
                    send=m.send,
                    src=m.src,
                    dst=m.dst,
                    src_index=index_of(m.src_box, list(values[m.src].shape)) if m.src >= 0 else [],
                    dst_index=index_of(m.dst_box, list(values[m.dst].shape)) if m.dst >= 0 else [],
                    src_shape=src_shape,
                    num_elements=m.elements,
                )
            )
        transfers.append(
            PlannedTransfer(
                all_reduce=t.pattern == _C.Pattern.all_reduce,
                maximum=t.reduce == _C.Reduce.max,
                adds=t.reduce != _C.Reduce.none,
                dtype=dtypes[tensor.dtype],
                ranks=list(t.ranks),
                moves=moves,
                results=[(v, list(values[v].shape)) for v in t.results],
                reduce=t.reduce,
            )
        )
    return PlannedStep(ranks=list(instruction.ranks), transfers=transfers)


def execute(
    step: PlannedStep, comm: Comm, read: Callable[[int, torch.dtype], torch.Tensor], place: Callable[[int], torch.Tensor | None] | None = None
) -> list[tuple[int, torch.Tensor]]:
    """Runs the movements. `read(value)` gives a source; returns the completed destinations: (value, tensor), transfer by transfer (a
    gradient may be completed by several). `place(value)`: memory for a destination that is assembled of several pieces.

    Every replica of a destination combines the same pieces in the same order, so replicas stay bitwise equal.
    """
    out: list[tuple[int, torch.Tensor]] = []
    received: dict[int, torch.Tensor] = {}
    if step.ranks:
        expected: dict[int, int] = {}
        for t in step.transfers:
            if t.all_reduce:
                continue
            for m in t.moves:
                if not m.send and m.peer >= 0:
                    expected[m.peer] = expected.get(m.peer, 0) + m.num_elements * t.dtype.itemsize
        received = comm.exchange(packed(step, read), expected, step.ranks)
    offsets = dict.fromkeys(received, 0)
    buckets: dict[tuple[Any, ...], list[PlannedTransfer]] = {}
    for t in step.transfers:
        if t.all_reduce and comm.rank in t.ranks:
            buckets.setdefault((tuple(t.ranks), t.dtype, t.maximum), []).append(t)
        else:
            combine(t, read, received, offsets, out, place)
    for (ranks, dtype, maximum), transfers in buckets.items():
        out += reduce_bucket(transfers, ranks, dtype, maximum, comm, read)
    return out


def packed(step: PlannedStep, read: Callable[[int, torch.dtype], torch.Tensor]) -> dict[int, torch.Tensor]:
    """What goes to each peer, as bytes: a view of the source where that is one stretch of its memory and all that goes there, else parts of one new tensor."""
    parts: dict[int, list[torch.Tensor]] = {}
    for t in step.transfers:
        if not t.all_reduce:
            for m in t.moves:
                if m.send:
                    parts.setdefault(m.peer, []).append(take(read(m.src, t.dtype), m.src_index))
    every = [part for r in step.ranks for part in parts.get(r, [])]
    if all(len(own) == 1 for own in parts.values()) and all(part.is_contiguous() for part in every):
        return {peer: bytes_of(own[0]) for peer, own in parts.items()}
    flat = torch.empty(sum(part.numel() * part.element_size() for part in every), dtype=torch.uint8)
    begin = 0
    for part in every:
        stretch = flat[begin : begin + part.numel() * part.element_size()]
        begin += stretch.numel()
        if part.is_contiguous() or stretch.storage_offset() % part.element_size():
            stretch.copy_(bytes_of(part))
        else:  # gathered and packed in one go
            stretch.view(part.dtype).view(part.shape).copy_(part)
    sizes = {r: sum(part.numel() * part.element_size() for part in parts[r]) for r in step.ranks if r in parts}
    return dict(zip(sizes, flat.split(list(sizes.values())), strict=True))


def reduce_bucket(
    transfers: list[PlannedTransfer], ranks: tuple[int, ...], dtype: torch.dtype, maximum: bool, comm: Comm, read: Callable[[int, torch.dtype], torch.Tensor]
) -> list[tuple[int, torch.Tensor]]:
    """All-reduces of one step among the same ranks, as one flat tensor."""
    sources = [read(next(m.src for m in t.moves if m.src >= 0), dtype) for t in transfers]
    flat = torch.cat([s.reshape(-1) for s in sources]) if len(sources) > 1 else sources[0].clone().reshape(-1)
    flat = comm.all_reduce(flat.to(dtype if maximum else sums_in(dtype)), ranks, maximum).to(dtype)
    parts = flat.split([s.numel() for s in sources])
    out = []
    for t, source, part in zip(transfers, sources, parts, strict=True):
        result = part.reshape(source.shape)
        reached = list(dict.fromkeys(m.dst for m in t.moves if m.dst >= 0))
        out += [(dst, result) for dst in reached]
        out += [(v, torch.empty(shape, dtype=dtype)) for v, shape in t.results if v not in reached]  # empty copies
    return out


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where a fresh tensor would lie: BLAS may sum in another order at another alignment, and replicas must not."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone(memory_format=torch.contiguous_format)


def combine(
    t: PlannedTransfer,
    read: Callable[[int, torch.dtype], torch.Tensor],
    received: dict[int, torch.Tensor],
    offsets: dict[int, int],
    out: list[tuple[int, torch.Tensor]],
    place: Callable[[int], torch.Tensor | None] | None = None,
) -> None:
    arriving: dict[int, list[PlannedMove]] = {}
    for m in t.moves:
        if m.dst >= 0:
            arriving.setdefault(m.dst, []).append(m)
    how: Callable[..., torch.Tensor] | None = (torch.maximum if t.maximum else torch.add) if t.adds else None
    dtype = sums_in(t.dtype) if t.adds and not t.maximum else t.dtype
    for value, shape in t.results:
        pieces = arriving.get(value, [])
        target: torch.Tensor | None = None
        own = False  # nobody else has this memory
        for m in pieces:
            if m.peer < 0:
                piece = take(read(m.src, t.dtype), m.src_index)
            else:
                num_bytes = m.num_elements * t.dtype.itemsize
                raw = received[m.peer][offsets[m.peer] : offsets[m.peer] + num_bytes]
                offsets[m.peer] += num_bytes
                piece = (raw if raw.storage_offset() % t.dtype.itemsize == 0 else raw.clone()).view(t.dtype).reshape(m.src_shape)
            piece = piece.to(dtype)
            if not m.dst_index and target is None:
                target, own = dense(piece), not piece.is_contiguous()
                continue
            if not m.dst_index and how is not None:
                target, own = how(target, piece, out=target) if own else how(target, piece), True
                continue
            if not m.dst_index:
                target, own = dense(piece), False
                continue
            if target is None:
                target = place(value) if place is not None and not t.adds else None
                if target is None:
                    target = torch.full(shape, identity(t.reduce, dtype), dtype=dtype) if t.adds else torch.empty(shape, dtype=dtype)
                own = True
            elif not own:
                target, own = target.clone(), True  # the first piece may be a view of its source
            put(target, m.dst_index, piece, how)
        if target is None:
            target = torch.full(shape, identity(t.reduce, t.dtype), dtype=t.dtype)
        out.append((value, aligned(target.to(t.dtype))))
