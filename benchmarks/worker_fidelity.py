"""On each rank: one model under many plans, all in turns; reports predicted and measured step times and bytes.

torchrun --nproc-per-node=2 -m benchmarks.worker_fidelity MODEL ROUNDS STEPS
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

import torch_soap
from benchmarks.fidelity_models import MODELS, Case
from tests.dist.launch import report
from tests.unit.test_memory import OPTIMIZER_COPIES, LiveBytes
from torch_soap import _C, cache, calibrate
from torch_soap.backend import init_string
from torch_soap.capture.graph import Graph
from torch_soap.machine import to_json
from torch_soap.measuring import CORES, NAP_S, NEAR, PACE, apart, settled
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
# A step counts where small operators before and after it take up to so many times what they take in calm moments, and cores are as far apart after it as
# before; a visit to a plan where half of its steps count.
STEADY, READINGS = 1.2, 20
# A virtual machine's cores come to share a cache, or to share it no longer, every minute or so: what is predicted of the one isn't measured of the other. Plans
# are run in whichever moment it is until one kind has all of them; predictions are of that kind. So many visits to a plan at most, for each that is wanted; no
# more than are wanted after so many seconds; and so many naps until cores come back.
VISITS, PATIENCE_S, NAPS = 3, 120.0, 600


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


def traced(model: Any, step: Callable[[], Any]) -> dict[str, list[float]]:
    """Where the time of a step went on this rank, by kind of instruction: [how many, ms]."""
    engine = next(iter(model._soap.engines.values()))[0]
    engine.trace = []
    step()
    measured: dict[str, list[float]] = {}
    for position, begin, end in engine.trace:
        add(measured, engine.kinds[position].name, end - begin)
    engine.trace = None
    return rounded(measured)


def simulated(program: _C.Program, simulation: _C.Simulation, rank: int) -> dict[str, list[float]]:
    """The same of a recorded simulation."""
    predicted: dict[str, list[float]] = {}
    for e in simulation.events:
        if e.device == rank:
            add(predicted, program.steps[e.step].kind.name, e.end_ns - e.begin_ns)
    return rounded(predicted)


def add(parts: dict[str, list[float]], kind: str, ns: int) -> None:
    number, ms = parts.get(kind, [0, 0.0])
    parts[kind] = [number + 1, ms + ns / 1e6]


def rounded(parts: dict[str, list[float]]) -> dict[str, list[float]]:
    return {kind: [number, round(ms, 2)] for kind, (number, ms) in parts.items()}


class Moments:
    """Kinds of moments of a launch, by how far apart the cores are; the same on all ranks."""

    def __init__(self, together: Ranks) -> None:
        self.together, self.distances = together, list[int]()

    def now(self) -> int:
        """Which it is."""
        now_ns = self.together.core_distance_ns()
        kinds = [i for i, ns in enumerate(self.distances) if apart(ns, now_ns) <= NEAR]
        if not kinds:
            self.distances.append(now_ns)
            kinds = [len(self.distances) - 1]
        return kinds[0]


@dataclass
class Step:
    ms: float
    kind: int  # of the moment; -1: cores moved meanwhile
    pace: float


class Training:
    """Steps of one model under one plan after another."""

    def __init__(self, model: Any, batch: tuple[torch.Tensor, ...], moments: Moments, steps: int) -> None:
        self.model, self.batch, self.moments, self.steps = model, batch, moments, steps
        self.whole = {n: t.detach().clone() for n, t in model.state_dict().items()}
        self.first_losses: dict[str, float] = {}

    def visit(self, label: str, plan: torch_soap.Plan) -> list[Step]:
        """A few steps under a plan, after one to warm up."""
        parallel = self.model._soap
        replan(parallel, plan)
        self.model.load_state_dict(self.whole)
        parallel.random.call, parallel.meter.count = 0, FIRST_SAMPLE  # no sampled step among the measured ones
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        _, loss = one_step(self.model, self.optimizer, self.batch)
        age(self.optimizer)
        if label not in self.first_losses:
            dist.all_reduce(loss)
            self.first_losses[label] = float(loss) / dist.get_world_size()
        out, kind, slow = [], self.moments.now(), pace()
        for _ in range(self.steps):
            seconds_taken, _ = one_step(self.model, self.optimizer, self.batch)
            kind_before, slow_before, kind, slow = kind, slow, self.moments.now(), pace()
            out.append(Step(round(1e3 * seconds_taken, 3), kind if kind == kind_before else -1, max(slow, slow_before)))
        return out


def train(training: Training, plans: dict[str, torch_soap.Plan], rounds: int, host_of: list[int], graph: Graph) -> tuple[int, dict[str, dict[str, Any]]]:
    """Visits all plans until `rounds` visits to each count in one kind of moment: which, and of each plan its steps, a traced one, and its bytes."""
    visits = {label: list[list[Step]]() for label in plans}
    out = {label: dict[str, Any]() for label in plans}
    distances = training.moments.distances

    def counting(label: str, kind: int) -> list[list[Step]]:
        """Of each visit the steps that count, where there are enough."""
        of_kind = [[step for step in visit if step.kind == kind and step.pace <= STEADY] for visit in visits[label]]
        return [steps for steps in of_kind if 2 * len(steps) >= training.steps]

    def best() -> int:
        return max(range(len(distances)), key=lambda kind: sum(min(len(counting(label, kind)), rounds) for label in plans))

    begin = time.perf_counter()
    for number in range(VISITS * rounds):
        (over,) = training.model._soap.comm.gather_ints([int(time.perf_counter() - begin > PATIENCE_S)])[0]  # rank 0's clock
        if over and number >= rounds:
            break
        wanting = [label for label in plans if number < rounds or len(counting(label, best())) < rounds]
        if not wanting:
            break
        for label in wanting:
            visits[label].append(training.visit(label, plans[label]))
            if number == 0:
                out[label] |= looked_at(training, host_of, graph)
    kind = best()
    for label, row in out.items():
        steps = [step for visit in visits[label] for step in visit]
        calmest = sorted(steps, key=lambda step: (step.kind != kind, step.pace))[: training.steps]  # where no visit counts
        chosen = min(counting(label, kind) or [calmest], key=lambda steps: statistics.median(step.ms for step in steps))  # what others do only adds
        row |= {"measured_ms": [step.ms for step in chosen], "pace": [step.pace for step in chosen], "visits": len(visits[label])}
        row |= {"counting": len(counting(label, kind)), "all_steps": [[step.ms, step.kind, step.pace] for step in steps]}
        row["first_loss"] = training.first_losses[label]
    return kind, out


def looked_at(training: Training, host_of: list[int], graph: Graph) -> dict[str, Any]:
    """Of the plan that runs: where a step's time goes, and its tensors' bytes."""
    comm = training.model._soap.comm
    row = {"parts": comm.gather_objects(traced(training.model, lambda: one_step(training.model, training.optimizer, training.batch)))}
    if len(set(host_of)) == 1:  # the same over a network
        training.optimizer.zero_grad()
        engine = next(iter(training.model._soap.engines.values()))[0]
        row["measured_bytes"] = comm.gather_objects(peak_bytes(training.model._soap, engine, graph, training.batch))
    return row


def main(name: str, rounds: int, steps: int) -> None:
    begin = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(init_string())
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    case: Case = MODELS[name]()
    batch = tuple(t[case.rows * rank : case.rows * (rank + 1)].clone() for t in case.batch(case.rows * world))  # not views: memory is counted
    model: Any = torch_soap.parallelize(case.module, batch, loss=case.loss, plan="* n=fed")
    rows = [case.rows] * world
    captured_graph = next(iter(model._soap.engines.values()))[1]
    comm, graph = model._soap.comm, to_op_graph(captured_graph)
    found = search_plan(graph, captured_graph, rows, comm=comm, simulations=SIMULATIONS)
    texts = comm.gather_objects(plans_of(graph, found, rows) if rank == 0 else None)[0]
    plans = {label: as_plan(text, graph, world) for label, text in texts.items()}
    seconds = {"planning": time.perf_counter() - begin}
    host_of, moments = calibrate.placement(comm), Moments(Ranks(comm))
    kind, out = train(Training(model, batch, moments, steps), plans, rounds, host_of, captured_graph)
    seconds["training"] = time.perf_counter() - begin - sum(seconds.values())
    CORES.distance_ns = moments.distances[kind]
    CORES.naps = NAPS
    settled(moments.together)
    known = cache.load(world, comm, host_of)
    for _ in range(2):  # the second time: was that a slow minute?
        cost = _C.CostModel(calibrate.detect(world, comm, known, host_of))
        for plan in plans.values():
            while measure(cost, graph, captured_graph, plan.strategy, rows, comm, known):
                pass
        doubt(known)
    if rank == 0:
        cache.save(world, known, host_of)
    seconds["measuring operators"] = time.perf_counter() - begin - sum(seconds.values())
    for label, plan in plans.items():
        program = _C.lower(graph, plan.strategy, rows)
        simulation = _C.simulate(program, cost, record=True)
        row = out[label]
        row |= {"predicted_ms": simulation.step_ns / 1e6, "memory_bytes": list(simulation.memory_bytes)}
        row["parts"] = [{"measured": m, "predicted": simulated(program, simulation, r)} for r, m in enumerate(row["parts"])]
    if rank == 0:
        report({"plans": out, "found": found.text.splitlines(), "seconds": seconds, "machine": to_json(cost.machine), "cores_ns": known["cores_ns"]})
        for label, row in out.items():
            median = statistics.median(row["measured_ms"])
            ratio = max(row["memory_bytes"]) / max(row.get("measured_bytes", [1]))
            print(f"{label:<14} {row['predicted_ms']:8.1f} {median:8.1f} {row['predicted_ms'] / median:6.2f}   memory {ratio:.3f}", flush=True)
        facts = {k: v for k, v in to_json(cost.machine).items() if k in ("busy_speed", "update_speed", "step_overhead_ns", "update")}
        print({k: round(v) for k, v in seconds.items()}, moments.distances, f"waited {(NAPS - CORES.naps) * NAP_S:.0f} s for cores to come back", facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
