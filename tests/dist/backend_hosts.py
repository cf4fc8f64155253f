"""Checks of the backend soap on ranks that are on several hosts, for tests/dist/worker_backend.py."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist

from tests.dist.backend_values import everything, expect, host_ranks, rank, size
from torch_soap import cache, calibrate
from torch_soap.message_times import message
from torch_soap.runtime.comm import TorchComm, transport
from torch_soap.runtime.movement import execute


def mistakes_between_hosts() -> None:
    """An error on every rank, and the group has ended."""
    n, me = size(), rank()
    last = n - 1
    for part, call in (
        ("bytes on rank", lambda g: dist.all_reduce(torch.ones(3 if me == last else 4), group=g)),
        ("calls", lambda g: dist.all_reduce(torch.ones(3), group=g) if me == last else dist.barrier(g)),
        ("of Float", lambda g: dist.all_reduce(torch.ones(3, dtype=torch.int32 if me == last else torch.float32), group=g)),
        ("sends 12 bytes to rank", lambda g: dist.all_to_all_single(torch.empty(2 * n), torch.ones(3 * n if me == last else 2 * n), [2] * n, group=g)),
    ):
        group = dist.new_group(timeout=datetime.timedelta(seconds=10))
        texts = []
        for _ in range(3):  # who sent too much may see it only afterwards
            try:
                call(group)  # type: ignore[no-untyped-call]
            except (RuntimeError, ValueError) as error:
                texts.append(str(error))
        assert len(texts) >= 2 and "the group has ended" in texts[-1], (part, texts)
        told = everything(texts[0])
        assert any(part in text for text in told), (part, told)
        assert all(part in text or "failed" in text or "has ended" in text for text in told), (part, told)


def calibrated() -> None:
    """What is measured goes the way that the runtime's tensors go, and is kept for these hosts alone."""
    comm = TorchComm()
    ends = (0, size() - 1)
    comm.join([ends])
    assert transport() == "soap" and (rank() not in ends or transport(comm.group(ends)) == "soap")
    placed = calibrate.placement(comm)
    assert placed == [h for h, ranks in enumerate(host_ranks()) for _ in ranks], placed
    here = cache.file_of(size(), placed)
    assert (here == cache.file_of(size())) == (len(host_ranks()) == 1), here
    assert everything(here.name) == [here.name] * size()


def sender_goes_on() -> None:
    """A movement from one host to another ends where it is sent before the other rank begins it."""
    comm, first, last = TorchComm(), 0, size() - 1
    comm.join([(first, last)])
    if rank() not in (first, last):
        return
    store = dist.distributed_c10d._get_default_store()
    step, sent = message(comm, (first, last), first, last, 64 << 10), torch.arange(16 << 10, dtype=torch.float32)
    if rank() == last:
        store.wait(["gone on"], datetime.timedelta(seconds=10))
    received = execute(step, comm, lambda value, dtype: sent)
    if rank() == first:
        store.set("gone on", "")
    else:
        expect("what was sent", received[0][1], sent)


def hosts() -> None:
    """Ranks 0 and 1 are on one host, 2 and 3 on another."""
    for ranks, shared in (([0, 1], True), ([2, 3], True), ([1, 2], False), ([0, 1, 2, 3], False)):
        group = dist.new_group(ranks)
        if rank() not in ranks:
            continue
        backend = group._get_backend(torch.device("cpu"))
        assert backend.shares_memory == shared and backend.spans_hosts != shared, (ranks, backend.why_not)
        tensor = torch.full((1000,), float(rank()))
        dist.all_reduce(tensor, group=group)
        expect(f"group {ranks}", tensor, torch.full((1000,), float(sum(ranks))))
