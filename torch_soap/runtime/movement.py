"""Executes the movements of a step: pack, one collective, unpack. One definition serves values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    arriving: dict[int, list[PlannedMove]] = field(init=False)  # result -> what it is made of
    same: tuple[int, int] | None = field(init=False)  # source and result, where the result is the source as it is

    def __post_init__(self) -> None:
        self.arriving = {}
        for m in self.moves:
            if m.dst >= 0:
                self.arriving.setdefault(m.dst, []).append(m)
        self.same = None
        if not self.all_reduce and len(self.moves) == len(self.results) == 1:
            m, (value, _) = self.moves[0], self.results[0]
            if m.peer < 0 and m.dst == value and not m.src_index and not m.dst_index:
                self.same = m.src, value


@dataclass
class Bucket:
    """All-reduces of one step among the same ranks, as one flat tensor."""

    ranks: tuple[int, ...]
    dtype: torch.dtype
    maximum: bool
    transfers: list[PlannedTransfer]
    sources: list[int] = field(init=False)
    reached: list[list[int]] = field(init=False)  # by transfer: values that are the sum
    empty: list[tuple[int, list[int]]] = field(init=False)  # copies without elements, and their shapes
    sums: torch.dtype = field(init=False)  # that in which the network adds up

    def __post_init__(self) -> None:
        self.sources = [next(m.src for m in t.moves if m.src >= 0) for t in self.transfers]
        self.reached = [list(t.arriving) for t in self.transfers]
        self.empty = [(v, shape) for t, reached in zip(self.transfers, self.reached, strict=True) for v, shape in t.results if v not in reached]
        self.sums = self.dtype if self.maximum else sums_in(self.dtype)


@dataclass
class PlannedStep:
    ranks: list[int]
    transfers: list[PlannedTransfer]
    same: tuple[tuple[int, int], torch.dtype] | None = field(init=False)  # of a step that is only that (see PlannedTransfer)
    expected: dict[int, int] = field(init=False)  # bytes from each peer
    sends: list[tuple[PlannedTransfer, PlannedMove]] = field(init=False)
    rank: int = field(init=False, default=-1)  # whom buckets and others are for
    buckets: list[Bucket] = field(init=False, default_factory=list)
    others: list[PlannedTransfer] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        first = self.transfers[0].same if len(self.transfers) == 1 and not self.ranks else None
        self.same = None if first is None else (first, self.transfers[0].dtype)
        exchanged = [(t, m) for t in self.transfers if not t.all_reduce for m in t.moves]
        self.sends = [(t, m) for t, m in exchanged if m.send]
        self.expected = {}
        for t, m in exchanged:
            if not m.send and m.peer >= 0:
                self.expected[m.peer] = self.expected.get(m.peer, 0) + m.num_elements * t.dtype.itemsize

    def sort(self, rank: int) -> None:
        """Tells apart what this rank reduces and what it puts together from pieces."""
        self.rank, self.others = rank, []
        grouped: dict[tuple[tuple[int, ...], torch.dtype, bool], list[PlannedTransfer]] = {}
        for t in self.transfers:
            if t.all_reduce and rank in t.ranks:
                grouped.setdefault((tuple(t.ranks), t.dtype, t.maximum), []).append(t)
            else:
                self.others.append(t)
        self.buckets = [Bucket(ranks, dtype, maximum, transfers) for (ranks, dtype, maximum), transfers in grouped.items()]


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


@functools.lru_cache(maxsize=1 << 14)
def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * max(shape[d + 1], 1)
    return tuple(strides)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """With the strides of what comes by wire, also along dims of size 1, which `contiguous` leaves: kernels choose by strides how they
    sum, and replicas must agree to the last bit."""
    strides = dense_strides(tensor.shape)
    if tensor.stride() == strides:
        return tensor
    tensor = tensor.contiguous()
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


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
    if step.same is not None:
        (source, result), dtype = step.same
        return [(result, aligned(dense(read(source, dtype).to(dtype))))]
    if step.rank != comm.rank:
        step.sort(comm.rank)
    out: list[tuple[int, torch.Tensor]] = []
    received: dict[int, torch.Tensor] = {}
    if step.ranks:
        received = comm.exchange(packed(step, read), step.expected, step.ranks)
    offsets = dict.fromkeys(received, 0)
    for t in step.others:
        combine(t, read, received, offsets, out, place)
    for bucket in step.buckets:
        reduce_bucket(bucket, comm, read, out)
    return out


def packed(step: PlannedStep, read: Callable[[int, torch.dtype], torch.Tensor]) -> dict[int, torch.Tensor]:
    """What goes to each peer, as bytes: a view of the source where that is one stretch of its memory and all that goes there, else parts of one new tensor."""
    parts: dict[int, list[torch.Tensor]] = {}
    for t, m in step.sends:
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


def reduce_bucket(bucket: Bucket, comm: Comm, read: Callable[[int, torch.dtype], torch.Tensor], out: list[tuple[int, torch.Tensor]]) -> None:
    sources = [read(value, bucket.dtype) for value in bucket.sources]
    if len(sources) == 1:
        flat = sources[0].to(bucket.sums, memory_format=torch.contiguous_format, copy=True)
        flat = comm.all_reduce(flat, bucket.ranks, bucket.maximum).to(bucket.dtype)
        results = [flat]
    else:
        flat = torch.cat([s.reshape(-1) for s in sources])
        flat = comm.all_reduce(flat.to(bucket.sums), bucket.ranks, bucket.maximum).to(bucket.dtype)
        parts = flat.split([s.numel() for s in sources])
        results = [part.view(source.shape) for source, part in zip(sources, parts, strict=True)]
    for result, reached in zip(results, bucket.reached, strict=True):
        out += [(value, result) for value in reached]
    out += [(v, torch.empty(shape, dtype=bucket.dtype)) for v, shape in bucket.empty]


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
    if t.same is not None:
        source, result = t.same
        out.append((result, aligned(dense(read(source, t.dtype).to(t.dtype)))))
        return
    how: Callable[..., torch.Tensor] | None = (torch.maximum if t.maximum else torch.add) if t.adds else None
    dtype = sums_in(t.dtype) if t.adds and not t.maximum else t.dtype
    for value, shape in t.results:
        pieces = t.arriving.get(value, [])
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
