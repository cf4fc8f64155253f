"""Ways to train a model on several processes, each a `Contender`: built on all ranks together, then stepped in turns.

The loss is inside for all alike: a contender's forward takes inputs and targets of this process' own rows and gives a loss; the mean over processes of what it
gives is one process' loss of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

import torch_soap
from benchmarks.fidelity_models import Batch, Case
from benchmarks.hybrids import KINDS, Hybrid
from benchmarks.tensor_parallel import GatheredRows, cut
from benchmarks.training_models import Timed
from torch_soap.runtime.meter import FIRST_SAMPLE

LARGE = 100_000  # parameters of a unit of FSDP2's


class WithLoss(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module, self.loss = case.module, case.loss

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.module(*batch[:-1]), batch[-1])


class Contender:
    """One that trains a module the way everybody does; others override what differs."""

    def __init__(self, timed: Timed, model: nn.Module) -> None:
        self.model = model
        self.optimizer = timed.optimizer_of(list(model.parameters()))

    def step(self, batch: Batch) -> torch.Tensor:
        """One training step of this process' rows; the loss."""
        loss = self.model(*batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def age(self) -> None:
        """AdamW's state as a training in progress has it, without zeros: torch's square root takes several times as long for them."""
        for state in self.optimizer.state.values():
            second = state.get("exp_avg_sq")
            if second is not None:
                (second.to_local() if hasattr(second, "to_local") else second).clamp_(min=1e-12)

    def slow_down(self) -> None:
        """Many steps with one batch must not run away."""
        for group in self.optimizer.param_groups:
            group["lr"] = min(group["lr"], 1e-3)

    def rest(self) -> None:
        """Between its turns, not timed: gradients are let go."""
        self.optimizer.zero_grad()


class HandWritten(Contender):
    model: Hybrid

    def step(self, batch: Batch) -> torch.Tensor:
        loss = self.model(*batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.model.average()
        self.optimizer.step()
        return loss.detach()


class OneProcess(Contender):
    """Rank 0 with all cores and the whole batch, while the others wait."""

    def __init__(self, timed: Timed, model: nn.Module, whole: Batch) -> None:
        super().__init__(timed, model)
        self.whole, self.threads = whole, len(os.sched_getaffinity(0))

    def step(self, batch: Batch) -> torch.Tensor:
        torch.set_num_threads(self.threads)
        loss = super().step(self.whole)
        torch.set_num_threads(1)
        return loss


class Elsewhere(Contender):
    """Where another rank steps."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())

    def step(self, batch: Batch) -> torch.Tensor:
        return self.loss

    def age(self) -> None:
        pass

    def slow_down(self) -> None:
        pass

    def rest(self) -> None:
        pass


class Limit(Contender):
    """`ours` with its communication replaced by nothing: it gets what it got in a step that was recorded, and sums stay its own. It shares parameters with
    the real one, so it steps with a learning rate of zero."""

    def __init__(self, ours: Contender, batch: Batch) -> None:
        self.model, self.optimizer = ours.model, ours.optimizer
        soap: Any = self.model._soap
        self.comm = soap.comm
        released = any(engine.released for engine, _ in soap.engines.values())  # what such engines get they may give back
        self.copied: Callable[[torch.Tensor], torch.Tensor] = torch.clone if released else lambda t: t
        self.received: list[dict[int, torch.Tensor]] = []
        self.turn = iter(self.received)
        exchange = self.comm.exchange

        def recorded(*args: Any) -> dict[int, torch.Tensor]:
            out: dict[int, torch.Tensor] = exchange(*args)
            self.received.append({rank: t.clone() for rank, t in out.items()})
            return out

        self.comm.exchange = recorded
        try:
            super().step(batch)
        finally:
            del self.comm.exchange

    def step(self, batch: Batch) -> torch.Tensor:
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self.turn = iter(self.received)
        self.comm.all_reduce, self.comm.exchange, self.comm.gather_ints = self.all_reduce, self.exchange, self.gather_ints
        try:
            for group in groups:
                group["lr"] = 0.0
            return super().step(batch)
        finally:
            del self.comm.all_reduce, self.comm.exchange, self.comm.gather_ints
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def all_reduce(self, tensor: torch.Tensor, ranks: Sequence[int], maximum: bool) -> torch.Tensor:
        return tensor.contiguous()

    def exchange(self, sends: dict[int, torch.Tensor], recv_bytes: dict[int, int], ranks: Sequence[int]) -> dict[int, torch.Tensor]:
        return {rank: self.copied(t) for rank, t in next(self.turn).items()}

    def gather_ints(self, values: Sequence[int], meeting: str = "") -> list[list[int]]:
        return [list(values)] * self.comm.world_size


def ours(timed: Timed, case: Case, batch: Batch) -> Contender:
    model: Any = torch_soap.parallelize(case.module, batch, loss=case.loss)
    model._soap.meter.count = FIRST_SAMPLE  # no sampled step among the measured ones
    return Contender(timed, model)


def ddp(timed: Timed, case: Case, megabytes: int) -> Contender:
    dense = not timed.sparse
    return Contender(timed, DistributedDataParallel(WithLoss(case), bucket_cap_mb=megabytes, static_graph=dense, gradient_as_bucket_view=dense))


def units(module: nn.Module) -> Iterator[nn.Module]:
    """What FSDP2 gathers at once: blocks of lists and sequences, and large layers beside them. Tied parameters are left to the root."""
    used: dict[int, int] = {}
    for m in module.modules():
        for p in m.parameters(recurse=False):
            used[id(p)] = used.get(id(p), 0) + 1

    def walk(m: nn.Module, inside_list: bool) -> Iterator[nn.Module]:
        for child in m.children():
            deeper = [] if inside_list else list(walk(child, isinstance(child, nn.ModuleList | nn.Sequential)))
            own = list(child.parameters())
            if deeper:
                yield from deeper
            elif sum(p.numel() for p in own) >= LARGE and all(used[id(p)] == 1 for p in own):
                yield child

    yield from walk(module, isinstance(module, nn.Sequential))


def fsdp2(timed: Timed, case: Case) -> Contender:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in units(case.module):
        fully_shard(unit, mesh=mesh)
    model = WithLoss(case)
    fully_shard(model, mesh=mesh)
    return Contender(timed, model)


class TensorParallel(Contender):
    """DTensor's. Logits are cut by class, and so is the loss."""

    def __init__(self, timed: Timed, case: Case) -> None:
        cut(timed.tensor_parallel, case.module)
        super().__init__(timed, GatheredRows(WithLoss(case)))

    def step(self, batch: Batch) -> torch.Tensor:
        with loss_parallel():
            loss = super().step(batch)
        return loss.full_tensor() if isinstance(loss, DTensor) else loss


def held_bytes(name: str, timed: Timed, parameter_bytes: int, world: int) -> int:
    """About what a contender takes from the machine to be there on all processes: parameters, the optimizer's state, DDP's buckets."""
    of_each = 3 if timed.optimizer == "AdamW" else 1
    if name == "ours":  # planning holds the module, twins of it and their gradients
        return 4 * world * parameter_bytes
    if name == "limit":
        return 0
    if name == "one process":
        return of_each * parameter_bytes
    if name.startswith("DDP"):
        return world * (of_each + (not timed.sparse)) * parameter_bytes
    return (world + of_each) * parameter_bytes  # made whole by each, then cut


def contenders(timed: Timed, batch: Batch, whole: Batch) -> dict[str, Callable[[dict[str, Contender]], Contender]]:
    """How each is built, in the order in which they are: ours first, as planning holds the module twice, then what is needed most, for there may not be memory
    for all. The functions get what was built before."""
    elsewhere = dist.get_rank() != 0
    out: dict[str, Callable[[dict[str, Contender]], Contender]] = {
        "ours": lambda _: ours(timed, timed.make(), batch),
        "limit": lambda built: Limit(built["ours"], batch),
        "one process": lambda _: Elsewhere() if elsewhere else OneProcess(timed, WithLoss(timed.make()), whole),
    }
    if timed.hybrid:
        out["hybrid"] = lambda _: HandWritten(timed, KINDS[timed.hybrid](timed.make()))
    if timed.tensor_parallel:
        out["DTensor TP"] = lambda _: TensorParallel(timed, timed.make())
    out["DDP 25 MB"] = lambda _: ddp(timed, timed.make(), 25)
    if not timed.sparse:  # tables go beside the buckets, and FSDP2 has no sparse gradients
        out["FSDP2"] = lambda _: fsdp2(timed, timed.make())
        out["DDP 100 MB"] = lambda _: ddp(timed, timed.make(), 100)
    return out
