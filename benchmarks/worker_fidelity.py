"""On each rank: one model under many plans, all in turns; reports predicted and measured step times and bytes.

torchrun --nproc-per-node=2 -m benchmarks.worker_fidelity MODEL ROUNDS STEPS
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

import torch_soap
from benchmarks.fidelity_models import MODELS, Case
from tests.dist.launch import report
from tests.unit.test_memory import OPTIMIZER_COPIES, LiveBytes
from torch_soap import _C, calibrate
from torch_soap.backend import init_string
from torch_soap.capture.graph import Graph
from torch_soap.machine import to_json
from torch_soap.measuring import CORES, NAP_S, PACE, settled
from torch_soap.operator_times import Ranks, doubt
from torch_soap.plan import as_plan
from torch_soap.planner import measure, search_plan
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.runtime.comm import TorchComm
from torch_soap.runtime.engine import Engine
from torch_soap.runtime.meter import FIRST_SAMPLE
from torch_soap.runtime.replan import replan
from torch_soap.testing import random_strategy

FEWEST_RANDOM, FEWEST_PLANS, MOST_PLANS = 3, 12, 12
FIRST = ("found", "ddp", "one device", "zero-1", "zero-3", "megatron", "owt", "1f1b", "gpipe")  # where there are more than MOST_PLANS
SIMULATIONS = 300  # of the search: a plan that is nearly the best is enough here
FRESH = 128 << 10
WARM_UP = 1  # steps after each change of plan
# A plan's steps are run again, after a pause, while small operators before or after them take so many times what they take in calm moments, or the steps
# themselves differ by so much (quartiles' distance over the median): memory has slow moments that small operators don't show.
STEADY, ALIKE, ATTEMPTS, PAUSE_S, READINGS = 1.2, 0.1, 3, 2.0, 100
# A virtual machine's cores come to share a cache, or to share it no longer, every minute or so: what is predicted of the one isn't measured of the other.
# The launch is of the moments in which they are nearest.
MOVED, NAPS, ASKED, ASKED_EVERY_S = 100.0, 1000, 25, 0.2


def plans_of(graph: _C.OpGraph, found: torch_soap.Plan, rows: list[int]) -> dict[str, str]:
    """By name, no two alike: what was found, what people write, and random ones."""
    out = {"found": found.text}
    for name, strategy in _C.seeds(graph, len(rows)):
        text = _C.print_plan(graph, strategy)
        try:
            _C.lower(graph, strategy, rows)
        except ValueError:  # not legal for this model
            continue
        if text in out.values():
            continue
        out[name] = text
    names = sorted(out, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    out = {name: out[name] for name in names[: MOST_PLANS - FEWEST_RANDOM]}
    num_random = max(FEWEST_RANDOM, FEWEST_PLANS - len(out))
    return out | {f"random {seed}": _C.print_plan(graph, random_strategy(graph, rows, seed)) for seed in range(num_random)}


class PeakBytes(LiveBytes):
    """Adds up only once there are FRESH new bytes: a large model has thousands of storages at each of thousands of operators."""

    fresh = 0

    def see(self, tensors: list[torch.Tensor]) -> None:
        if self.paused:
            return
        for t in tensors:
            storage = t.untyped_storage()
            known = self.live.get(storage._cdata)
            if known is None or known.expired():
                self.live[storage._cdata] = StorageWeakRef(storage)
                self.fresh += storage.nbytes()
        if self.fresh >= FRESH:
            self.fresh = 0
            super().see([])


class LeanComm(TorchComm):
    """What c10d and packing hold isn't counted, but what comes."""

    live: LiveBytes

    def all_reduce(self, tensor: torch.Tensor, ranks: Sequence[int], maximum: bool) -> torch.Tensor:
        self.live.paused = True
        out = super().all_reduce(tensor, ranks, maximum)
        self.live.paused = False
        return out

    def exchange(self, sends: dict[int, torch.Tensor], recv_bytes: dict[int, int], ranks: Sequence[int]) -> dict[int, torch.Tensor]:
        self.live.paused = True
        out = super().exchange(sends, recv_bytes, ranks)
        self.live.paused = False
        self.live.see(list(out.values()))
        return out


def peak_bytes(parallel: Any, engine: Engine, graph: Graph, batch: tuple[torch.Tensor, ...]) -> int:
    """As tests/unit/test_memory.py counts them: tensors of one step on this rank, with AdamW's state."""
    captured = next(iter(parallel.captures.values()))[0][0]
    stored = {n: t.detach() for n, t in parallel.stored(captured, graph).items()}
    names = [n.name for n in graph.nodes if n.kind == "feed"]
    feeds = dict(zip(names, captured.flatten_inputs(batch, {}), strict=True))
    trained = {n for n, t in captured.stored_tensors(graph).items() if t.requires_grad}
    old = [t.clone() for n, t in stored.items() if n in trained]
    state_bytes = OPTIMIZER_COPIES * sum(t.numel() * t.element_size() for t in old)
    comm = LeanComm()
    comm.groups, comm.joined, engine.comm = parallel.comm.groups, parallel.comm.joined, comm
    share = 1.0 / comm.world_size
    with PeakBytes([*stored.values(), *feeds.values(), *old]) as live:
        comm.live = live
        seeds = {engine.names[n]: torch.full(engine.shapes[engine.value_of_return[n]], share) for n in engine.returns if engine.return_wants_grad(n)}
        state = engine.forward(feeds, stored, grad=True, random=parallel.random, seeds=seeds if engine.program.interleaved else None)
        old.clear()
        if not engine.program.interleaved:
            engine.backward(state, seeds)
    engine.comm = parallel.comm
    return live.peak + state_bytes


def pace() -> float:
    """How slow the machine is right now, in times of its usual pace: of the slowest rank, all at once, over READINGS readings. It isn't ours alone."""
    dist.barrier()
    taken = torch.tensor([statistics.mean(PACE() for _ in range(READINGS))])
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return round(float(taken), 3)


def nearest(together: Ranks) -> int:
    """Least distance of cores over some seconds, in ns; the same on all ranks."""
    distances = []
    for _ in range(ASKED):
        distances.append(together.core_distance_ns())
        time.sleep(ASKED_EVERY_S)
    return min(distances)


def spread(taken: Sequence[float]) -> float:
    """Quartiles' distance over the median, as the slowest rank sees it: all ranks decide alike."""
    low, median, high = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [taken[0]] * 3
    worst = torch.tensor([(high - low) / median])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def age(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state as a training in progress has it, without zeros. Torch's square root takes five to nine times as long for a zero as for another number, and
    the first steps with one batch have many: whatever that batch left out, behind ReLU, dropout or in an embedding."""
    for state in optimizer.state.values():
        state["exp_avg_sq"].clamp_(min=1e-12)


def one_step(model: Any, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, ...]) -> tuple[float, torch.Tensor]:
    """Seconds from a barrier to a barrier: the slowest rank counts."""
    dist.barrier()
    start = time.perf_counter()
    loss = model(*batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    dist.barrier()
    return time.perf_counter() - start, loss.detach()


def parts(model: Any, cost: _C.CostModel) -> dict[str, Any]:
    """Where the time of the last traced step went on this rank, by kind of instruction, beside what was predicted: [how many, ms]."""
    engine = next(iter(model._soap.engines.values()))[0]
    measured: dict[str, list[float]] = {}
    for position, begin, end in engine.trace:
        kind = measured.setdefault(engine.kinds[position].name, [0, 0.0])
        kind[0], kind[1] = kind[0] + 1, kind[1] + (end - begin) / 1e6
    predicted: dict[str, list[float]] = {}
    for e in _C.simulate(engine.program, cost, record=True).events:
        if e.device == model._soap.comm.rank:
            kind = predicted.setdefault(engine.program.steps[e.step].kind.name, [0, 0.0])
            kind[0], kind[1] = kind[0] + 1, kind[1] + (e.end_ns - e.begin_ns) / 1e6
    return {name: {k: [n, round(ms, 2)] for k, (n, ms) in table.items()} for name, table in (("measured", measured), ("predicted", predicted))}


def main(name: str, rounds: int, steps: int) -> None:
    begin = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(init_string())
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    case: Case = MODELS[name]()
    batch = tuple(t[case.rows * rank : case.rows * (rank + 1)].contiguous() for t in case.batch(case.rows * world))
    whole = {n: t.detach().clone() for n, t in case.module.state_dict().items()}
    model: Any = torch_soap.parallelize(case.module, batch, loss=case.loss, plan="* n=fed")
    parallel, rows = model._soap, [case.rows] * world
    captured_graph = next(iter(parallel.engines.values()))[1]
    comm, graph = parallel.comm, to_op_graph(captured_graph)
    CORES.naps, together = NAPS, Ranks(comm)
    CORES.distance_ns = nearest(together)
    settled(together)
    found = search_plan(graph, captured_graph, rows, comm=comm, simulations=SIMULATIONS)
    cost = found.context.cost
    texts = comm.gather_objects(plans_of(graph, found, rows) if rank == 0 else None)[0]
    plans = {label: as_plan(text, graph, world) for label, text in texts.items()}
    seconds = {"planning": time.perf_counter() - begin}
    host_of = calibrate.placement(comm)
    known = calibrate.load(world, comm, host_of)
    for _ in range(2):  # the second time: was that a slow minute?
        cost = _C.CostModel(calibrate.detect(world, comm, known, host_of))
        for plan in plans.values():
            while measure(cost, graph, captured_graph, plan.strategy, rows, comm, known):
                pass
        doubt(known)
    if rank == 0:
        calibrate.save(world, known, host_of)
    out: dict[str, dict[str, Any]] = {}
    for label, plan in plans.items():
        simulation = _C.simulate(_C.lower(graph, plan.strategy, rows), cost)
        out[label] = {
            "predicted_ms": simulation.step_ns / 1e6,
            "memory_bytes": list(simulation.memory_bytes),
            "measured_ms": [],
        }
    seconds["measuring operators"] = time.perf_counter() - begin - sum(seconds.values())
    for turn in range(rounds):
        for label, plan in plans.items():
            row = out[label]
            replan(parallel, plan)
            model.load_state_dict(whole)
            parallel.random.call, parallel.meter.count = 0, FIRST_SAMPLE  # no sampled step among the measured ones
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            attempts: list[tuple[float, float, list[float]]] = []  # how unsteady, the pace, the steps
            while not attempts or (attempts[-1][0] > 1 and len(attempts) < ATTEMPTS):
                if attempts:
                    time.sleep(PAUSE_S)
                here = settled(together)
                before, taken = pace(), []
                for step in range(WARM_UP + steps):
                    seconds_taken, loss = one_step(model, optimizer, batch)
                    taken.append(round(1e3 * seconds_taken, 3))
                    if step == 0:
                        age(optimizer)
                    if step == 0 and turn == 0 and not attempts:
                        dist.all_reduce(loss)
                        row["first_loss"] = float(loss) / world
                slow, taken = max(before, pace()), taken[WARM_UP:]
                here = here and not together.moved()
                attempts.append((max(slow / STEADY, spread(taken) / ALIKE, 0.0 if here else MOVED), slow, taken))
            unsteady, slowest, steadiest = min(attempts)
            row.setdefault("moved", []).append(unsteady >= MOVED)
            row.setdefault("pace", []).append(slowest)
            row.setdefault("attempts", []).append(len(attempts))
            row.setdefault("rounds_ms", []).append(steadiest)
            calm = [ms for ms, moved in zip(row["rounds_ms"], row["moved"], strict=True) if not moved] or row["rounds_ms"]
            row["measured_ms"] = min(calm, key=statistics.median)  # what others do on this machine only adds
            engine = next(iter(parallel.engines.values()))[0]
            if turn == 0:
                engine.trace = []
                one_step(model, optimizer, batch)
                row["parts"] = comm.gather_objects(parts(model, cost))
                engine.trace = None
            if turn == rounds - 1 and len(set(host_of)) == 1:  # the same over a network
                optimizer.zero_grad()
                row["measured_bytes"] = comm.gather_objects(peak_bytes(parallel, engine, captured_graph, batch))
    seconds["training"] = time.perf_counter() - begin - sum(seconds.values())
    if rank == 0:
        report({"plans": out, "found": found.text.splitlines(), "seconds": seconds, "machine": to_json(cost.machine)})
        for label, row in out.items():
            median = statistics.median(row["measured_ms"])
            ratio = max(row["memory_bytes"]) / max(row.get("measured_bytes", [1]))
            print(f"{label:<14} {row['predicted_ms']:8.1f} {median:8.1f} {row['predicted_ms'] / median:6.2f}   memory {ratio:.3f}", flush=True)
        print(f"waited {(NAPS - CORES.naps) * NAP_S:.0f} s for cores to come back", {k: round(v) for k, v in seconds.items()}, {k: v for k, v in to_json(cost.machine).items() if k in ("busy_speed", "step_overhead_ns", "update")})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
