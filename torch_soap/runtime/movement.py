"""Executes the movements of a step: pack, one collective, unpack. One definition serves values and gradients.

What is local, packing and putting together, runs in C++ (csrc/movement/movement.h), compiled for a step when it runs for the first time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_soap import _C, _backend
from torch_soap.rewrite.segment import identity
from torch_soap.runtime.comm import Comm

Box = list[Any]
Index = list[tuple[int, list[tuple[int, int]]]]  # (dim, runs) for the dims that aren't taken whole
Read = Callable[[int, torch.dtype], torch.Tensor]
Place = Callable[[int], torch.Tensor | None]
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
    src_index: Index
    dst_index: Index
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

    def sums_as_they_are(self) -> bool:
        return self.sums == self.dtype and not self.dtype.is_complex


class Packing:
    """What this rank sends in a step."""

    def __init__(self, step: PlannedStep) -> None:
        sends = [(t, m) for t in step.transfers if not t.all_reduce for m in t.moves if m.send]
        wanted = {m.peer for _, m in sends}
        self.peers = [r for r in step.ranks if r in wanted]
        self.sources = list(dict.fromkeys((m.src, t.dtype) for t, m in sends))
        peers, sources = numbered(self.peers), numbered(self.sources)
        parts = [(peers[m.peer], sources[m.src, t.dtype], t.dtype, m.src_shape, m.src_index) for t, m in sends]
        self.local = _backend.Packing(parts, len(self.peers))


class Assembly:
    """What this rank puts together of pieces in a step: its own, and what comes from others."""

    def __init__(self, transfers: list[PlannedTransfer]) -> None:
        pieces = [(t, m) for t in transfers for value, _ in t.results for m in t.arriving.get(value, ())]
        self.results = [value for t in transfers for value, _ in t.results]
        self.sources = list(dict.fromkeys((m.src, t.dtype) for t, m in pieces if m.peer < 0))
        self.peers = list(dict.fromkeys(m.peer for _, m in pieces if m.peer >= 0 and m.num_elements))
        sources, messages = numbered(self.sources), numbered(self.peers)
        begins = dict.fromkeys(self.peers, 0)
        planned: list[Any] = []
        for t in transfers:
            how = (_backend.Combine.maximum if t.maximum else _backend.Combine.add) if t.adds else _backend.Combine.replace
            sums = sums_in(t.dtype) if t.adds and not t.maximum else t.dtype
            for value, shape in t.results:
                parts: list[Any] = []
                for m in t.arriving.get(value, ()):
                    if m.peer < 0:
                        parts.append((sources[m.src, t.dtype], -1, 0, m.src_shape, m.src_index, m.dst_index))
                        continue
                    begin = begins.get(m.peer, 0)
                    parts.append((-1, messages.get(m.peer, -1), begin, m.src_shape, [], m.dst_index))
                    begins[m.peer] = begin + m.num_elements * t.dtype.itemsize
                planned.append((shape, t.dtype, sums, how, identity(t.reduce, t.dtype), parts))
        self.local = _backend.Assembly(planned)
        self.placed = [self.results[i] for i in self.local.placed]

    def given(self, read: Read, place: Place | None) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """The sources that this rank has, and memory for results, where there is some."""
        return [read(value, dtype) for value, dtype in self.sources], [] if place is None else [place(value) for value in self.placed]


@dataclass
class PlannedStep:
    ranks: list[int]
    transfers: list[PlannedTransfer]
    same: tuple[tuple[int, int], torch.dtype] | None = field(init=False)  # of a step that is only that (see PlannedTransfer)
    expected: dict[int, int] = field(init=False)  # bytes from each peer
    rank: int = field(init=False, default=-1)  # whom the rest is for
    packing: Packing | None = field(init=False, default=None)  # None: there is no exchange
    assembly: Assembly | None = field(init=False, default=None)
    exchange: _backend.Exchange | None = field(init=False, default=None)  # of both, among ranks that share memory
    buckets: list[Bucket] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        first = self.transfers[0].same if len(self.transfers) == 1 and not self.ranks else None
        self.same = None if first is None else (first, self.transfers[0].dtype)
        self.expected = {}
        for t in self.transfers:
            for m in t.moves if not t.all_reduce else ():
                if not m.send and m.peer >= 0:
                    self.expected[m.peer] = self.expected.get(m.peer, 0) + m.num_elements * t.dtype.itemsize

    def sort(self, rank: int) -> None:
        """Tells apart what this rank reduces and what it puts together from pieces."""
        others: list[PlannedTransfer] = []
        grouped: dict[tuple[tuple[int, ...], torch.dtype, bool], list[PlannedTransfer]] = {}
        for t in self.transfers:
            if t.all_reduce and rank in t.ranks:
                grouped.setdefault((tuple(t.ranks), t.dtype, t.maximum), []).append(t)
            else:
                others.append(t)
        self.buckets = [Bucket(ranks, dtype, maximum, transfers) for (ranks, dtype, maximum), transfers in grouped.items()]
        self.packing = Packing(self) if self.ranks else None
        self.assembly = Assembly(others) if others or self.ranks else None
        if self.packing is not None and self.assembly is not None:
            place = numbered(self.ranks)
            to, from_ = [place[r] for r in self.packing.peers], [place[r] for r in self.assembly.peers]
            self.exchange = _backend.Exchange(self.packing.local, to, self.assembly.local, from_, place[rank], len(self.ranks))
        self.rank = rank


def numbered(items: Sequence[Any]) -> dict[Any, int]:
    return {item: i for i, item in enumerate(items)}


def index_of(box: Box, shape: Sequence[int]) -> Index:
    """How to reach a box of positions: the runs of each dim, whole dims left out."""
    parts = [(dim, part) for dim, (part, size) in enumerate(zip(box, shape, strict=True)) if not part.is_all(size)]
    return [(dim, [(part.begin, part.end)] if part.is_interval else list(part.runs)) for dim, part in parts]


def positions(runs: list[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(begin, end) for begin, end in runs])


def take(tensor: torch.Tensor, index: Index) -> torch.Tensor:
    """A part of a tensor: a view where it has one run in each dim."""
    for dim, runs in index:
        begin, end = runs[0]
        tensor = tensor.narrow(dim, begin, end - begin) if len(runs) == 1 else tensor.index_select(dim, positions(runs))
    return tensor


def put(target: torch.Tensor, index: Index, piece: torch.Tensor) -> None:
    """Writes the piece into a part of the target."""
    view = take(target, [(d, runs) for d, runs in index if len(runs) == 1])
    lists = {d: positions(runs) for d, runs in index if len(runs) > 1}
    if not lists:
        view.copy_(piece)
        return
    # Advanced indices next to each other keep their place; apart they come first. Move them all to the front.
    dims = [*lists, *(d for d in range(target.dim()) if d not in lists)]
    view.permute(dims)[torch.meshgrid(*lists.values(), indexing="ij")] = piece.permute(dims)


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


def execute(step: PlannedStep, comm: Comm, read: Read, place: Place | None = None) -> list[tuple[int, torch.Tensor]]:
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
    shared = comm.shared(step.ranks) if step.packing is not None else None
    if step.assembly is not None:
        if step.packing is None:
            out += combine(step.assembly, read, {}, place)
        elif step.exchange is None or shared is None:
            out += combine(step.assembly, read, comm.exchange(packed(step.packing, read), step.expected, step.ranks), place)
        else:
            outgoing = [read(value, dtype) for value, dtype in step.packing.sources]
            own, places = step.assembly.given(read, place)
            made = shared.exchange(step.exchange, step.packing.local.num_bytes, outgoing, own, places)
            out += zip(step.assembly.results, made, strict=True)
    for bucket in step.buckets:
        reduce_bucket(bucket, comm, read, out)
    return out


def compiled(step: PlannedStep, comm: Comm) -> _backend.Step | None:
    """The same as one call; None where ranks that don't share memory communicate."""
    out = _backend.Step()
    if step.same is not None:
        (source, result), dtype = step.same
        return _backend.Step.as_it_is((source, dtype), result)
    if step.rank != comm.rank:
        step.sort(comm.rank)
    if step.packing is not None:
        shared = comm.shared(step.ranks)
        if shared is None or step.exchange is None or step.assembly is None:
            return None
        num_bytes = step.packing.local.num_bytes
        out.exchange(step.exchange, shared.backend, step.ranks, num_bytes, step.packing.sources, step.assembly.sources, step.assembly.results)
    elif step.assembly is not None:
        out.assemble(step.assembly.local, step.assembly.sources, step.assembly.results)
    for bucket in step.buckets:
        shared = comm.shared(bucket.ranks) if bucket.sums_as_they_are() else None
        if shared is None:
            return None
        sources = [(value, bucket.dtype) for value in bucket.sources]
        out.all_reduce(shared.backend, list(bucket.ranks), bucket.maximum, sources, bucket.reached, bucket.empty)
    return out


def packed(packing: Packing, read: Read) -> dict[int, torch.Tensor]:
    """What goes to each peer, as bytes."""
    parts = packing.local.pack([read(value, dtype) for value, dtype in packing.sources])
    return dict(zip(packing.peers, parts, strict=True))


def combine(assembly: Assembly, read: Read, received: dict[int, torch.Tensor], place: Place | None = None) -> list[tuple[int, torch.Tensor]]:
    """What is made of pieces here."""
    own, places = assembly.given(read, place)
    return list(zip(assembly.results, assembly.local.unpack(own, [received[p] for p in assembly.peers], places), strict=True))


def reduce_bucket(bucket: Bucket, comm: Comm, read: Read, out: list[tuple[int, torch.Tensor]]) -> None:
    sources = [read(value, bucket.dtype) for value in bucket.sources]
    shared = comm.shared(bucket.ranks) if bucket.sums_as_they_are() else None
    if shared is not None:
        results = shared.all_reduce(sources, bucket.maximum)
    else:
        flat = comm.all_reduce(_backend.flatten(sources, bucket.sums), bucket.ranks, bucket.maximum).to(bucket.dtype)
        results = _backend.unflatten(flat, sources)
    for result, reached in zip(results, bucket.reached, strict=True):
        out += [(value, result) for value in reached]
    out += [(v, torch.empty(shape, dtype=bucket.dtype)) for v, shape in bucket.empty]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where a fresh tensor would lie: BLAS may sum in another order at another alignment, and replicas must not."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone(memory_format=torch.contiguous_format)
