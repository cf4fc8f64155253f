"""On each rank: one model under every contender, a step of each in turn, round after round; reports times, losses and what was left out.

torchrun --nproc-per-node=2 -m benchmarks.worker_training_speed MODEL BACKEND ROUNDS SECONDS
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import torch_soap  # registers the backend  # noqa: F401
from benchmarks.contenders import Contender, contenders, held_bytes
from benchmarks.fidelity_models import Batch
from benchmarks.training_models import MODELS, make_batch
from benchmarks.training_table import PEERS
from tests.dist.launch import report
from torch_soap.runtime.heap import keep_freed_memory

CHECKED = 3  # steps whose losses are compared; they warm up too
SETTLED, FAR = 5, 1.5  # after so many rounds, who takes so many times the best one's time leaves: it can't be the best
RESERVE_BYTES = 3 << 30  # that a contender must leave, for activations and gradients of the one that steps
LONG_MS, FEW_ROUNDS = 2000.0, 10  # where a contender that stays takes longer, so many rounds do


def one_step(contender: Contender, batch: Batch) -> tuple[float, torch.Tensor]:
    """ms from a barrier to a barrier: the slowest rank counts."""
    dist.barrier()
    start = time.perf_counter()
    loss = contender.step(batch)
    dist.barrier()
    taken = 1e3 * (time.perf_counter() - start)
    contender.rest()
    return taken, loss


def agreed(value: Any) -> Any:
    """Rank 0's."""
    out = [value]
    dist.broadcast_object_list(out, 0)
    return out[0]


def mean_loss(name: str, loss: torch.Tensor) -> float:
    total = loss.detach().clone().reshape(1)
    dist.all_reduce(total)
    return float(total) / (1 if name == "one process" else dist.get_world_size())


def build(name: str, make: Any, built: dict[str, Contender], batch: Batch) -> dict[str, Any]:
    """A contender and its first steps."""
    begin = time.perf_counter()
    contender: Contender = make(built)
    row: dict[str, Any] = {"build_s": round(time.perf_counter() - begin, 1), "losses": []}
    for step in range(CHECKED):
        row["losses"].append(mean_loss(name, one_step(contender, batch)[1]))
        if step == 0:
            contender.age()
    contender.slow_down()
    built[name] = contender
    return row


def available_bytes() -> int:
    """Of the machine, as all ranks see it; what a process has freed goes back to it first."""
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(agreed(int(fields["MemAvailable"].split()[0]) << 10))


def far(times: dict[str, list[float]]) -> list[str]:
    """Peers, and one process, that are far from the best peer."""
    medians = {n: statistics.median(t) for n, t in times.items() if n in (*PEERS, "one process")}
    best = min(m for n, m in medians.items() if n in PEERS)
    return [n for n, m in medians.items() if m > FAR * best]


def run(built: dict[str, Contender], batch: Batch, rounds: int, seconds: float) -> dict[str, list[float | None]]:
    """ms of each contender in each round; None where it had left."""
    out: dict[str, list[float | None]] = {name: [] for name in built}
    left: list[str] = []
    for contender in built.values():  # memory that went back to the machine comes again
        one_step(contender, batch)
    begin = time.perf_counter()
    for turn in range(rounds):
        order = [n for n in built if n not in left]
        random.Random(turn).shuffle(order)
        for name in order:
            out[name].append(round(one_step(built[name], batch)[0], 3))
        for name in left:
            out[name].append(None)
        if turn + 1 == SETTLED:
            left = agreed(far({n: [t for t in ts if t is not None] for n, ts in out.items()}))
        slowest = max(statistics.median(t for t in out[n] if t is not None) for n in built if n not in left)
        late = time.perf_counter() - begin > seconds or (slowest > LONG_MS and turn + 1 >= FEW_ROUNDS)
        if agreed(late):
            break
    return out


def main(name: str, backend: str, rounds: int, seconds: float) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(backend)
    keep_freed_memory()  # for all alike: parallelize does it
    rank, world = dist.get_rank(), dist.get_world_size()
    timed = MODELS[name]
    case = timed.make()
    whole = make_batch(case, world)
    batch = tuple(t[case.rows * rank : case.rows * (rank + 1)].clone() for t in whole)
    rows, parameter_bytes = case.rows, sum(p.nbytes for p in case.module.parameters())
    del case
    built: dict[str, Contender] = {}
    result: dict[str, Any] = {"rows": rows, "optimizer": timed.optimizer, "loss_inside": True, "hybrid": timed.hybrid, "contenders": {}, "left_out": {}}
    for label, make in contenders(timed, batch, whole).items():
        there, wanted = available_bytes(), held_bytes(label, timed, parameter_bytes, world)
        if there - wanted < RESERVE_BYTES:
            result["left_out"][label] = f"needs {wanted >> 20} MiB, {there >> 20} are there"
            if label == "ours":
                break
            continue
        try:
            row = build(label, make, built, batch)
        except Exception as error:
            if label == "ours":
                raise
            result["left_out"][label] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
            continue
        result["contenders"][label] = row
        gc.collect()
        if rank == 0:
            print(label, row, f"{there >> 20} MiB were there", flush=True)
    if "ours" in built:
        result |= rounds_of(built, batch, rounds, seconds, result["contenders"])
    else:
        result = {"failed": f"ours {result['left_out']['ours']}"}
    if rank == 0:
        report(result)
    dist.barrier()
    dist.destroy_process_group()


def rounds_of(built: dict[str, Contender], batch: Batch, rounds: int, seconds: float, rows: dict[str, Any]) -> dict[str, Any]:
    """Runs the rounds, whose times go to the contenders' rows; what is said of our plan."""
    for label, times in run(built, batch, rounds, seconds).items():
        rows[label]["ms"] = times
        if dist.get_rank() == 0:
            print(label, round(statistics.median(t for t in times if t is not None), 1), flush=True)
    plan: Any = built["ours"].model.plan
    return {"plan": plan.text.splitlines(), "predicted_ms": plan.predicted.get("step_time_ns", 0) / 1e6, "chosen": plan.predicted.get("chosen")}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
