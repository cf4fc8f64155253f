"""On each rank: the backend soap against gloo and against what must come out; each check gives "" or what is wrong."""

from __future__ import annotations

import datetime
import itertools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torch_soap  # registers the backend
from tests.dist.backend_hosts import calibrated, hosts, mistakes_between_hosts, sender_goes_on
from tests.dist.backend_values import Op, added, everyone, expect, folded, host_ranks, rank, size, values
from tests.dist.launch import report

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.complex128,
]  # fmt: skip
SIZES = [0, 1, 7, 1000, 70_001, 600_003]  # in one slot, in one chunk, in several


def reductions() -> None:
    for dtype, count in itertools.product(DTYPES, SIZES if len(host_ranks()) == 1 else (7, 600_003)):
        ops = [Op.SUM] + ([] if dtype.is_complex else [Op.PRODUCT, Op.MIN, Op.MAX])
        ops += [] if dtype.is_floating_point or dtype.is_complex else [Op.BAND, Op.BOR, Op.BXOR]
        for op in ops if count in (7, 600_003) else ops[:1]:
            parts = everyone(count, dtype)
            wanted, mine = folded(op, parts), parts[rank()].clone()
            dist.all_reduce(mine, op)
            expect(f"all_reduce {op} {count}", mine, wanted)
            root, mine = count % size(), parts[rank()].clone()
            dist.reduce(mine, root, op)
            if rank() == root:
                expect(f"reduce {op} {count}", mine, wanted)
            whole = torch.cat([p.roll(r) for r, p in enumerate([parts[rank()]] * size())])
            out = torch.empty(count, dtype=dtype)
            dist.reduce_scatter_tensor(out, whole, op)
            expect(f"reduce_scatter {op} {count}", out, folded(op, [p.roll(rank()) for p in parts]))
    mean = torch.full((10,), float(rank()))
    dist.all_reduce(mean, Op.AVG)
    expect("mean", mean, torch.full((10,), (size() - 1) / 2))
    large = torch.full((10,), 4e4, dtype=torch.float16)  # two of them are beyond the type's range
    dist.all_reduce(large, Op.AVG)
    if not torch.allclose(large.float(), torch.full((10,), 4e4), rtol=2e-3):
        raise AssertionError(f"the mean of large halves: {large}")
    scaled = torch.full((10,), float(rank()))
    dist.all_reduce(scaled, dist._make_nccl_premul_sum(0.5))
    expect("scaled", scaled, torch.full((10,), sum(range(size())) / 2))
    nan = torch.tensor([float("nan") if rank() == 0 else 1.0])
    dist.all_reduce(nan, Op.MAX)
    if not nan.isnan():
        raise AssertionError("a maximum with NaN")


def sums_in_rank_order() -> None:
    """16-bit numbers are summed in float32 and rounded once, or once within a host and once over hosts; the bits are the same on all ranks, and again."""
    torch.manual_seed(rank())
    for dtype, count in itertools.product((torch.bfloat16, torch.float16, torch.float32), (1000, 700_001)):
        mine = torch.randn(count).to(dtype)
        parts = [torch.empty_like(mine) for _ in range(size())]
        dist.all_gather(parts, mine)
        wanted = added(added(parts[r] for r in ranks) for ranks in host_ranks())
        for _ in range(2):
            out = mine.clone()
            dist.all_reduce(out)
            expect(f"sum of {dtype}", out, wanted)
            shares = [part[: count // size() * size()].clone() for part in parts]
            share = torch.empty(count // size(), dtype=dtype)
            dist.reduce_scatter_tensor(share, shares[rank()])
            expect(f"share of a sum of {dtype}", share, wanted[: len(share) * size()].chunk(size())[rank()])


def movements() -> None:
    n, me = size(), rank()
    for count, dtype in itertools.product(SIZES, (torch.uint8, torch.float32, torch.complex128)):
        parts = everyone(count, dtype)
        gathered = [torch.empty(count, dtype=dtype) for _ in range(n)]
        dist.all_gather(gathered, parts[me])
        expect("all_gather", torch.stack(gathered), torch.stack(parts))
        out = torch.empty(n * count, dtype=dtype)
        dist.all_gather_into_tensor(out, parts[me])
        expect("all_gather_into_tensor", out, torch.cat(parts))
        in_place = out.zero_()
        in_place.view(n, count)[me] = parts[me]
        dist.all_gather_into_tensor(in_place, in_place.view(n, count)[me])
        expect("all_gather in place", in_place, torch.cat(parts))
        root = count % n
        sent = parts[root].clone() if me == root else torch.empty(count, dtype=dtype)
        dist.broadcast(sent, root)
        expect("broadcast", sent, parts[root])
        wanted = [torch.empty(count, dtype=dtype) for _ in range(n)] if me == root else None
        dist.gather(parts[me], wanted, root)
        if wanted is not None:
            expect("gather", torch.stack(wanted), torch.stack(parts))
        got = torch.empty(count, dtype=dtype)
        dist.scatter(got, [p.clone() for p in parts] if me == root else None, root)
        expect("scatter", got, parts[me])
        # Rank r sends (r + 2 s) mod 5 pieces of `count` to rank s.
        rows = [[(r + 2 * s) % 5 for s in range(n)] for r in range(n)]
        incoming = torch.empty(sum(rows[r][me] for r in range(n)), count, dtype=dtype)
        outgoing = parts[me].expand(sum(rows[me]), count).contiguous()
        dist.all_to_all_single(incoming, outgoing, [rows[r][me] for r in range(n)], rows[me])
        expect("uneven all_to_all", incoming, torch.cat([parts[r].expand(rows[r][me], count) for r in range(n)]))
        lists = [torch.empty(rows[r][me], count, dtype=dtype) for r in range(n)]
        dist.all_to_all(lists, [parts[me].expand(k, count).contiguous() for k in rows[me]])
        expect("all_to_all", torch.cat(lists), torch.cat([parts[r].expand(rows[r][me], count) for r in range(n)]))
    dist.barrier()
    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, {"rank": me})
    assert objects == [{"rank": r} for r in range(n)], objects


def views() -> None:
    """Tensors that aren't contiguous, require gradients, or are of other layouts."""
    n, me = size(), rank()
    base = torch.arange(24.0).view(4, 6) + me
    total = sum(range(n)) + n * torch.arange(24.0).view(4, 6)
    transposed = base.clone().t()
    dist.all_reduce(transposed)
    expect("transposed", transposed, total.t())
    every_second = base.clone()
    dist.all_reduce(every_second[:, ::2])
    expect("every second column", every_second[:, ::2], total[:, ::2])
    expect("the others", every_second[:, 1::2], base[:, 1::2])
    leaf = base.clone().requires_grad_()
    dist.all_reduce(leaf)
    expect("a leaf", leaf.detach(), total)
    out = [torch.empty(4, 6) for _ in range(n)]
    dist.all_gather(out, torch._neg_view(base))
    expect("a negated view", out[1], -(base - me + 1))
    target = torch.zeros(6, 4 * n).t()
    dist.all_gather_into_tensor(target, base)
    expect("into a transposed one", target, torch.cat([torch.arange(24.0).view(4, 6) + r for r in range(n)]))
    sparse = torch.sparse_coo_tensor([[me, me + 1]], torch.tensor([[1.0], [2.0]]), (n + 1, 1))
    dist.all_reduce(sparse)
    expect("sparse", sparse.to_dense(), torch.tensor([[1.0], *[[3.0]] * (n - 1), [2.0]]))
    scalar = torch.tensor(float(me))
    dist.all_reduce(scalar)
    expect("scalar", scalar, torch.tensor(float(sum(range(n)))))


def messages() -> None:
    n, me = size(), rank()
    for count in (0, 1, 5000, 400_001):  # the last is larger than a ring
        peers = [r for r in range(n) if r != me]
        inbox = {r: torch.empty(count) for r in peers}
        sends = [dist.P2POp(dist.isend, values(me * n + r, count), r) for r in peers]
        receives = [dist.P2POp(dist.irecv, inbox[r], r) for r in peers]
        for batch in ((sends + receives), (receives + sends)[::-1]):
            for work in dist.batch_isend_irecv(batch):
                work.wait()
            for r in peers:
                expect(f"from {r}", inbox[r], values(r * n + me, count))
                inbox[r].zero_()
        # By tag, in another order than sent; the last by anyone.
        if me == 0:
            for r, tag in itertools.product(range(1, n), (1, 2, 3)):
                dist.send(values(tag, count), r, tag=tag)
            seen = set()
            for _ in range(1, n):
                out = torch.empty(2)
                source = dist.recv(out, tag=7)
                seen.add(source)
                expect("anyone", out, torch.tensor([7.0, float(source)]))
            assert seen == set(range(1, n)), seen
        else:
            out = {tag: torch.empty(count) for tag in (1, 2, 3)}
            works = [dist.irecv(out[tag], 0, tag=tag) for tag in (3, 1, 2)]
            for work in works:
                work.wait()
            for tag in (1, 2, 3):
                expect(f"tag {tag}", out[tag], values(tag, count))
            dist.send(torch.tensor([7.0, me]), 0, tag=7)
    # A large send that nobody waits for goes on while its sender is in a collective.
    large = torch.full((1_000_000,), float(me))
    work = dist.isend(large, (me + 1) % n)
    dist.barrier()
    got = torch.empty(1_000_000)
    dist.recv(got, (me - 1) % n)
    work.wait()
    expect("behind a barrier", got, torch.full((1_000_000,), float((me - 1) % n)))


def asynchronous() -> None:
    n, me = size(), rank()
    tensors = [torch.full((k,), float(me + k)) for k in (10, 200_000, 3, 50_000)]
    works = [dist.all_reduce(t, async_op=True) for t in tensors]
    called: list[float] = []
    futures = [w.get_future().then(lambda f: called.append(f.value()[0][0].item())) for w in works]
    for work in reversed(works):
        work.wait()
        assert work.is_completed() and work.is_success() and work.exception() is None
    for t in tensors:
        expect("async", t, torch.full_like(t, float(sum(r + len(t) for r in range(n)))))
    for future in futures:
        future.wait()
    assert sorted(called) == sorted(float(sum(r + len(t) for r in range(n))) for t in tensors), called
    # Without anyone waiting a thread of the group's makes progress.
    slow = torch.ones(2_000_000)
    work = dist.all_reduce(slow, async_op=True)
    until = time.monotonic() + 20
    while not work.is_completed():
        time.sleep(0.01)
        assert time.monotonic() < until, "no progress without waiting"
    expect("in the background", slow, torch.full_like(slow, float(n)))
    with dist._coalescing_manager():
        for t in tensors:
            dist.all_reduce(t)
    expect("coalesced", tensors[0], torch.full_like(tensors[0], float(n * sum(r + 10 for r in range(n)))))


def subgroups() -> None:
    """Several groups at once, each with works in flight; reversed ranks don't matter."""
    n, me = size(), rank()
    groups = [(ranks, dist.new_group(list(ranks))) for k in (1, 2) for ranks in itertools.combinations(range(n), k)]
    mine = [(ranks, group, torch.full((5_000,), float(me))) for ranks, group in groups if me in ranks]
    works = [dist.all_reduce(tensor, group=group, async_op=True) for _, group, tensor in mine]
    for work in works:
        work.wait()
    for ranks, _, tensor in mine:
        expect(f"group {ranks}", tensor, torch.full((5_000,), float(sum(ranks))))
    for _, group, _ in mine:
        dist.destroy_process_group(group)


def mistakes() -> None:
    """An error on every rank that sees it, and the group goes on."""

    def fails(part: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            if part not in str(error):
                raise AssertionError(f"'{part}' is not in: {error}") from error
        else:
            raise AssertionError(f"no error with '{part}'")

    n, me = size(), rank()
    fails("bytes on rank", lambda: dist.all_reduce(torch.ones(3 if me == 0 else 4)))
    fails("calls", lambda: dist.all_reduce(torch.ones(3)) if me == 0 else dist.barrier())
    fails("of Float", lambda: dist.all_reduce(torch.ones(3) if me == 0 else torch.ones(3, dtype=torch.int32)))
    outgoing, splits = torch.ones(2 * n), [3 if me == 0 and r == 1 else 2 for r in range(n)]
    if me == 0:
        outgoing = torch.ones(2 * n + 1)
    received = torch.empty(2 * n)
    exchange = lambda: dist.all_to_all_single(received, outgoing, [2] * n, splits)  # noqa: E731
    if me == 1:
        fails("rank 0 sends 12 bytes to rank 1, which expects 8", exchange)
    else:
        exchange()
        expect("the others'", received, torch.ones(2 * n))
    if me == 0:
        dist.send(torch.ones(2), 1)
    if me == 1:
        fails("sent 8 bytes", lambda: dist.recv(torch.ones(3), 0))
    fails("Cannot use ReduceOp.BAND", lambda: dist.all_reduce(torch.ones(3), Op.BAND))
    fine = torch.ones(5)
    dist.all_reduce(fine)
    expect("afterwards", fine, torch.full((5,), float(n)))


def monitored() -> None:
    dist.monitored_barrier(timeout=datetime.timedelta(seconds=10))
    group = dist.new_group(timeout=datetime.timedelta(seconds=20))
    if rank() == size() - 1:
        time.sleep(1.0)
        return
    try:
        dist.monitored_barrier(group, timeout=datetime.timedelta(seconds=0.3))
    except RuntimeError as error:
        wanted = f"Rank {size() - 1} failed to pass monitoredBarrier in 300 ms" if rank() == 0 else "reached monitoredBarrier"
        assert wanted in str(error), error
    else:
        raise AssertionError("a rank is missing, and no error")


def with_delays() -> None:
    """A random delay before every step changes nothing."""
    group = dist.new_group()
    group._get_backend(torch.device("cpu")).set_random_delay(datetime.timedelta(microseconds=300))
    n, me = size(), rank()
    for count in (5, 50_000, 400_000):
        for _ in range(3):
            tensor = values(me, count)
            dist.all_reduce(tensor, group=group)
            expect("delayed all_reduce", tensor, folded(Op.SUM, everyone(count)))
            out = torch.empty(n * count)
            dist.all_gather_into_tensor(out, values(me, count), group=group)
            expect("delayed all_gather", out, torch.cat(everyone(count)))
            dist.all_to_all_single(torch.empty(n * count), out, group=group)
            work = dist.isend(tensor, (me + 1) % n, group=group)
            dist.recv(out[:count], (me - 1) % n, group=group)
            work.wait()
            expect("delayed message", out[:count], tensor)


def late_rank() -> None:
    if rank() == 0:
        time.sleep(1.5)
    tensor = torch.ones(100)
    dist.all_reduce(tensor)
    expect("late", tensor, torch.full((100,), float(size())))


def no_names_left() -> None:
    dist.barrier()
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"torch_soap.{os.getpid()}.")]
    assert not left, left


def forked() -> None:
    """A child has no part in its parent's groups, says so, and ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dist.all_reduce(torch.ones(2))
        except RuntimeError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    expect("after a fork", tensor, torch.full((2,), float(size())))


def trained(group: Any, how: str) -> list[torch.Tensor]:
    """Parameters after some steps of a small model on this group; all ranks give different rows."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    mesh = DeviceMesh.from_group(group, "cpu")
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    elif how == "fsdp":
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        torch.manual_seed(100 * step + (0 if how == "dtensor" else rank()))
        optimizer.zero_grad()
        model(torch.randn(4, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in model.parameters()]


def as_on_gloo(how: str) -> None:
    gloo = dist.new_group(backend="gloo")
    for ours, theirs in zip(trained(dist.group.WORLD, how), trained(gloo, how), strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14):
            raise AssertionError(f"{how}: differs by {(ours - theirs).abs().max()}")


def parallelized() -> None:
    """`parallelize` on this group against one process."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    torch.manual_seed(1)
    model = torch_soap.parallelize(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).double(), plan=f"0 o={size()}\n2 n={size()}\n* n=fed")
    rows = torch.randn(3 * size(), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for m, batch in ((plain, rows), (model, rows[3 * rank() : 3 * rank() + 3])):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(batch).square().mean().backward()
            optimizer.step()
    state = model.state_dict()
    for name, wanted in plain.state_dict().items():
        if not torch.allclose(state[name], wanted, rtol=1e-11, atol=1e-13):
            raise AssertionError(f"{name} differs by {(state[name] - wanted).abs().max()}")


CHECKS: dict[str, Callable[[], None]] = {
    "reductions": reductions,
    "sums_in_rank_order": sums_in_rank_order,
    "movements": movements,
    "views": views,
    "messages": messages,
    "asynchronous": asynchronous,
    "subgroups": subgroups,
    "mistakes": mistakes_between_hosts if "SOAP_TEST_HOSTS" in os.environ else mistakes,
    "monitored": monitored,
    "with_delays": with_delays,
    "late_rank": late_rank,
    "no_names_left": no_names_left,
    "forked": forked,
    "ddp": lambda: as_on_gloo("ddp"),
    "fsdp": lambda: as_on_gloo("fsdp"),
    "dtensor": lambda: as_on_gloo("dtensor"),
    "parallelized": parallelized,
    "calibrated": calibrated,
}
ON_HOSTS = {"hosts": hosts, "sender_goes_on": sender_goes_on}  # of a job on several of them


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    if "SOAP_TEST_HOSTS" in os.environ:
        me = int(os.environ["RANK"])
        os.environ["TORCH_SOAP_HOST"] = next(f"host{h}" for h, ranks in enumerate(host_ranks()) if me in ranks)
    dist.init_process_group("soap", timeout=datetime.timedelta(seconds=30))
    results: dict[str, str] = {}
    for name in sys.argv[1:] or CHECKS:
        begin = time.perf_counter()
        try:
            (ON_HOSTS | CHECKS)[name]()
            results[name] = ""
        except Exception:  # reported: the others come to the next check or fail in theirs
            results[name] = traceback.format_exc()[-1500:]
        print(f"{name} {time.perf_counter() - begin:.1f} s", flush=True)
        report(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
