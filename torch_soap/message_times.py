"""Measures what ranks that compute lose to messages between hosts, which the kernel sends and receives on their cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from torch_soap import _C
from torch_soap.measuring import at_pace, calm_samples, mark, quiet
from torch_soap.operator_times import Ranks
from torch_soap.runtime.comm import Comm
from torch_soap.runtime.movement import PlannedMove, PlannedStep, PlannedTransfer, execute

SMALL, LARGE = 4 << 10, 1 << 20  # bytes of messages; the larger is less on a slow network
ON_ITS_WAY_NS = 20e6  # at most
MESSAGES = 7  # each way


def measure_messages(machine: _C.Machine, comm: Comm, ranks: Sequence[int], known: dict[str, Any]) -> tuple[float, float]:
    """What a byte to another host takes of who has sent it and computes, and of who computes until it is there (`Machine.send_ns_per_byte`,
    `receive_ns_per_byte`), the mean of both ways between two hosts: which core the kernel works on differs from time to time. `ranks`: a group with movements
    of its own, over hosts."""
    if "message_ns" not in known:
        one = ranks[0]
        other = next(r for r in ranks if machine.host_of[r] != machine.host_of[one])
        large = LARGE
        while large > 16 * SMALL and _C.movement_ns(machine, "exchange", ranks, large) > ON_ITS_WAY_NS:
            large //= 2
        on_its_way_ns = 1.3 * _C.movement_ns(machine, "exchange", ranks, large)
        tensors = {size: torch.zeros(size // 4) for size in (SMALL, large)}
        a, x = torch.randn(128, 128), torch.zeros((64 << 10) // 4)

        def compute(times: int) -> int:
            begin = time.perf_counter_ns()
            for _ in range(times):
                a @ a
                x.add_(1.0)
            return time.perf_counter_ns() - begin

        compute(100)
        fastest_ns = min(compute(100) for _ in range(5)) / 100
        times = max(int(t) for (t,) in comm.gather_ints([int(on_its_way_ns / fastest_ns) + 1]))

        def taken(source: int, target: int, size: int) -> int:
            step, tensor = message(comm, ranks, source, target, size), tensors[size]
            comm.gather_ints([0])  # all begin together
            begin = time.perf_counter_ns()
            if comm.rank == target:
                compute(times)
            if comm.rank in ranks:
                execute(step, comm, lambda value, dtype: tensor)
            if comm.rank == source:
                compute(times)
            return time.perf_counter_ns() - begin

        def both(source: int, target: int) -> tuple[int, int]:
            return taken(source, target, large), taken(source, target, SMALL)

        lost, paces = [], []
        for ends in ((one, other), (other, one)):
            pairs, pace = calm_samples(partial(both, *ends), MESSAGES, together=Ranks(comm))
            with_large, with_small = (quiet(values) for values in zip(*pairs, strict=True))
            everyone = comm.gather_ints([max(int(with_large - with_small), 0)])
            lost.append([everyone[rank][0] for rank in ends])
            paces.append(pace)
        known["message_ns"] = [round(statistics.mean(ns) / (large - SMALL), 3) for ns in zip(*lost, strict=True)]
        mark(known, "message_ns", at_pace(max(paces)))
    send_ns, receive_ns = known["message_ns"]
    return float(send_ns), float(receive_ns)


def message(comm: Comm, ranks: Sequence[int], source: int, target: int, size: int) -> PlannedStep:
    """`size` bytes from one of `ranks` to another, as the engine plans them."""
    count = size // 4
    whole = [(0, [(0, count)])]
    moves, results = [], []
    if comm.rank == source:
        moves.append(PlannedMove(target, True, 0, -1, whole, [], [count], count))
    if comm.rank == target:
        moves.append(PlannedMove(source, False, -1, 1, [], whole, [count], count))
        results.append((1, [count]))
    transfer = PlannedTransfer(False, False, False, torch.float32, list(ranks), moves, results, _C.Reduce.sum)
    return PlannedStep(list(ranks), [transfer])
