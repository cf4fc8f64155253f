"""Measures this machine: operators at their local shapes and movements by size, with all local ranks at once.

Ranks on one host share caches and memory bandwidth, so a rank timed alone is not what runs. Results are kept on disk, keyed by all
that changes them.
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_soap import _C, _backend
from torch_soap.backend import host
from torch_soap.machine import Machine
from torch_soap.measuring import (
    CORES,
    REPEATS,
    Timing,
    at_pace,
    calm_samples,
    calmest,
    lesser,
    mark,
    own_clock,
    quiet,
    timed,
)
from torch_soap.message_times import measure_messages
from torch_soap.movement_times import OTHER, group_layouts, measure_cold, measure_movements, measure_pieces, measure_turns
from torch_soap.operator_times import OFF, Ranks
from torch_soap.plan import as_plan
from torch_soap.runtime.comm import Comm, transport
from torch_soap.runtime.heap import keep_freed_memory
from torch_soap.runtime.parallel import Parallel

MEETINGS, BETWEEN = 60, 16  # of ranks, and products that each computes between two of them: five milliseconds
SHARING_ROUNDS = 5  # over numbers of ranks at work
STEP_MEETINGS = 2  # that no plan has: where a step begins, and before its backward
MANY_PARAMETERS, LAYER = 64, 512  # of a model that computes nothing; inputs and outputs of one that takes the caches
UPDATES = (1 << 10, 64 << 10, 1 << 20, 8 << 20, 40 << 20)  # of parameters, bytes
UPDATE_LOOKED_AT = 8 << 20  # of these
OWN_CORE = 0.75  # of a rank's own clock against the wall's with all at work (`Machine.busy_speed`): with less it shares its core


def placement(comm: Comm | None) -> list[int]:
    """Host of each rank, hosts counted in the order of ranks. A launcher's nodes are apart, and those that the user names."""
    if comm is None:
        return []
    hosts = comm.gather_objects(socket.gethostname() + host() + os.environ.get("GROUP_RANK", ""))
    names = list(dict.fromkeys(hosts))
    return [names.index(h) for h in hosts]


def sharing(comm: Comm) -> list[int]:
    """Of each rank, numbers that are equal where cores and memory are shared (`Machine.cores_of`)."""
    kernels = comm.gather_objects(_backend.kernel())
    names = list(dict.fromkeys(kernels))
    return [names.index(k) for k in kernels]


def barrier(comm: Comm | None) -> None:
    if comm is not None:
        comm.gather_ints([0])


def detect(world_size: int, comm: Comm | None, known: dict[str, Any], host_of: Sequence[int] = ()) -> Machine:
    """The machine that this job runs on; its tables are measured unless they are known. `known` is the same on all ranks."""
    if comm is not None:
        keep_freed_memory()  # as in training
        known["cores_ns"] = known.get("cores_ns") or Ranks(comm).core_distance_ns()
        CORES.distance_ns = known["cores_ns"]
    machine = Machine(world_size, 1)
    machine.name = platform.node()
    if host_of:
        machine.host_of = list(host_of)
    if comm is not None:
        cores_of = sharing(comm)
        if known.setdefault("cores_of", cores_of) != cores_of:  # hosts were together on one machine, or are now
            known["cores_of"] = cores_of
            for name in ("busy_speed", "update_speed", "step_overhead", "turn_ns"):
                known.pop(name, None)
            known["tables"] = {}
        machine.cores_of = cores_of if cores_of != machine.host_of else []
    num_local = max(Counter(machine.sharing()).values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine.memory_bytes = int(memory * 0.8 / num_local)
    rates = known.get("rates")
    if rates is None:
        a, b = torch.randn(512, 512), torch.randn(512, 512)
        x = torch.randn(1 << 21)
        barrier(comm)
        clock = own_clock()
        gemm, wave = calmest(lambda: timed(lambda: a @ b, clock=clock)), calmest(lambda: timed(lambda: torch.add(x, 1.0), clock=clock))
        small = calmest(lambda: timed(lambda: [torch.add(a[0], 1.0) for _ in range(20)], clock=clock))
        rates = [2 * 512**3 / gemm.ns * 1e9, 2 * x.numel() * 4 / wave.ns * 1e9, small.ns // 20 * 2.0]
        known["rates"] = rates
        mark(known, "rates", gemm, wave, small)
    machine.flops_per_s, machine.memory_bytes_per_s, machine.op_overhead_ns = rates
    machine.efficiency = known.get("efficiency", {})
    machine.update = measure_update(comm, known)
    if comm is not None and world_size > 1:
        machine.packs = transport() != "soap"
        machine.busy_speed, machine.update_speed = measure_sharing(machine, comm, known)
        # Ranks that take turns on cores lose nothing while they wait, as others compute then, and find no core's cache as they left it.
        own_core = machine.busy_speed[-1] > OWN_CORE
        machine.jitter = measure_jitter(comm, known) if own_core else 0.0
        measure_step(machine, comm, known, own_core)
        machine.piece_ns = measure_pieces(comm, known)
        measure_movements(machine, comm, known, own_core)
        machine.cold_ns = measure_cold(machine, comm, known) if own_core else 0.0
        machine.turn_ns = 0.0 if own_core else measure_turns(comm, known)
        machine.step_overhead_ns += STEP_MEETINGS * machine.turn_ns
        if max(host_of, default=0) > 0 and not machine.packs:
            hosts, groups = len(set(host_of)), group_layouts(host_of)
            over_hosts = groups.get((hosts, hosts), groups[world_size, hosts])[0]
            machine.send_ns_per_byte, machine.receive_ns_per_byte = measure_messages(machine, comm, over_hosts, known)
    return machine


def measure_update(comm: Comm | None, known: dict[str, Any]) -> list[tuple[int, int]]:
    """AdamW's step for one parameter, by its bytes, the mean over ranks. In a slow minute it takes half as long again: where it is doubted, one size is looked
    at, and, where that takes less now, all."""

    def measured() -> list[list[int]]:
        barrier(comm)
        timings = [calmest(lambda s=size: time_update(s, comm)) for size in UPDATES]  # type: ignore[misc]
        mark(known, "update", *timings)
        return [[size, t.ns] for size, t in zip(UPDATES, timings, strict=True)]

    if "update" not in known:
        known["update"] = measured()
    elif "update" in known.get("doubted", []):
        known["doubted"] = [name for name in known["doubted"] if name != "update"]
        barrier(comm)
        if dict(known["update"])[UPDATE_LOOKED_AT] > OFF * time_update(UPDATE_LOOKED_AT, comm).ns:
            known["update"] = lesser(known["update"], measured())
    return [(size, ns) for size, ns in known["update"]]


def time_update(size: int, comm: Comm | None) -> Timing:
    """Of one parameter of so many bytes, among others alike: parameters, gradients and state don't stay in the cache from step to step. The mean over ranks,
    and the largest spread."""
    parameters = [torch.zeros(size // 4, requires_grad=True) for _ in range(min(max(2, (64 << 20) // size), 256))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    together = None if comm is None else Ranks(comm)
    taken = timed(torch.optim.AdamW(parameters).step, 2 * REPEATS + 1, clock=own_clock(), together=together)
    each_ns = taken.ns // len(parameters)
    if comm is None or together is None:
        return Timing(each_ns, taken.spread)
    return Timing(int(statistics.mean(ns for (ns,) in comm.gather_ints([each_ns]))), together.worst(taken.spread))


def measure_sharing(machine: _C.Machine, comm: Comm, known: dict[str, Any]) -> tuple[list[float], list[float]]:
    """How fast a rank computes while k of those that share its cores do, in times of its own clock with all at work (`Machine.busy_speed`); the same of its
    updates."""
    if not {"busy_speed", "update_speed"} <= known.keys():
        cores_of = machine.sharing()
        locals_ = [r for r, number in enumerate(cores_of) if number == cores_of[comm.rank]]
        a, x, clock = torch.randn(256, 256), torch.randn(1 << 20), own_clock()

        def compute() -> None:  # long against what ranks come late to a barrier, and take turns on a core
            for _ in range(20):
                for _ in range(4):
                    a @ a
                x.add_(1.0)

        parameters = [torch.zeros(UPDATE_LOOKED_AT // 4, requires_grad=True) for _ in range((64 << 20) // UPDATE_LOOKED_AT)]
        for p in parameters:
            p.grad = torch.ones_like(p)

        def sample(work: Callable[[], Any], num_busy: int) -> tuple[int, int]:
            barrier(comm)
            begin, begin_own = time.perf_counter_ns(), clock()
            if locals_.index(comm.rank) < num_busy:
                work()
            taken = clock() - begin_own
            barrier(comm)  # all have done theirs
            return time.perf_counter_ns() - begin, taken

        for name, work in (("busy_speed", compute), ("update_speed", torch.optim.AdamW(parameters).step)):
            work()
            most = max(Counter(cores_of).values())
            samples: list[list[tuple[float, ...]]] = [[] for _ in range(most + 1)]  # by how many are at work; 0: what the barriers take
            for _ in range(SHARING_ROUNDS):  # over these in turns: a slow moment is everybody's
                for num_busy, of_these in enumerate(samples):
                    (one,), pace = calm_samples(partial(sample, work, num_busy), 1, together=Ranks(comm))
                    of_these.append((*one, pace))
            walls, own, paces = zip(*([quiet(values) for values in zip(*of_these, strict=True)] for of_these in samples), strict=True)
            everyone = comm.gather_ints([int(own[-1]), *map(int, walls)])
            slowest, barriers, *busy = (max(times) for times in zip(*everyone, strict=True))
            known[name] = [round(slowest / max(wall - barriers, 1), 3) for wall in busy]
            mark(known, name, at_pace(max(paces)))
    return never_slower(known["busy_speed"]), never_slower(known["update_speed"])


def never_slower(speeds: Sequence[float]) -> list[float]:
    """With fewer at work: else that was a slow moment."""
    return [max(speeds[i:]) for i in range(len(speeds))]


def measure_jitter(comm: Comm, known: dict[str, Any]) -> float:
    """How much what a rank computes between two meetings differs from time to time (`Machine.jitter`): by what the slowest of ranks that compute the same
    between two meetings takes longer than their mean. One of ten meetings, which some other process made late, doesn't count."""
    if "jitter" not in known:
        a, x = torch.randn(256, 256), torch.zeros((64 << 10) // 4)

        def between_meetings() -> int:
            barrier(comm)
            begin = time.perf_counter_ns()
            for _ in range(BETWEEN):
                a @ a
                x.add_(1.0)
            return time.perf_counter_ns() - begin

        taken, pace = calm_samples(between_meetings, MEETINGS, together=Ranks(comm))
        late = sorted(max(t) / statistics.mean(t) - 1 for t in zip(*comm.gather_ints(taken), strict=True))
        known["jitter"] = round(statistics.mean(late[: len(late) * 9 // 10]) / latest(comm.world_size), 4)
        mark(known, "jitter", at_pace(pace))
    return float(known["jitter"])


def measure_step(machine: Machine, comm: Comm, known: dict[str, Any], own_core: bool) -> None:
    """What a step takes beyond its operators and movements: the agreement of ranks, Python and autograd around it. Something that takes the caches is computed
    in it, as in training: a step that computes nothing takes a third of it. What of it each parameter takes, one after another, comes on top of the
    parameter's update; and what the call of a segment takes that computes nothing. Where ranks take turns on cores (not `own_core`) by their own clocks: what
    others compute between a rank's instructions is in theirs."""
    if "step_overhead" not in known:
        clock = time.perf_counter_ns if own_core else own_clock()
        whole, _, taken = time_step(comm, 1, LAYER, clock)
        one, segment, _ = time_step(comm, 1, 1, clock)
        many, _, _ = time_step(comm, MANY_PARAMETERS, 1, clock)
        each = max(many - one, 0) // (MANY_PARAMETERS - 1)
        speed = 1.0 if clock is time.perf_counter_ns else machine.busy_speed[-1]
        known["step_overhead"] = [int(max(whole - each, 0) / speed), segment, each]
        mark(known, "step_overhead", taken)
    of_step, of_segment, of_parameter = known["step_overhead"]
    machine.step_overhead_ns, machine.segment_overhead_ns = float(of_step), float(of_segment)
    machine.update = [(size, ns + of_parameter) for size, ns in machine.update]


def time_step(comm: Comm, num_layers: int, width: int, clock: Callable[[], int]) -> tuple[int, int, Timing]:
    """ns of a step of linear layers beyond its instructions, of one of its segments, and the step, by this clock."""
    layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))
    model = Parallel(layers, comm, loss=None, planner=lambda graph, _, rows: as_plan("* n=fed", graph, len(rows)))
    model.label = "calibration"
    x, other, ranks = torch.ones(width, width), torch.zeros(OTHER // 4 if width > 1 else 1), Ranks(comm)

    def between_steps() -> None:
        layers.zero_grad()
        other.add_(1.0)

    def one_step() -> None:
        model.call((x,), {}).sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = calmest(lambda: ranks.slowest(timed(one_step, 2 * REPEATS, clock, before=between_steps, together=ranks)))
        engine, kinds = next(iter(model.engines.values()))[0], (_C.InstructionKind.segment, _C.InstructionKind.segment_backward)
        engine.trace_clock = clock
        beyond, segments = [], []
        for _ in range(10):
            between_steps()
            engine.trace = []
            begin = clock()
            one_step()
            beyond.append(clock() - begin - sum(end - begin for _, begin, end in engine.trace))
            segments += [end - begin for position, begin, end in engine.trace if engine.kinds[position] in kinds]
    everyone = comm.gather_ints([int(quiet(beyond)), int(quiet(segments))])
    return max(v[0] for v in everyone), max(v[1] for v in everyone), taken


def latest(num_ranks: int) -> float:
    """Deviations that the latest of so many equal normal variables comes late (G. Blom, Statistical Estimates and Transformed Beta-Variables, 1958)."""
    return statistics.NormalDist().inv_cdf((num_ranks - 0.375) / (num_ranks + 0.25))
