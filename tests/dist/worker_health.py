"""On each rank: health under right and wrong figures, recalibration in the middle of a training, and a trial of plans."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torch_soap
from tests.dist.launch import report
from torch_soap import _C, cache, calibrate
from torch_soap.compare import Context
from torch_soap.health import Health
from torch_soap.plan import as_plan
from torch_soap.planner import measure
from torch_soap.runtime.replan import replan

ROWS, WIDTH = 192, 512


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())], nn.Linear(WIDTH, 8))


def draws() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 8))


def train(model: Any, optimizer: torch.optim.Optimizer, batch: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def with_wrong_figures(program: _C.Program, cost: _C.CostModel, right: Health, family: str, faster: float, links_slower: float) -> _C.CostModel:
    """The cost model as this very run measured it (on a busy machine the calibration is off by itself), but for one family's operators, predicted `faster`
    times as fast, and movements, `links_slower` times as slow."""
    ratios = {r.name: r.ratio for r in right.rows}
    machine = _C.Machine(cost.machine)
    (link,) = right.links
    machine.tables = {k: [(size, int(ns * link.ratio * links_slower)) for size, ns in t] for k, t in machine.tables.items()}
    machine.cold_ns *= link.ratio * links_slower
    wrong = _C.CostModel(machine)
    for s in wrong.missing(program):
        own = _C.family_of(program.graph.nodes[s.node])
        by = ratios.get(own, 1.0) / (faster if own == family else 1.0)
        forward, backward = cost.time(program, s.node, s.tile, s.chunk)
        wrong.measure(program, s, int(forward * by), int(backward * by))
    return wrong


def healths(rank: int) -> dict[str, Any]:
    module = mlp()
    plain = copy.deepcopy(module)
    inputs, targets = torch.randn(2 * ROWS, WIDTH), torch.randint(8, (2 * ROWS,))
    mine = slice(ROWS * rank, ROWS * (rank + 1))
    batch = inputs[mine], targets[mine]
    model: Any = torch_soap.parallelize(module, batch, loss=nn.functional.cross_entropy)
    context = model.plan.context
    plan = as_plan("* n=fed", context.graph, 2)
    program = _C.lower(context.graph, plan.strategy, context.rows)
    graph = next(iter(model._soap.engines.values()))[1]
    known = cache.nothing_known()
    measure(context.cost, context.graph, graph, plan.strategy, context.rows, model._soap.comm, known)
    plan.context = Context(context.graph, context.rows, context.cost)
    replan(model._soap, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = train(model, optimizer, batch, 5)
    right = model.plan.health()
    assert model.plan.measured["health"] == right.as_data()  # for the report
    cached = cache.moments(cache.file_of(2, calibrate.placement(model._soap.comm)))
    out: dict[str, Any] = {"right": str(right), "noted": [m["error"] for m in cached if m["operators"] and "error" in m]}
    plan.context.cost = with_wrong_figures(program, context.cost, right, "matmul", 3.0, 1.0)
    out["matmul"] = [(r.name, r.ratio) for r in model.plan.health().suspects]
    plan.context.cost = with_wrong_figures(program, context.cost, right, "", 1.0, 4.0)
    wrong = model.plan.health()
    out["links"] = [(r.name, r.ratio) for r in wrong.suspects]
    out["rows"] = [r.name for r in wrong.rows]
    model.plan.monitor().search = lambda *_: as_plan("* n=fed store=shard", context.graph, 2)  # whatever it would find: another plan
    wrong.recalibrate(optimizer)
    out["after"] = model.plan.text
    losses += train(model, optimizer, batch, 3)
    reference = train(lambda x, y: nn.functional.cross_entropy(plain(x), y), torch.optim.AdamW(plain.parameters(), lr=1e-3), (inputs, targets), 8)
    out["losses"], out["reference"] = losses, reference
    return out


def trials(rank: int) -> dict[str, Any]:
    mine = slice(16 * rank, 16 * (rank + 1))
    torch.manual_seed(1)
    batch = torch.randn(32, 64)[mine], torch.randint(8, (32,))[mine]
    states: list[Any] = []
    out: dict[str, Any] = {}
    for plan, steps in ((None, 2), ("same", None)):
        model: Any = draws()
        torch.manual_seed(5)
        model = torch_soap.parallelize(model, batch, loss=nn.functional.cross_entropy, plan=out.get("plan") if plan else None, trial_steps=steps)
        if plan is None:
            out = {"plan": model.plan.text, "trial": model.plan.stats["trial"]}
        losses = train(model, torch.optim.SGD(model.parameters(), lr=0.1), batch, 3)
        states.append((losses, model.state_dict(), torch.get_rng_state()))
    (losses, state, drawn), (losses_alike, state_alike, drawn_alike) = states
    out["equal"] = losses == losses_alike and all(torch.equal(state[n], state_alike[n]) for n in state) and torch.equal(drawn, drawn_alike)
    return out


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    report({"health": healths(rank), "trial": trials(rank)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
