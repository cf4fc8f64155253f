"""verify finds what it is for: each planted bug must be reported, and without it the same plan is exact."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_soap.rewrite import local, lookup, randomness, segment
from torch_soap.runtime import engine, movement
from torch_soap.verify import Report, bits_equal, verify


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def image() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)), torch.randn(2, 2, 8, 5)


def mlp() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(6, 4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def run(make: Any, plan: str, **more: Any) -> Report:
    module, inputs = make()
    return verify(module, inputs, plan, world_size=2, steps=2, **more)


def caught(report: Report) -> None:
    assert not report.ok, "the planted bug went unnoticed"


HALO = "0 h=2\n2 h=2"


def replace_local(monkeypatch: pytest.MonkeyPatch, target: str, fn: Any) -> None:
    monkeypatch.setitem(local.LOCALS, target, fn)


def test_plans_are_exact_without_bugs() -> None:
    assert run(image, HALO).ok
    assert run(mlp, "0 o=[0,1,6]\n2 i=2").ok
    assert run(mlp, "* n=fed").ok
    assert run(lambda: (Attention(), torch.randn(2, 6, 4)), "/scaled_dot_product_attention s=2").ok
    assert run(dropout, "* n=fed").ok


def test_halo_one_row_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the neighbour's is taken for padding."""
    original = local.LOCALS["conv2d"]

    def short(e: local.Emit, call: local.Call) -> Any:
        if call.is_cut("h") and call.interval("h")[0] > 0 and call.operands[0] is not None:
            x = call.operands[0]
            first = e(torch.zeros_like, e(torch.Tensor.narrow, x, 2, 0, 1))
            rest = e(torch.Tensor.narrow, x, 2, 1, len(call.box("input")[2]) - 1)
            call.operands[0] = e(torch.cat, [first, rest], 2)
        return original(e, call)

    replace_local(monkeypatch, "conv2d", short)
    caught(run(image, HALO))


def test_two_cut_points_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows land where those of another part belong."""
    original = movement.index_of

    def swapped(box: Any, shape: list[int]) -> Any:
        out = original(box, shape)
        return [(d, [(5 - end, 5 - begin) for begin, end in runs] if shape[d] == 5 else runs) for d, runs in out]

    monkeypatch.setattr(movement, "index_of", swapped)
    caught(run(mlp, "0 n=[0,1,6]\n2 n=[0,4,6]"))


def test_gradients_not_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "reduce_bucket", keep_own_part)
    caught(run(mlp, "* n=fed"))


def test_partial_sum_not_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of Megatron's MLP: a rank takes its own addend for the sum."""
    original = movement.Assembly

    def own_addend(transfers: list[movement.PlannedTransfer]) -> movement.Assembly:
        for t in transfers:
            addends = [m for m in t.moves if m.dst >= 0 and m.peer < 0]
            if t.adds and len(t.results) == 1 and len(addends) == 1 and not addends[0].dst_index:
                t.arriving = {addends[0].dst: addends}
        return original(transfers)

    monkeypatch.setattr(movement, "Assembly", own_addend)
    caught(run(mlp, "0 o=2\n2 i=2"))


def keep_own_part(bucket: movement.Bucket, comm: Any, read: Any, out: Any) -> None:
    for source, reached in zip(bucket.sources, bucket.reached, strict=True):
        own = read(source, bucket.dtype).clone()
        out += [(value, own) for value in reached]


def test_bucket_skipped_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank keeps its own gradients; the others sum."""
    original = movement.reduce_bucket

    def skipping(bucket: movement.Bucket, comm: Any, read: Any, out: Any) -> None:
        start = len(out)
        original(bucket, comm, read, out)
        if comm.rank == 1:
            del out[start:]
            keep_own_part(bucket, comm, read, out)

    monkeypatch.setattr(movement, "reduce_bucket", skipping)
    report = run(mlp, "* n=fed")
    caught(report)
    assert any("replicas differ" in f for f in report.failures)


def dropout() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)), torch.randn(6, 4)


def test_dropout_keyed_by_local_index(monkeypatch: pytest.MonkeyPatch) -> None:
    original = randomness.runs_of

    def from_zero(box: Any) -> Any:
        return [[(0, sum(end - begin for begin, end in runs))] for runs in original(box)]

    monkeypatch.setattr(randomness, "runs_of", from_zero)
    caught(run(dropout, "* n=fed"))


def test_causal_mask_without_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lookup.causal_mask

    def local_mask(rows: Any, columns: Any) -> torch.Tensor:
        return original([(0, sum(e - b for b, e in rows))], columns)

    monkeypatch.setattr(lookup, "causal_mask", local_mask)
    caught(run(lambda: (Attention(), torch.randn(2, 6, 4)), "/scaled_dot_product_attention s=2"))


def test_loss_mean_over_local_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank divides by what it has: wrong as soon as ranks ignore different numbers of targets."""

    def model() -> tuple[nn.Module, Any]:
        target = torch.tensor([0, -100, -100, 2, 1, 1])
        return nn.Linear(4, 3), (torch.randn(6, 4), target)

    plan = "* n=fed"
    assert run(model, plan, loss=F.cross_entropy).ok
    original = local.LOCALS["ce_count"]

    def own_count(e: local.Emit, call: local.Call) -> Any:
        made = original(e, call)
        made = made[0] if isinstance(made, list) else made
        return e(torch.full_like, made, 6 / 2 if call.is_cut("n") or call.is_cut("d0") else 4.0)

    replace_local(monkeypatch, "ce_count", own_count)
    caught(run(model, plan, loss=F.cross_entropy))


def test_gradient_of_a_halo_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a neighbour read of my rows has a gradient that is mine."""
    original = movement.Assembly

    def own_only(transfers: list[movement.PlannedTransfer]) -> movement.Assembly:
        for t in transfers:
            if t.adds and any(m.peer >= 0 and not m.send for m in t.moves):
                t.arriving = {}
        return original(transfers)

    monkeypatch.setattr(movement, "Assembly", own_only)
    caught(run(image, HALO))


def test_empty_tile_that_is_not_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = itertools.count(1)
    monkeypatch.setattr(movement, "identity", lambda *_: next(counter))
    monkeypatch.setattr(segment, "identity", lambda *_: next(counter))
    caught(run(mlp, "0 i=[0,0,4]\n2 i=[0,2,6]", rows=[6, 0]))


def test_replicas_are_compared_whatever_their_strides() -> None:
    column = torch.ones(3, 1, dtype=torch.float64)
    assert bits_equal(column.as_strided((3, 1), (1, 3)), column)
    assert not bits_equal(column.as_strided((3, 1), (1, 3)), column + 1e-16 + 2.0**-52)


def test_bucket_that_swaps_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parameters of equal shape get each other's sum."""
    original = movement.reduce_bucket

    def swapped(bucket: movement.Bucket, comm: Any, read: Any, out: Any) -> None:
        start = len(out)
        original(bucket, comm, read, out)
        values, sums = zip(*out[start:], strict=True)
        by_shape = [i for i, s in enumerate(sums) if s.shape == sums[0].shape]
        if len(by_shape) > 1:
            out[start:] = [(values[i], sums[by_shape[by_shape.index(i) - 1] if i in by_shape else i]) for i in range(len(sums))]

    monkeypatch.setattr(movement, "reduce_bucket", swapped)
    caught(run(square, "* n=fed"))


def square() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), torch.randn(6, 5)


def test_pieces_that_overwrite_instead_of_adding(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.plan_step

    def overwriting(*args: Any) -> movement.PlannedStep:
        step = original(*args)
        for transfer in step.transfers:
            transfer.adds = False
        return step

    monkeypatch.setattr(engine, "plan_step", overwriting)
    caught(run(image, HALO))
