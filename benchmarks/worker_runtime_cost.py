"""On each rank: where the time of training steps goes: operators, movements, the agreement of ranks, the optimizer, and what is left, the runtime's own.

torchrun --nproc-per-node=2 -m benchmarks.worker_runtime_cost MODEL STEPS
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import torch_soap
from benchmarks.fidelity_models import MODELS, Case
from tests.dist.launch import report
from torch_soap.backend import init_string
from torch_soap.plan import as_plan
from torch_soap.planner import search_plan
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.runtime.meter import FIRST_SAMPLE
from torch_soap.runtime.replan import replan

SIMULATIONS = 300  # of the search: a plan that is nearly the best is enough here
COLLECTIVES = ("allreduce", "alltoall_base", "all_to_all_single", "_allgather_base", "all_gather_single", "allgather", "broadcast", "barrier")


def mlp() -> Case:
    """Small enough that a step is mostly calls."""

    def batch(total: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(total, 64), torch.randint(10, (total,))

    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return Case(module, F.cross_entropy, 64, batch)


CASES = {"small mlp": mlp, **MODELS}


class Stopwatch:
    """ns by kind, while `on`. A part inside of another one counts as the inner's kind only."""

    def __init__(self) -> None:
        self.on = False
        self.ns: Counter[str] = Counter()
        self.stack: list[list[Any]] = []  # [kind, ns of the parts inside]

    def begin(self, kind: str) -> None:
        self.stack.append([kind, 0, time.perf_counter_ns()])

    def end(self) -> None:
        taken = time.perf_counter_ns()
        kind, inner, begin = self.stack.pop()
        taken -= begin
        self.ns[kind] += taken - inner
        if self.stack:
            self.stack[-1][1] += taken

    def around(self, kind: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return fn(*args, **kwargs)
            self.begin(kind)
            try:
                return fn(*args, **kwargs)
            finally:
                self.end()

        return timed


def time_steps(model: Any, batch: tuple[torch.Tensor, ...], steps: int, watch: Stopwatch) -> list[dict[str, Any]]:
    """ms by kind of each step; its rest is `own`. The engine times what it calls (`Engine.timed`), c10d and the optimizer are timed from outside."""
    model._soap.meter.count = FIRST_SAMPLE  # no sampled step among the measured ones
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    optimizer.register_step_pre_hook(lambda *_: watch.begin("optimizer") if watch.on else None)
    optimizer.register_step_post_hook(lambda *_: watch.end() if watch.on else None)
    zero_grad = watch.around("optimizer", optimizer.zero_grad)
    out = []
    core: Any = None
    for step in range(3 + steps):
        if step == 3:
            core = next(iter(model._soap.engines.values()))[0].core
            core.timed = True
        dist.barrier()
        watch.ns.clear()
        watch.on = step >= 3
        begin = time.perf_counter_ns()
        loss = model(*batch)
        zero_grad()
        loss.backward()
        optimizer.step()
        taken = time.perf_counter_ns() - begin
        watch.on = False
        if step >= 3:
            forward, backward, movements = core.spent_ns
            core.spent_ns = [0, 0, 0]
            ns = {"operators": forward + backward, "movements": movements, **watch.ns}
            out.append({k: v / 1e6 for k, v in [("step", taken), ("own", taken - sum(ns.values())), *ns.items()]})
    return out


def main(model_name: str, steps: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(init_string())
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    case: Case = CASES[model_name]()
    batch = tuple(t[case.rows * rank : case.rows * (rank + 1)].contiguous() for t in case.batch(case.rows * world))
    whole = {n: t.detach().clone() for n, t in case.module.state_dict().items()}
    model: Any = torch_soap.parallelize(case.module, batch, loss=case.loss, plan="* n=fed")
    parallel = model._soap
    captured = next(iter(parallel.engines.values()))[1]
    graph = to_op_graph(captured)
    found = search_plan(graph, captured, [case.rows] * world, comm=parallel.comm, simulations=SIMULATIONS)
    watch = Stopwatch()
    for name in COLLECTIVES:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, watch.around("agreement", getattr(dist.ProcessGroup, name)))
    dist.Work.wait = watch.around("agreement", dist.Work.wait)
    out = {}
    for label, text in (("found", found.text), ("data parallel", "* n=fed")):
        replan(parallel, as_plan(text, graph, world))
        model.load_state_dict(whole)
        out[label] = {"steps": time_steps(model, batch, steps, watch), "plan": text.splitlines()}
        out[label]["instructions"] = len(next(iter(parallel.engines.values()))[0].kinds)
    report({"plans": out, "parameters": len(list(model.parameters())), "modules": len(list(model.modules()))})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
