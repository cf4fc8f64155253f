"""How ranks talk: the two operations that a program needs, over c10d or, for all ranks in one process, over threads."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from torch_soap import _backend
from torch_soap.backend import beside, leave

# Of a process group: names from torch 2.14 on, and before.
ALL_GATHER = "all_gather_single" if hasattr(dist.ProcessGroup, "all_gather_single") else "_allgather_base"
ALL_TO_ALL = "all_to_all_single" if hasattr(dist.ProcessGroup, "all_to_all_single") else "alltoall_base"
HEADER_INTS = 128  # fixed size, so that ranks that disagree still meet
LONG = timedelta(seconds=1)  # a wait for other ranks after which a rank writes down where it is
# Gloo's all-reduce is a ring, 2 (n-1) messages one after the other. Up to so many bytes to send, and among so few ranks, all of them at once take half as long.
SMALL, FEW_RANKS = 256 << 10, 8
MEETINGS = ("calibration", "forward", "backward", "state_dict", "state_dict of an optimizer", "deepcopy", "gradient norm", "deferred gradient", "step")


class RankMismatchError(RuntimeError):
    """Ranks disagree, or one did not come."""


@dataclass
class Traffic:
    """What was sent: number of operations and bytes by kind. Bytes of an all-reduce are those of its tensor."""

    operations: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int) -> None:
        self.operations[kind] += 1
        self.num_bytes[kind] += num_bytes

    def add_all(self, exchanges: int, exchanged_bytes: int, all_reduces: int, reduced_bytes: int) -> None:
        for kind, operations, num_bytes in (("exchange", exchanges, exchanged_bytes), ("all_reduce", all_reduces, reduced_bytes)):
            if operations:
                self.operations[kind] += operations
                self.num_bytes[kind] += num_bytes


class Comm(Protocol):
    rank: int
    world_size: int
    traffic: Traffic

    def all_reduce(self, tensor: torch.Tensor, ranks: Sequence[int], maximum: bool) -> torch.Tensor:
        """Sum or maximum over `ranks`, bitwise equal on all of them. May work in place."""

    def exchange(self, sends: dict[int, torch.Tensor], recv_bytes: dict[int, int], ranks: Sequence[int]) -> dict[int, torch.Tensor]:
        """One grouped exchange of bytes (1-D uint8 tensors) among `ranks`; every one of them must call it."""

    def shared(self, ranks: Sequence[int]) -> Shared | None:
        """How the same goes among ranks that share memory, without packing; None where they don't."""

    def join(self, groups: Iterable[Sequence[int]]) -> None:
        """The sets of ranks among which this rank will exchange and reduce from now on. Collective over all ranks."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""

    def gather_ints(self, values: Sequence[int], meeting: str = "calibration") -> list[list[int]]:
        """The integers of all ranks, in order; a rank that doesn't come within the timeout, or is elsewhere (MEETINGS), is named in the error."""


class Shared:
    """Of ranks that share memory, on one host or on each of several."""

    def __init__(self, backend: _backend.SoapBackend, ranks: Sequence[int], traffic: Traffic) -> None:
        self.backend, self.moving, self.traffic = backend, moving(ranks), traffic

    def exchange(
        self, plan: _backend.Exchange, num_bytes: int, outgoing: list[torch.Tensor], own: list[torch.Tensor], places: list[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """What is made of pieces here. `num_bytes` are sent."""
        with self.moving:
            out = plan.run(self.backend, outgoing, own, places)
        self.traffic.add("exchange", num_bytes)
        return out

    def all_reduce(self, tensors: list[torch.Tensor], maximum: bool) -> list[torch.Tensor]:
        """Of tensors of one type, in one operation; they stay as they are."""
        with self.moving:
            out = _backend.all_reduce(self.backend, tensors, maximum)
        self.traffic.add("all_reduce", sum(t.nbytes for t in tensors))
        return out


_alive: weakref.WeakSet[TorchComm] = weakref.WeakSet()


@atexit.register
def leave_groups() -> None:
    """Gloo's threads may still have a tensor to give back when the last result is there. A group that nobody holds ends when they have; held until the
    interpreter has ended, one of them that then asks for it aborts the process (github.com/pytorch/pytorch/issues/190489)."""
    for comm in list(_alive):
        comm.world, comm.store = None, None
        comm.groups.clear()
        comm.by_memory.clear()
    leave()


class TorchComm:
    """c10d process groups. Groups of some ranks are made by all ranks together, in one order (`join`): c10d names a group by how many a
    process has made before, so members that make theirs alone, in an order of their own, wait for each other for ever."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.world: dist.ProcessGroup | None = group if group is not None else beside(dist.group.WORLD)
        self.rank = dist.get_rank(self.world)
        self.world_size = dist.get_world_size(self.world)
        self.groups: dict[tuple[int, ...], dist.ProcessGroup] = {}  # of those joined the ones with this rank
        self.joined: set[tuple[int, ...]] = set()
        self.traffic = Traffic()
        assert self.world is not None
        self.timeout = self.world._get_backend(torch.device("cpu")).options._timeout  # new_group's default is half an hour
        self.backend = dist.get_backend_config(self.world)
        self.num_meetings = 0
        self.store: Any = dist.distributed_c10d._get_default_store() if group is None else None
        self.everyone = tuple(range(self.world_size))
        self.small: dict[tuple[tuple[int, ...], torch.device], int] = {}  # group, device -> bytes up to which sums are made at once
        self.options = {maximum: reduce_options(maximum) for maximum in (False, True)}
        self.said = tuple(torch.zeros(n * HEADER_INTS, dtype=torch.int64, device="cpu") for n in (1, self.world_size))  # by this rank, by all
        self.by_memory: dict[tuple[int, ...], Shared | None] = {}
        _alive.add(self)

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        key = tuple(ranks)
        if key == self.everyone:
            if self.world is None:
                raise RuntimeError("[comm] there is no process group")
            return self.world
        if key not in self.groups:
            raise RuntimeError(f"[comm] no group of ranks {list(key)} has been joined")
        return self.groups[key]

    def join(self, groups: Iterable[Sequence[int]]) -> None:
        world = dist.distributed_c10d._world
        everyone = self.gather_objects(([tuple(g) for g in groups], world.group_count))
        wanted = sorted({g for mine, _ in everyone for g in mine if len(g) < self.world_size} - self.joined)
        if wanted:  # ranks that have made groups of their own count otherwise
            world.group_count = max(count for _, count in everyone)
        for key in wanted:
            self.joined.add(key)
            made = dist.new_group(list(key), timeout=self.timeout, backend=self.backend, group_desc="soap_" + "_".join(map(str, key)))
            if isinstance(made, dist.ProcessGroup):  # this rank is a member
                self.groups[key] = made

    def all_reduce(self, tensor: torch.Tensor, ranks: Sequence[int], maximum: bool) -> torch.Tensor:
        tensor, group = tensor.contiguous(), self.group(ranks)
        num_bytes = tensor.numel() * tensor.element_size()
        with moving(ranks):
            if num_bytes <= self.at_once(ranks, group, tensor.device):
                tensor = all_reduce_at_once(tensor, len(ranks), group, maximum)
            elif tensor.is_complex():
                dist.all_reduce(tensor, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group)
            else:  # the group's own: c10d's function around it takes as long as a small sum
                wait(group.allreduce([tensor], self.options[maximum]))
        self.traffic.add("all_reduce", num_bytes)
        return tensor

    def shared(self, ranks: Sequence[int]) -> Shared | None:
        key = tuple(ranks)
        if key not in self.by_memory:
            backend: Any = self.group(ranks)._get_backend(torch.device("cpu"))
            shares = isinstance(backend, _backend.SoapBackend) and (backend.shares_memory or backend.spans_hosts)
            self.by_memory[key] = Shared(backend, ranks, self.traffic) if shares else None
        return self.by_memory[key]

    def at_once(self, ranks: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> int:
        """Bytes up to which a sum among these ranks is made by `all_reduce_at_once`; -1: never."""
        key = tuple(ranks), device
        known = self.small.get(key)
        if known is None:
            apt = len(ranks) <= FEW_RANKS and transport(group, device) == "gloo"
            known = self.small[key] = SMALL // max(len(ranks) - 1, 1) if apt else -1
        return known

    def exchange(self, sends: dict[int, torch.Tensor], recv_bytes: dict[int, int], ranks: Sequence[int]) -> dict[int, torch.Tensor]:
        out_sizes = [recv_bytes.get(r, 0) for r in ranks]
        in_sizes = [sends[r].numel() if r in sends else 0 for r in ranks]
        outgoing = [sends[r] for r in ranks if r in sends]
        packed = joined(outgoing)
        received = torch.empty(sum(out_sizes), dtype=torch.uint8)
        with moving(ranks):
            wait(getattr(self.group(ranks), ALL_TO_ALL)(received, packed, out_sizes, in_sizes, EXCHANGE))
        self.traffic.add("exchange", sum(in_sizes))
        return {r: part for r, part in zip(ranks, received.split(out_sizes), strict=True) if part.numel()}

    def gather_objects(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, value, group=self.world)
        return out

    def gather_ints(self, values: Sequence[int], meeting: str = "calibration") -> list[list[int]]:
        self.num_meetings += 1
        if len(values) + 2 > HEADER_INTS:
            raise ValueError(f"[comm] a header of {len(values)} integers; at most {HEADER_INTS - 2}")
        mine, out = self.said
        _backend.write_row(mine, MEETINGS.index(meeting), values)
        try:
            if self.world is None:
                raise RuntimeError("[comm] there is no process group")
            self.meet(getattr(self.world, ALL_GATHER)(out, mine, GATHER))
        except RuntimeError as error:
            raise RuntimeError(f"[comm] at a {meeting}: {self.missing()}") from error
        meetings, rows = _backend.read_rows(out, HEADER_INTS)
        for rank, where in enumerate(meetings):
            if where != meetings[0]:
                places = MEETINGS[where], MEETINGS[meetings[0]]
                raise RankMismatchError(
                    f"[comm] rank {rank} is at a {places[0]}, rank 0 at a {places[1]}: all ranks must make the same calls of a model, in the same order"
                )
        return rows

    def meet(self, work: dist.Work | None) -> None:
        """Waits for a meeting. The store, which a rank that fails asks who has come, is told only where the meeting takes long: telling takes longer than
        meeting."""
        if work is None:
            return
        try:
            work.wait(min(LONG, self.timeout / 4))
        except RuntimeError:  # it takes long, or has failed
            self.come()
            work.wait()

    def come(self) -> None:
        if self.store is not None:
            self.store.set(f"soap/meeting/{self.rank}", str(self.num_meetings))

    def missing(self) -> str:
        """Which ranks have not come to this meeting, by the store."""
        if self.store is None:
            return "a rank did not come"
        self.come()
        until = time.monotonic() + LONG.total_seconds()  # others that have failed say so about now
        absent = list(range(self.world_size))
        while absent and time.monotonic() < until:
            absent = [r for r in absent if not self.store.check([f"soap/meeting/{r}"]) or int(self.store.get(f"soap/meeting/{r}")) < self.num_meetings]
            time.sleep(0.05)
        if not absent:
            return "the exchange failed though all ranks came"
        return f"ranks {absent} did not come: they ended, failed, or are elsewhere. All ranks must make this call, for validation too, and equally often"


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of bytes after bytes, without a copy where they follow each other in memory."""
    if not parts:
        return torch.empty(0, dtype=torch.uint8)
    at = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr():
            return torch.cat(parts)
        at += part.numel()
    return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))


def transport(group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> str:
    """What carries a group's tensors of a device (default: all ranks', on the CPU): c10d's name of the backend, "" without processes. `soap` without shared
    memory is gloo."""
    if group is None and not dist.is_initialized():
        return ""
    backend: Any = (beside(dist.group.WORLD) if group is None else group)._get_backend(device or torch.device("cpu"))
    name = str(backend.name())
    return name if name != "soap" or backend.shares_memory or backend.spans_hosts else "gloo"


def all_reduce_at_once(tensor: torch.Tensor, num_ranks: int, group: dist.ProcessGroup, maximum: bool) -> torch.Tensor:
    """Everyone sends all of its own to all others; each adds up in the order of ranks, so that all have the same to the last bit."""
    parts = tensor.new_empty((num_ranks, tensor.numel()))
    wait(getattr(group, ALL_TO_ALL)(parts.view(-1), tensor.reshape(-1).repeat(num_ranks), [], [], EXCHANGE))
    out = parts[0]
    for part in parts[1:]:
        out = torch.maximum(out, part) if maximum else out + part
    return out.view(tensor.shape)


def reduce_options(maximum: bool) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
    return in_turn(options)


def in_turn(options: Any) -> Any:
    """What c10d says of a call that is waited for at once."""
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


def wait(work: dist.Work | None) -> None:
    if work is not None:  # a backend may have waited itself
        work.wait()


EXCHANGE, GATHER = in_turn(dist.AllToAllOptions()), in_turn(dist.distributed_c10d.AllgatherOptions())


class moving:
    """Context: an error in it is one of a movement. A class, since a generator's context takes longer than a small movement's Python."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, RuntimeError):
            raise RuntimeError(f"[comm] a movement among ranks {list(self.ranks)} failed: one of them ended, failed, or is elsewhere") from error


class ThreadWorld:
    """Ranks as threads of one process. The first exception of any rank stops all and is raised again."""

    def __init__(self, world_size: int, timeout_s: float = 60.0) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.lock = threading.Condition()
        self.slots: dict[Any, dict[int, Any]] = {}
        self.taken: Counter[Any] = Counter()
        self.failure: BaseException | None = None

    def meet(self, key: Any, rank: int, value: Any, ranks: Sequence[int]) -> dict[int, Any]:
        """Blocks until all `ranks` have come with this key; returns what each brought."""
        with self.lock:
            slot = self.slots.setdefault(key, {})
            slot[rank] = value
            self.lock.notify_all()
            done = self.lock.wait_for(lambda: len(slot) == len(ranks) or self.failure is not None, self.timeout_s)
            if self.failure is not None:
                raise RuntimeError("[comm] another rank failed") from self.failure
            if not done:
                missing = [r for r in ranks if r not in slot]
                raise RuntimeError(f"[comm] rank {rank} waits for ranks {missing} at {key[:2]}")
            self.taken[key] += 1
            if self.taken[key] == len(ranks):
                del self.slots[key], self.taken[key]
            return dict(slot)

    def run(self, fn: Callable[[ThreadComm], Any]) -> list[Any]:
        """fn(comm) on every rank; the results in rank order."""
        results: list[Any] = [None] * self.world_size

        def work(rank: int) -> None:
            try:
                results[rank] = fn(ThreadComm(self, rank))
            except BaseException as error:  # handed to the caller, whatever it is
                with self.lock:
                    self.failure = self.failure or error
                    self.lock.notify_all()

        threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(self.world_size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if self.failure is not None:
            raise self.failure
        return results


class ThreadComm:
    """One rank of a ThreadWorld."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.world_size = world.world_size
        self.traffic = Traffic()
        self.calls: Counter[tuple[int, ...]] = Counter()

    def _meet(self, kind: str, value: Any, ranks: Sequence[int]) -> dict[int, Any]:
        key = tuple(ranks)
        self.calls[key] += 1
        return self.world.meet((kind, key, self.calls[key]), self.rank, value, ranks)

    def all_reduce(self, tensor: torch.Tensor, ranks: Sequence[int], maximum: bool) -> torch.Tensor:
        parts = self._meet("all_reduce", tensor.clone(), ranks)
        out = parts[ranks[0]].clone()
        for r in ranks[1:]:
            out = torch.maximum(out, parts[r]) if maximum else out + parts[r]
        self.traffic.add("all_reduce", tensor.numel() * tensor.element_size())
        return out

    def exchange(self, sends: dict[int, torch.Tensor], recv_bytes: dict[int, int], ranks: Sequence[int]) -> dict[int, torch.Tensor]:
        parts = self._meet("exchange", {r: t.clone() for r, t in sends.items()}, ranks)
        out = {r: parts[r][self.rank] for r in ranks if self.rank in parts[r]}
        sizes = {r: t.numel() for r, t in out.items() if t.numel()}
        if sizes != {r: n for r, n in recv_bytes.items() if n}:
            raise RuntimeError(f"[comm] rank {self.rank} expected {recv_bytes} bytes, got {sizes}")
        self.traffic.add("exchange", sum(t.numel() for t in sends.values()))
        return out

    def shared(self, ranks: Sequence[int]) -> Shared | None:
        return None

    def join(self, groups: Iterable[Sequence[int]]) -> None:
        """Nothing to make: threads meet under any key."""

    def gather_ints(self, values: Sequence[int], meeting: str = "calibration") -> list[list[int]]:
        return [list(v) for v in self.gather_objects(list(values))]

    def gather_objects(self, value: Any) -> list[Any]:
        ranks = range(self.world_size)
        parts = self._meet("gather", value, ranks)
        return [parts[r] for r in ranks]
