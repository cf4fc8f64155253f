"""Measures this machine: operators at their local shapes and movements by size, with all local ranks at once.

Ranks on one host share caches and memory bandwidth, so a rank timed alone is not what runs. Results are kept on disk, keyed by all
that changes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch_soap import _C
from torch_soap.capture.graph import Graph
from torch_soap.machine import Machine
from torch_soap.measuring import REPEATS, Timing, calmest, forget_doubtful, load_per_core, mark, timed
from torch_soap.random import CounterState
from torch_soap.rewrite.segment import DTYPES, build_item
from torch_soap.runtime.comm import Comm

SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
FORMAT = 2  # of the cache


def placement(comm: Comm | None) -> list[int]:
    """Host of each rank, hosts counted in the order of ranks."""
    if comm is None:
        return []
    hosts = comm.gather_objects(socket.gethostname() + os.environ.get("GROUP_RANK", ""))
    names = list(dict.fromkeys(hosts))
    return [names.index(h) for h in hosts]


def cache_file(num_ranks: int, host_of: Sequence[int] = ()) -> Path:
    """One file per (kind of host, torch, threads, ranks on each host)."""
    root = Path(os.environ.get("TORCH_SOAP_CACHE", Path.home() / ".cache" / "torch_soap"))
    key = f"{FORMAT}|{platform.processor()}|{platform.machine()}|{os.cpu_count()}|{torch.__version__}|{torch.get_num_threads()}|{num_ranks}"
    if len(set(host_of)) > 1:
        key += f"|{list(host_of)}"
    return root / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def nothing_known() -> dict[str, Any]:
    return {"operators": {}, "tables": {}, "marks": {}, "load": round(load_per_core(), 2)}


def load(num_ranks: int, comm: Comm | None = None, host_of: Sequence[int] = ()) -> dict[str, Any]:
    """What rank 0's host knows and doesn't doubt, on all ranks, so that all measure the same things in the same order. Collective when `comm` is given."""
    known = nothing_known()
    path = cache_file(num_ranks, host_of)
    if path.exists() and (comm is None or comm.rank == 0):
        try:
            known = dict(json.loads(path.read_text()))
            forget_doubtful(known, load_per_core())
        except json.JSONDecodeError:  # cut short by a killed run: measure again
            path.unlink()
    return known if comm is None else dict(comm.gather_objects(known if comm.rank == 0 else None)[0])


def save(num_ranks: int, data: dict[str, Any], host_of: Sequence[int] = ()) -> None:
    path = cache_file(num_ranks, host_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data))
    temporary.replace(path)


def barrier(comm: Comm | None) -> None:
    if comm is not None:
        comm.gather_ints([0])


def detect(world_size: int, comm: Comm | None, known: dict[str, Any], host_of: Sequence[int] = ()) -> Machine:
    """The machine that this job runs on; its tables are measured unless they are known. `known` is the same on all ranks."""
    machine = Machine(world_size, 1)
    machine.name = platform.node()
    if host_of:
        machine.host_of = list(host_of)
    num_local = max(machine.host_of.count(h) for h in set(machine.host_of))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine.memory_bytes = int(memory * 0.8 / num_local)
    rates = known.get("rates")
    if rates is None:
        a, b = torch.randn(512, 512), torch.randn(512, 512)
        x = torch.randn(1 << 21)
        barrier(comm)
        gemm, wave = calmest(lambda: timed(lambda: a @ b)), calmest(lambda: timed(lambda: torch.add(x, 1.0)))
        small = calmest(lambda: timed(lambda: [torch.add(a[0], 1.0) for _ in range(20)]))
        rates = [2 * 512**3 / gemm.ns * 1e9, 2 * x.numel() * 4 / wave.ns * 1e9, small.ns // 20 * 2.0]
        known["rates"] = rates
        mark(known, "rates", gemm, wave, small)
    machine.flops_per_s, machine.memory_bytes_per_s, machine.op_overhead_ns = rates
    machine.efficiency = known.get("efficiency", {})
    if comm is not None and world_size > 1:
        measure_movements(machine, comm, known)
    return machine


def measure_movements(machine: _C.Machine, comm: Comm, known: dict[str, Any]) -> None:
    """Exchange and all-reduce by size: over the world and, on several hosts, within each host, all hosts at once. Other sets of ranks are priced
    by the nearest of these."""
    hosts = [[r for r, h in enumerate(machine.host_of) if h == host] for host in sorted(set(machine.host_of))]
    layouts = [(comm.world_size, len(hosts), list(range(comm.world_size)))]
    local = hosts[machine.host_of[comm.rank]]
    if len(hosts) > 1 and len(local) > 1 and all(len(h) == len(local) for h in hosts):
        layouts.append((len(local), 1, local))
        comm.join([tuple(local)])
    tables = dict(machine.tables)
    for num_ranks, num_hosts, ranks in layouts:
        for kind in ("exchange", "all_reduce"):
            key = f"{kind}/{num_ranks}/{num_hosts}"
            if key not in known["tables"]:
                timings = [calmest(lambda k=kind, r=ranks, s=size: time_movement(comm, k, r, s)) for size in SIZES]  # type: ignore[misc]
                known["tables"][key] = [[size, t.ns] for size, t in zip(SIZES, timings, strict=True)]
                mark(known, f"tables/{key}", *timings)
            tables[key] = [tuple(p) for p in known["tables"][key]]
    machine.tables = tables


def time_movement(comm: Comm, kind: str, ranks: list[int], size: int) -> Timing:
    """An exchange in which every rank sends `size` bytes in all, or an all-reduce of a tensor of `size` bytes. The slowest rank's, on all ranks."""
    if kind == "all_reduce":
        tensor = torch.zeros(size // 4)
        mine = timed(lambda: comm.all_reduce(tensor, ranks, False))
    else:
        others = [r for r in ranks if r != comm.rank]
        part = torch.zeros(size // len(others), dtype=torch.uint8)
        expected = {r: part.numel() for r in others}
        mine = timed(lambda: comm.exchange(dict.fromkeys(others, part), expected, ranks))
    everyone = comm.gather_ints([mine.ns, int(mine.spread * 1000)])
    return Timing(max(v[0] for v in everyone), max(v[1] for v in everyone) / 1000)


def measure_operators(cost: _C.CostModel, program: _C.Program, graph: Graph, comm: Comm | None, known: dict[str, Any], limit: int = 120) -> int:
    """Times what the program needs and the cost model lacks, the same list in the same order on every rank. Returns how many."""
    count = 0
    for sample in cost.missing(program):
        if sample.key in known["operators"]:
            forward, backward = known["operators"][sample.key]
            cost.measure(program, sample, forward, backward)
            continue
        if count >= limit:
            break
        count += 1
        timings = time_operator(program, graph, sample)
        forward, backward = timings[0].ns, max(timings[1].ns - timings[0].ns, 0)
        known["operators"][sample.key] = [forward, backward]
        mark(known, f"operators/{sample.key}", *timings)
        cost.measure(program, sample, forward, backward)
    return count


def time_operator(program: _C.Program, graph: Graph, sample: _C.OpSample) -> tuple[Timing, Timing]:
    """Of one tile of one operator: forward, and forward with backward."""
    module, shapes, dtypes, needs = build_item(program, sample.node, sample.tile, sample.chunk, graph)
    node = program.graph.nodes[sample.node]
    inputs = []
    for shape, dtype, need in zip(shapes, dtypes, needs, strict=True):
        if DTYPES[dtype].is_floating_point:
            inputs.append(torch.rand(shape, dtype=DTYPES[dtype]).requires_grad_(need))
        else:
            inputs.append(torch.zeros(shape, dtype=DTYPES[dtype]))
    random = CounterState(0, 1)
    differentiable = any(program.graph.tensors[t].requires_grad for t in node.outputs)

    def forward() -> Any:
        with torch.set_grad_enabled(differentiable):
            return module(*inputs, random)

    def both() -> None:
        results = [r for r in forward() if r.requires_grad]
        leaves = [x for x in inputs if x.requires_grad]
        if results and leaves:
            torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results], allow_unused=True)

    begin = time.perf_counter_ns()
    forward()
    repeats = 1 if time.perf_counter_ns() - begin > 100_000_000 else REPEATS
    one_way = calmest(lambda: timed(forward, repeats))
    return one_way, calmest(lambda: timed(both, repeats)) if differentiable else one_way
