"""On each rank: the disagreements between ranks named on the command line, one after another; reports the error that the rank saw in each."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

import torch_soap
from tests.dist.launch import report

TIMEOUT_S = 8.0


def model(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def forward(x: torch.Tensor, prepare: Callable[[nn.Module], object] = lambda m: None) -> None:
    m = torch_soap.parallelize(model(), plan="* n=fed")
    prepare(m)
    m(x).sum().backward()


def shape(rank: int) -> None:
    forward(torch.randn(2, 5, 5 + rank))


def dtype(rank: int) -> None:
    forward(torch.randn(2, 5, dtype=torch.float64 if rank else torch.float32))


def dims(rank: int) -> None:
    forward(torch.randn(2, 4, 5) if rank else torch.randn(2, 5))


def mode(rank: int) -> None:
    forward(torch.randn(2, 5), lambda m: m.eval() if rank else None)


def grad(rank: int) -> None:
    with torch.set_grad_enabled(rank == 0):
        forward(torch.randn(2, 5))


def unsynced(rank: int) -> None:
    m = torch_soap.parallelize(model(), plan="* n=fed")
    m(torch.randn(2, 5))
    with m.no_sync() if rank else contextlib.nullcontext():
        m(torch.randn(2, 5))


def wider(rank: int) -> None:
    torch_soap.parallelize(model(6 + rank))


def frozen(rank: int) -> None:
    m = model()
    m[0].bias.requires_grad_(rank == 0)
    torch_soap.parallelize(m)


def plans(rank: int) -> None:
    torch_soap.parallelize(model(), plan="* n=fed" if rank else "0 o=2\n* n=fed")


def arguments(rank: int) -> None:
    torch_soap.parallelize(model(), torch.randn(2, 5) if rank else None)


def order(rank: int) -> None:
    """Two models alike, called in another order."""
    models = [torch_soap.parallelize(model(), plan="* n=fed") for _ in range(2)]
    for m in models[::-1] if rank else models:
        m(torch.randn(2, 5))


def order_back(rank: int) -> None:
    """Their backwards in another order."""
    losses = [torch_soap.parallelize(model(), plan="* n=fed")(torch.randn(2, 5)).sum() for _ in range(2)]
    for loss in losses[::-1] if rank else losses:
        loss.backward()


def absent(rank: int) -> None:
    """A forward on rank 0 alone, as DDP's users write for validation."""
    m = torch_soap.parallelize(model(), plan="* n=fed")
    m(torch.randn(2, 5)).sum().backward()
    if rank == 0:
        m(torch.randn(2, 5))
    else:
        time.sleep(TIMEOUT_S + 4)


def pairs(rank: int) -> None:
    """Some ranks have made a group before; groups of ours have the job's timeout."""
    if rank < 2:
        dist.new_group([0, 1], use_local_synchronization=True)
    m = torch_soap.parallelize(model(), plan="* n=2 @ [0, 2]")
    m(torch.randn(2, 5)).sum().backward()
    groups = m._soap.comm.groups
    assert list(groups) == ([] if rank == 1 else [(0, 2)]), groups
    assert all(g._get_backend(torch.device("cpu")).options._timeout.total_seconds() == TIMEOUT_S for g in groups.values())


def illegal(rank: int) -> None:
    m = model()
    before = [p.data_ptr() for p in m.parameters()]
    try:
        torch_soap.parallelize(m, torch.randn(2, 5), plan="0 o=2 store=o\n7 n=2\n* n=fed")
    finally:
        assert [p.data_ptr() for p in m.parameters()] == before and type(m) is nn.Sequential, "half applied"


SCENARIOS: dict[str, Callable[[int], None]] = {f.__name__: f for f in (shape, dtype, dims, mode, grad, unsynced, wider, frozen, plans, arguments, order, order_back, absent, pairs, illegal)}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    results = {}
    for name in names:
        start = time.perf_counter()
        seen = {"type": "none", "message": ""}
        try:
            SCENARIOS[name](dist.get_rank())
        except Exception as error:  # every type: the test says which it should be
            seen = {"type": type(error).__name__, "message": str(error)}
        results[name] = {**seen, "seconds": time.perf_counter() - start}
        report(results)


if __name__ == "__main__":
    main(sys.argv[1:])
