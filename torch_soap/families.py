"""`python -m torch_soap calibrate`: measures this machine now, and what part of its rates each family of operators reaches."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from torch_soap import _C, cache, calibrate
from torch_soap.capture import capture
from torch_soap.machine import Machine
from torch_soap.measuring import mark
from torch_soap.operator_times import time_tiles
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.runtime.comm import Comm


class Probe(nn.Module):
    """An operator or more of each family, of a size at which the call itself doesn't count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_norm = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.embedding, self.layer_norm, self.linear = nn.Embedding(4096, 256), nn.LayerNorm(256), nn.Linear(256, 1024)
        self.lstm = nn.LSTM(256, 256, batch_first=True)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        pixels = torch.relu(self.batch_norm(self.conv(image)))
        words = self.embedding(tokens)
        heads = words.view(*words.shape[:2], 4, 64).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        wide = nn.functional.gelu(self.linear(self.layer_norm(words)))
        states, _ = self.lstm(words)
        return torch.stack([t.flatten(1).mean(1) for t in (pixels, attended, wide, states)], 1)


def measure_families(machine: Machine, comm: Comm | None, known: dict[str, Any]) -> dict[str, float]:
    """The efficiency of each family, with all ranks at once: the time that the machine's rates allow, over the time that it took. Above 1
    where an operator stays in the cache and the rate was measured outside of it. Rank 0's, on all ranks; into `known` too."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch.export: nn.LSTM assigns its flattened weights
        captured = capture(Probe(), (torch.randn(8, 32, 32, 32), torch.randint(4096, (8, 128))), {}, check=False)
    graph = captured.instantiate(captured.inputs)
    op_graph = to_op_graph(graph)
    program = _C.lower(op_graph, _C.parse_plan(op_graph, "* @ [0]", 1), [8])
    samples = _C.CostModel(machine).missing(program)
    works = [_C.work_of(program, sample.node, sample.tile, sample.chunk) for sample in samples]
    calibrate.barrier(comm)
    timings = [forward for forward, _ in time_tiles(program, graph, samples, comm)]
    parts = defaultdict(list)
    for work, timing in zip(works, timings, strict=True):
        if work.num_bytes == 0:
            continue
        taken = timing.ns
        ideal = max(work.flops / machine.flops_per_s, work.num_bytes / machine.memory_bytes_per_s) * 1e9
        parts[work.family].append(ideal / max(taken - machine.op_overhead_ns, 0.1 * taken))
    found = {family: round(statistics.median(values), 3) for family, values in parts.items()}
    known["efficiency"] = found if comm is None else dict(comm.gather_objects(found)[0])
    mark(known, "efficiency", *timings)
    return dict(known["efficiency"])


def measure_now(comm: Comm | None) -> tuple[Machine, str]:
    """The machine, measured now whatever the cache says; the cache is written anew; and what was measured, for people. Collective when `comm` is given."""
    begin = time.perf_counter()
    world = 1 if comm is None else comm.world_size
    host_of = calibrate.placement(comm)
    known = cache.nothing_known()
    machine = calibrate.detect(world, comm, known, host_of)
    machine.efficiency = measure_families(machine, comm, known)
    if comm is None or comm.rank == 0:
        cache.save(world, known, host_of)
    return machine, report(machine, known, time.perf_counter() - begin)


def report(machine: Machine, known: dict[str, Any], seconds: float) -> str:
    hosts = len(set(machine.host_of))
    lines = [
        f"{machine.name}: {machine.num_devices} device{'s' * (machine.num_devices > 1)} on {hosts} host{'s' * (hosts > 1)}, measured in {seconds:.1f} s",
        f"  products       {machine.flops_per_s / 1e9:10.1f} GFLOP/s per device, all devices busy",
        f"  elementwise    {machine.memory_bytes_per_s / 1e9:10.1f} GB/s per device",
        f"  one operator   {machine.op_overhead_ns / 1e3:10.1f} us of overhead",
        f"  memory         {machine.memory_bytes / 2**30:10.1f} GiB per device",
    ]
    if machine.update:
        lines.append("  update of a parameter by AdamW: " + ", ".join(f"{size >> 10} KiB {ns / 1e3:.0f} us" for size, ns in machine.update))
    if machine.busy_speed:
        lines.append("  speed of a device while 1, 2, ... of its host compute: " + ", ".join(f"{speed:.2f}" for speed in machine.busy_speed))
        lines.append("  the same of its updates: " + ", ".join(f"{speed:.2f}" for speed in machine.update_speed))
        lines.append(f"  what computations differ from time to time: {100 * machine.jitter:.1f} % (standard deviation)")
        lines.append(f"  a movement after long computation {(machine.cold_ns or machine.turn_ns) / 1e3:.1f} us longer")
        lines.append(f"  a piece that is packed or put in its place {machine.piece_ns / 1e3:.1f} us")
        if hosts > 1:
            lines.append(
                f"  who computes loses {machine.send_ns_per_byte:.2f} ns by a byte to another host, {machine.receive_ns_per_byte:.2f} ns by one from there"
            )
        lines.append(f"  a step's own  {machine.step_overhead_ns / 1e3:10.1f} us")
    lines += [f"  {family:<14} {part:10.2f} of these rates" for family, part in sorted(machine.efficiency.items())]
    for key, table in sorted(machine.tables.items()):
        kind, ranks, over = key.split("/")
        where = "within a host" if over == "1" else f"over {over} hosts"
        lines.append(f"  {kind.replace('_', '-')} of {ranks} ranks {where}: " + ", ".join(f"{size >> 10} KiB {ns / 1e3:.0f} us" for size, ns in table))
    if not machine.tables:
        lines.append("  movements: none with one process; run it with torchrun and as many processes as you train with")
    lines.append(f"  load {known['load']:.2f} per core when it began")
    doubtful = [name for name, (spread, _, _) in known["marks"].items() if spread > 0]
    if doubtful:
        lines.append(f"  repeats differed too much, not to be relied on by the next plan: {', '.join(doubtful)}")
    return "\n".join(lines)
