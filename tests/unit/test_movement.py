"""Movements as they are compiled do what their definition says, to the last bit, on random boxes, strides, types and reductions."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.unit import reference_movement
from torch_soap import _C, _backend
from torch_soap.runtime.comm import Traffic
from torch_soap.runtime.movement import ALIGNMENT, Index, PlannedMove, PlannedStep, PlannedTransfer, dense_strides, execute, take

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
PEERS = (1, 2)


class Recorder:
    """Rank 0 of three: keeps what is sent, and gives what has been laid out for it."""

    def __init__(self, incoming: dict[int, torch.Tensor]) -> None:
        self.rank, self.world_size, self.traffic = 0, 3, Traffic()
        self.incoming, self.sent = incoming, dict[int, torch.Tensor]()

    def exchange(self, sends: dict[int, torch.Tensor], recv_bytes: dict[int, int], ranks: Any) -> dict[int, torch.Tensor]:
        assert {r: n for r, n in recv_bytes.items() if n} == {r: t.numel() for r, t in self.incoming.items()}
        self.sent = {r: t.clone() for r, t in sends.items()}
        return self.incoming

    def all_reduce(self, tensor: torch.Tensor, ranks: Any, maximum: bool) -> torch.Tensor:
        return tensor * 2

    def shared(self, ranks: Any) -> None:
        return None


def random_values(rng: random.Random, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float64).to(dtype)
    return torch.randint(0, 50, shape, dtype=dtype)


def strided(rng: random.Random, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Values of that shape in memory of one kind or another."""
    kind = rng.randrange(5)
    if kind == 0 and shape:  # dims in another order
        order = rng.sample(range(len(shape)), len(shape))
        return random_values(rng, dtype, *[shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    if kind == 1 and shape:  # one dim is the same element again and again
        dim = rng.randrange(len(shape))
        return random_values(rng, dtype, *[1 if d == dim else n for d, n in enumerate(shape)]).expand(shape)
    if kind == 2 and shape:  # a part of something larger
        return random_values(rng, dtype, *[n + 2 for n in shape])[tuple(slice(1, n + 1) for n in shape)]
    if kind == 3:  # dense, with what strides of dims of size 1 may be
        values = random_values(rng, dtype, *shape)
        return values.as_strided(shape, [7 if n == 1 else s for n, s in zip(shape, values.stride(), strict=True)])
    return random_values(rng, dtype, *shape)


def runs_of(chosen: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i in chosen:
        if runs and runs[-1][1] == i:
            runs[-1] = runs[-1][0], i + 1
        else:
            runs.append((i, i + 1))
    return runs or [(0, 0)]


def random_box(rng: random.Random, sizes: list[int], whole: list[int]) -> Index:
    """A box of `sizes` within a tensor of the shape `whole`."""
    out: Index = []
    for dim, (size, total) in enumerate(zip(sizes, whole, strict=True)):
        kind = rng.randrange(3)
        if size == total and kind:
            continue
        begin = rng.randrange(total - size + 1)
        chosen = list(range(begin, begin + size))
        if kind == 0:
            chosen = sorted(rng.sample(range(total), size))
        elif kind == 1 and size and total >= 2 * size:
            chosen = list(range(0, 2 * size, 2))
        out.append((dim, runs_of(chosen)))
    return out


def partition(rng: random.Random, shape: list[int]) -> list[Index]:
    """Boxes that together are everything, once."""
    boxes: list[Index] = [[]]
    for dim, size in enumerate(shape):
        if size < 2 or rng.random() < 0.5:
            continue
        owner = [rng.randrange(2) for _ in range(size)] if rng.random() < 0.5 else [int(i >= size // 2) for i in range(size)]
        parts = [runs_of([i for i in range(size) if owner[i] == k]) for k in range(2) if k in owner]
        if len(parts) > 1:
            boxes = [[*box, (dim, part)] for box in boxes for part in parts]
    return boxes


def random_step(rng: random.Random) -> tuple[PlannedStep, dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """A step, its sources, and what comes."""
    sources: dict[int, torch.Tensor] = {}
    incoming: dict[int, list[torch.Tensor]] = {}
    transfers = []
    value = 0
    for _ in range(rng.randint(1, 3)):
        dtype = rng.choice(DTYPES)
        reduce = rng.choice([_C.Reduce.none, _C.Reduce.sum] + ([] if dtype.is_complex else [_C.Reduce.max]))
        moves, results = [], []

        def source_of(box: list[int], dtype: torch.dtype = dtype) -> tuple[int, Index]:
            nonlocal value
            whole = [n + rng.choice([0, 0, n, 1]) for n in box]
            value += 1
            sources[value] = strided(rng, dtype, whole)
            return value, random_box(rng, box, whole)

        for _ in range(rng.randint(0, 2)):
            box = [rng.randint(0, 5) if rng.random() < 0.1 else rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
            source, index = source_of(box)
            moves.append(PlannedMove(rng.choice(PEERS), True, source, -1, index, [], box, torch.Size(box).numel()))
        for _ in range(rng.randint(1, 2)):
            shape = [rng.randint(1, 6) for _ in range(rng.randint(0, 4))]
            if rng.random() < 0.05 and shape:
                shape[0] = 0
            value += 1
            result = value
            results.append((result, shape))
            if reduce == _C.Reduce.none:
                boxes = partition(rng, shape)
            else:
                sizes = [shape if rng.random() < 0.4 else [rng.randint(1, n) if n else 0 for n in shape] for _ in range(rng.randint(0, 4))]
                boxes = [random_box(rng, box, shape) for box in sizes]
            for index in boxes:
                runs = dict(index)
                box = [sum(e - b for b, e in runs[d]) if d in runs else n for d, n in enumerate(shape)]
                elements = torch.Size(box).numel()
                if rng.random() < 0.5 or not elements:
                    source, src_index = source_of(box)
                    moves.append(PlannedMove(-1, False, source, result, src_index, index, box, elements))
                else:
                    peer = rng.choice(PEERS)
                    incoming.setdefault(peer, []).append(reference_movement.bytes_of(random_values(rng, dtype, *box)))
                    moves.append(PlannedMove(peer, False, -1, result, [], index, box, elements))
        transfers.append(PlannedTransfer(False, reduce == _C.Reduce.max, reduce != _C.Reduce.none, dtype, [0, *PEERS], moves, results, reduce))
    return PlannedStep([0, *PEERS], transfers), sources, {peer: torch.cat(parts) for peer, parts in incoming.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return reference_movement.bytes_of(tensor)


@pytest.mark.parametrize("threads", [1, 2])
def test_as_defined(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for seed in range(400):
        torch.manual_seed(seed)
        step, sources, incoming = random_step(random.Random(seed))
        untouched = {v: t.clone() for v, t in sources.items()}
        sent = reference_movement.packed(step, lambda v, _, s=sources: s[v])  # type: ignore[misc]
        expected = reference_movement.combined(step.transfers, lambda v, _, s=sources: s[v], incoming)  # type: ignore[misc]
        comm = Recorder(incoming)
        got = execute(step, comm, lambda v, _, s=sources: s[v])  # type: ignore[arg-type,misc]
        assert comm.sent.keys() == sent.keys() and all(torch.equal(comm.sent[p], sent[p]) for p in sent), seed
        assert [v for v, _ in got] == [v for v, _ in expected]
        for (_, ours), (_, theirs) in zip(got, expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(bits(ours), bits(theirs)), seed
            assert ours.stride() == dense_strides(ours.shape) and ours.data_ptr() % ALIGNMENT == 0, seed
        assert all(torch.equal(bits(t), bits(untouched[v])) for v, t in sources.items()), f"seed {seed}: a source has changed"
    torch.set_num_threads(before)


def one(moves: list[PlannedMove], shape: list[int], dtype: torch.dtype = torch.float32, reduce: Any = _C.Reduce.none) -> PlannedStep:
    transfer = PlannedTransfer(False, False, reduce != _C.Reduce.none, dtype, [0, 1], moves, [(9, shape)], reduce)
    return PlannedStep([0, 1], [transfer])


def test_large_pieces_without_rows() -> None:
    """Those that torch's own operators copy and add."""
    image = torch.randn(8, 16, 24, 24).contiguous(memory_format=torch.channels_last)
    index: Index = [(1, [(3, 14)]), (2, [(0, 5), (9, 20)])]
    moves = [PlannedMove(-1, False, 1, 9, index, [(0, [(0, 8)])], [8, 11, 16, 24], 8 * 11 * 16 * 24) for _ in range(2)]
    for reduce in (_C.Reduce.none, _C.Reduce.sum):
        for dtype in (torch.float32, torch.bfloat16):
            step = one(moves, [9, 11, 16, 24], dtype, reduce)
            source = image.to(dtype)
            (_, got), (_, expected) = (
                execute(step, Recorder({}), lambda v, _, s=source: s)[0],  # type: ignore[arg-type,misc]
                reference_movement.combined(step.transfers, lambda v, _, s=source: s, {})[0],  # type: ignore[misc]
            )
            assert torch.equal(got[:8], expected[:8])


def test_nothing_is_copied_that_lies_in_one_stretch() -> None:
    source = torch.randn(6, 4)
    rows: Index = [(0, [(2, 4)])]
    sent = _backend.Packing([(0, 0, torch.float32, [2, 4], rows)], 1).pack([source])
    assert sent[0].data_ptr() == source[2].data_ptr() and sent[0].dtype == torch.uint8 and sent[0].numel() == 32
    whole = one([PlannedMove(-1, False, 1, 9, [], [], [6, 4], 24)], [6, 4])
    whole.ranks = [0, 1]
    assert execute(whole, Recorder({}), lambda v, _: source)[0][1] is source  # type: ignore[arg-type]
    message = torch.zeros(256, dtype=torch.uint8)
    came = one([PlannedMove(1, False, -1, 9, [], [], [4, 16], 64)], [4, 16])
    assert execute(came, Recorder({1: message}), lambda v, _: source)[0][1].data_ptr() == message.data_ptr()  # type: ignore[arg-type]


def lone(move: PlannedMove, shape: list[int], *, ranks: list[int], more: list[PlannedTransfer], all_reduce: bool = False) -> PlannedStep:
    """A step of one move within the rank, and perhaps more."""
    return PlannedStep(ranks, [PlannedTransfer(all_reduce, False, False, torch.float32, [0], [move], [(9, shape)], _C.Reduce.none), *more])


def test_a_step_that_moves_nothing_gives_its_source_back() -> None:
    """Most steps of a rank that keeps what it made: neither a copy nor a call of the compiled movement (PlannedStep.same)."""
    source = torch.randn(6, 4)
    whole = PlannedMove(-1, False, 1, 9, [], [], [6, 4], 24)
    step = lone(whole, [6, 4], ranks=[], more=[])
    assert step.same == ((1, 9), torch.float32)
    ((value, got),) = execute(step, Recorder({}), lambda v, dtype: {1: source}[v])  # type: ignore[arg-type]
    assert value == 9 and got is source and step.assembly is None
    # As if it had come by wire: kernels choose by strides and alignment how they sum, and replicas do the same.
    for odd in (source.t().contiguous().t(), torch.randn(25)[1:].view(6, 4), torch.randn(6, 1, 4).as_strided((6, 4), (4, 1))[:, :]):
        ((_, got),) = execute(step, Recorder({}), lambda v, _, s=odd: s)  # type: ignore[arg-type,misc]
        assert torch.equal(got, odd) and got.stride() == (4, 1) and got.data_ptr() % ALIGNMENT == 0
    ((_, got),) = execute(step, Recorder({}), lambda v, _: source.double())  # type: ignore[arg-type]
    assert got.dtype == torch.float32


def test_a_step_that_does_more_is_carried_out() -> None:
    """Each of these is the move above but for one thing, which the short cut would leave out."""
    source = torch.arange(24.0).view(6, 4)
    rows: Index = [(0, [(2, 4)])]
    part = PlannedMove(-1, False, 1, 9, rows, [], [2, 4], 8)
    ((_, got),) = execute(lone(part, [2, 4], ranks=[], more=[]), Recorder({}), lambda v, _: source)  # type: ignore[arg-type]
    assert torch.equal(got, source[2:4])
    placed = PlannedMove(-1, False, 1, 9, [], rows, [2, 4], 8)
    ((_, got),) = execute(lone(placed, [6, 4], ranks=[], more=[]), Recorder({}), lambda v, _: source[:2])  # type: ignore[arg-type]
    assert torch.equal(got[2:4], source[:2]) and got.shape == (6, 4)
    whole = PlannedMove(-1, False, 1, 9, [], [], [6, 4], 24)
    other = PlannedTransfer(False, False, False, torch.float32, [0], [PlannedMove(-1, False, 2, 8, [], [], [6, 4], 24)], [(8, [6, 4])], _C.Reduce.none)
    got_of = dict(execute(lone(whole, [6, 4], ranks=[], more=[other]), Recorder({}), lambda v, _: source * v))  # type: ignore[arg-type]
    assert torch.equal(got_of[9], source) and torch.equal(got_of[8], source * 2)
    reduced = lone(whole, [6, 4], ranks=[], more=[], all_reduce=True)
    ((_, got),) = execute(reduced, Recorder({}), lambda v, _: source)  # type: ignore[arg-type]
    assert torch.equal(got, source * 2)
    sent = PlannedTransfer(False, False, False, torch.float32, [0, 1], [PlannedMove(1, True, 1, -1, [], [], [6, 4], 24)], [], _C.Reduce.none)
    comm = Recorder({})
    execute(lone(whole, [6, 4], ranks=[0, 1], more=[sent]), comm, lambda v, _: source)  # type: ignore[arg-type]
    assert torch.equal(comm.sent[1].view(torch.float32).view(6, 4), source)


def test_results_are_written_to_given_memory() -> None:
    source, place = torch.randn(3, 4), torch.zeros(6, 4)
    moves = [PlannedMove(-1, False, 1, 9, [], [(0, [(i, i + 3)])], [3, 4], 12) for i in (0, 3)]
    ((_, got),) = execute(one(moves, [6, 4]), Recorder({}), lambda v, _: source, lambda v: place)  # type: ignore[arg-type]
    assert got is place and torch.equal(place, torch.cat([source, source]))
    with pytest.raises(RuntimeError, match=r"memory for a result of shape \[6, 4\] has shape \[4, 6\]"):
        execute(one(moves, [6, 4]), Recorder({}), lambda v, _: source, lambda v: torch.zeros(4, 6))  # type: ignore[arg-type]


def test_a_source_of_another_shape_is_an_error() -> None:
    step = one([PlannedMove(1, True, 1, -1, [(0, [(2, 5)])], [], [3, 4], 12)], [0])
    for shape in ((4, 4), (5, 3), (5, 4, 1)):
        with pytest.raises(RuntimeError, match="a box"):
            execute(step, Recorder({}), lambda v, _, s=shape: torch.zeros(s))  # type: ignore[arg-type,misc]
    with pytest.raises(RuntimeError, match="is sent as"):
        execute(step, Recorder({}), lambda v, _: torch.zeros(5, 4, dtype=torch.float64))  # type: ignore[arg-type]
    short = one([PlannedMove(1, False, -1, 9, [], [], [4, 4], 16)], [4, 4])
    short.expected = {1: 60}
    with pytest.raises(RuntimeError, match="64 bytes from 0 on of a message of 60"):
        execute(short, Recorder({1: torch.zeros(60, dtype=torch.uint8)}), lambda v, _: torch.zeros(()))  # type: ignore[arg-type]


def test_buckets() -> None:
    """Sources of any strides become one tensor, in float32 where they are of half precision; results are views of its sum."""
    rng = random.Random(0)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        sources = {v: strided(rng, dtype, shape) for v, shape in enumerate([[3, 4], [], [5], [0, 2], [2, 1, 3, 2]])}
        moves = {v: [PlannedMove(-1, False, v, 10 + v, [], [], list(s.shape), s.numel())] for v, s in sources.items()}
        transfers = [PlannedTransfer(True, False, True, dtype, [0, 1], moves[v], [(10 + v, list(s.shape))], _C.Reduce.sum) for v, s in sources.items()]
        got = execute(PlannedStep([], transfers), Recorder({}), lambda v, _, s=sources: s[v])  # type: ignore[arg-type,misc]
        assert [v for v, _ in got] == [10, 11, 12, 13, 14]
        for (_, result), source in zip(got, sources.values(), strict=True):
            assert result.dtype == dtype and torch.equal(result, source * 2) and result.stride() == dense_strides(result.shape)
    assert take(torch.arange(6), [(0, [(1, 3), (5, 6)])]).tolist() == [1, 2, 5]
