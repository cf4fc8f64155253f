"""On each rank: one model under random plans; reports the worst difference of each and what the plans used.

    torchrun --nproc-per-node=N -m tests.dist.worker_sweep MODEL SEED:DTYPE ...
"""

from __future__ import annotations

import datetime
import functools
import random
import sys
import time
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist

from tests.dist.launch import ROOT, report
from tests.dist.training import History, alone, difference, in_dtype, together
from tests.models import case
from torch_soap import _C
from torch_soap.capture import capture
from torch_soap.plan import Plan
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.testing import random_plan_of

STEPS = 3


def random_rows(total: int, world_size: int, rng: random.Random) -> list[int]:
    """At least one row each: a mean over no rows is no number."""
    cuts = sorted(rng.sample(range(1, total), world_size - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def used_by(plan: Plan, graph: Any) -> list[str]:
    """What a plan is made of: factor kinds that are cut, chunks, placements, ..."""
    out = set()
    for node in graph.nodes:
        if node.name not in plan.strategy.nodes:
            continue
        config = plan.strategy.nodes[node.name]
        kinds = {f.name: f.kind.name for f in _C.make_rule(graph, node, plan.world_size).factors}
        for factor, cut in config.cuts:
            out.add("storage" if node.kind == _C.NodeKind.param else f"{kinds.get(factor, 'sample')} factor")
            traits = {"chunks": cut.chunks > 1, "uneven cuts": bool(cut.bounds), "zigzag": cut.zigzag, "mixed radix": bool(cut.radix)}
            out |= {label for label, on in traits.items() if on}
        out |= {label for label, on in {"device lists": bool(config.devices), "replicas": config.replicas > 1}.items() if on}
    if plan.strategy.order == _C.Order.interleaved:
        out.add("1f1b")
    return sorted(out)


@functools.cache
def reference(name: str, dtype: torch.dtype, rows: tuple[int, ...] | None) -> History:
    """One process; `rows` only where the loss is outside and hangs on them."""
    example = in_dtype(case(name).example(), dtype)
    return alone(example, rows or [len(example.inputs[0])], STEPS)


def conditioning(name: str, rows: list[int], draws: int = 3) -> float:
    """How far one process in float32 moves when its weights move by one unit in the last place: a ReLU that flips is enough."""
    wanted = alone(in_dtype(case(name).example(), torch.float32), rows, STEPS)
    worst = 0.0
    for draw in range(draws):
        example = in_dtype(case(name).example(), torch.float32)
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for p in example.module.parameters():
                p.mul_(1 + torch.randint(-1, 2, p.shape, generator=generator) * 2.0**-23)
        worst = max(worst, difference(alone(example, rows, STEPS), wanted, STEPS)[0])
    return worst


def main(name: str, runs: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    example = case(name).example()
    wide = in_dtype(example, torch.float64)
    captured = capture(wide.module, wide.inputs, {}, loss=wide.loss, check=False)
    graph = to_op_graph(captured.instantiate(captured._signature_of([captured.leaves[i] for i in captured.tensor_slots])))
    results: dict[str, Any] = {}
    for run in runs:
        seed, dtype = int(run.split(":")[0]), getattr(torch, run.split(":")[1])
        start = time.perf_counter()
        rows = random_rows(len(example.inputs[0]), world, random.Random(seed))
        plan = random_plan_of(captured, world, seed, rows)
        try:
            got = together(in_dtype(example, dtype), plan.text, rows, STEPS, random.Random(1000 * seed + rank))
        except Exception:  # reported with the plan; the launcher goes on with the next run
            report({**results, run: {"failure": traceback.format_exc()[-2500:].replace(str(ROOT), "."), "plan": plan.text, "rows": rows}})
            raise
        error, where = difference(got, reference(name, dtype, tuple(rows) if example.outside is not None else None), STEPS)
        allowed = 1e-10 if dtype == torch.float64 else 1e-3
        if dtype == torch.float32 and error > allowed:
            allowed = max(allowed, 10 * conditioning(name, rows))
        results[run] = {"error": error, "allowed": allowed, "where": where, "rows": rows, "used": used_by(plan, graph), "seconds": time.perf_counter() - start}
        report(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
