"""On each rank: what movements give among ranks that share memory, against the same movements packed and exchanged; the differences. And whether autograd
copies the gradients that a backward gives it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torch_soap
from tests.dist.launch import report
from tests.unit.planning import graph_of, lowered, node
from torch_soap import _C
from torch_soap.rewrite.segment import DTYPES
from torch_soap.runtime import parallel
from torch_soap.runtime.comm import TorchComm
from torch_soap.runtime.movement import PlannedStep, compiled, execute, plan_step

BEFORE, AFTER = ("n", "o", "i", "replicas"), ("d0", "d1", "replicas", "")
SHAPES = ([7, 5], [64, 48], [601, 403], [12, 33, 50])  # without rows, with short ones, more than a slot holds, of three dims


def fills(before: str, after: str, shape: list[int], comm: TorchComm) -> list[tuple[PlannedStep, torch.Tensor]]:
    """Of what a linear layer, cut in one way, gives to a ReLU that is cut in another."""
    world = comm.world_size
    model = nn.Sequential(nn.Linear(4, shape[-1], bias=False), nn.ReLU())
    rows = [shape[0] // world + (r < shape[0] % world) for r in range(world)]
    plan = f"0 {before}={world}\n" + (f"1 {after}={world}" if after else "")
    program = lowered(graph_of(model, torch.zeros(*shape[:-1], 4)), plan, rows)
    rank_program = _C.project(program, comm.rank)
    made = node(program.graph, "0").outputs[0]
    out = []
    for i in rank_program.instructions:
        if i.kind == _C.InstructionKind.fill and any(program.groups[t.item.id].tensor == made for t in i.transfers):
            step = plan_step(program, rank_program, i, DTYPES)
            source = next((m.src for t in step.transfers for m in t.moves if m.src >= 0), None)
            out.append((step, torch.randn(list(rank_program.values[source].shape)) if source is not None else torch.empty(0)))
    return out


def copied_gradients() -> list[str]:
    """Parameters whose `.grad` isn't what the backward made."""
    made: dict[str, int] = {}
    original = parallel.input_gradients

    def noting(ctx: Any, *others: Any) -> Any:
        grads = original(ctx, *others)
        made.update({name: g.data_ptr() for name, g in zip(ctx.calling.inputs, grads, strict=True) if g is not None})
        return grads

    parallel.input_gradients = noting
    model = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 7))
    torch_soap.parallelize(model, plan="2 o=[0,3,7]\n* n=fed")
    model(torch.randn(4, 30)).sum().backward()
    parallel.input_gradients = original
    return [name for name, p in model.named_parameters() if p.grad is None or made[f"param:{name}"] != p.grad.data_ptr()]


def main() -> None:
    dist.init_process_group("soap")
    comm = TorchComm()
    torch.manual_seed(comm.rank)
    shared, wrong, taken = comm.shared, [], 0
    for before, after, shape in itertools.product(BEFORE, AFTER, SHAPES):
        steps = fills(before, after, shape, comm)
        comm.join({tuple(g) for step, _ in steps for g in (step.ranks, *(t.ranks for t in step.transfers if t.all_reduce)) if g})
        for step, local in steps:
            first = dict(execute(step, comm, lambda value, dtype, t=local: t))  # type: ignore[misc]
            taken += compiled(step, comm) is not None and bool(step.ranks)
            comm.shared = lambda ranks: None  # type: ignore[method-assign]
            second = dict(execute(step, comm, lambda value, dtype, t=local: t))  # type: ignore[misc]
            comm.shared = shared  # type: ignore[method-assign]
            if first.keys() != second.keys() or any(not torch.equal(first[v], second[v]) or first[v].stride() != second[v].stride() for v in first):
                wrong.append(f"{before} -> {after} of {shape}")
    report({"wrong": wrong, "taken": taken, "copied": copied_gradients() if comm.world_size == 2 else []})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
