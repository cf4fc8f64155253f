"""On each rank: a model under its searched plan with and without rewrites, and data parallel with a group of rewrites by hand, in turns.

torchrun --nproc-per-node=2 -m benchmarks.worker_rewrites MODEL STEPS
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import torch_soap
from tests.dist.launch import report
from torch_soap import _C, cache, calibrate
from torch_soap.operator_times import measure_operators

ROWS = 8  # of each process


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class InceptionBlock(nn.Module):
    """InceptionC of GoogLeNet's kind: four branches, three of which begin with a 1x1 convolution of the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.a, self.b, self.c = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, half // 2, 1), nn.Conv2d(channels, half // 4, 1)
        self.b2, self.c2, self.d = nn.Conv2d(half // 2, half, 3, padding=1), nn.Conv2d(half // 4, half // 2, 5, padding=2), nn.Conv2d(channels, half // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool2d(x, 3, 1, 1)
        parts = self.a(x), self.b2(F.relu(self.b(x))), self.c2(F.relu(self.c(x))), self.d(pooled)
        return torch.cat([F.relu(p) for p in parts], 1)[:, : x.shape[1]]


def gpt(width: int) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, 4) for _ in range(4))), lambda rows: torch.randn(rows, 32, width)


def inception() -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), *(InceptionBlock(32) for _ in range(3))), lambda rows: torch.randn(rows, 3, 31, 31)


MODELS = {"gpt, width 32": lambda: gpt(32), "gpt, width 256": lambda: gpt(256), "inception blocks": inception}
GROUPS = {"gpt, width 32": ["fuse_linears"], "gpt, width 256": ["fuse_linears"], "inception blocks": ["fuse_convolutions", "unary_after_cat"]}


def main(name: str, steps: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    models, cost = {}, None
    for label in ("data parallel", *(f"data parallel, {g}" for g in GROUPS[name]), "searched without rewrites", "searched"):
        module, batch = MODELS[name]()
        x = batch(ROWS)
        plan = None
        if label.startswith("data parallel"):
            torch.manual_seed(1)
            graph = torch_soap.planner.graph_for(module, batch(ROWS * world), None, world)[0]
            group = [r for r in _C.find_rewrites(graph) if label.endswith(r.substitution)]
            plan = "\n".join([*(f"rewrite {r}" for r in _C.fitting(graph, group)), "* n=fed"])
        model = torch_soap.parallelize(module, x, plan=plan, rewrites=label == "searched")
        if plan is None and rank == 0:
            cost = model.plan.cost
        models[label] = (model, torch.optim.SGD(model.parameters(), lr=1e-3), x)
    costs = [cost]
    predicted = {}
    known = cache.load(world, next(iter(models.values()))[0]._soap.comm, [0] * world)
    for label, (model, _, _) in models.items():  # what the plans by hand need is measured too, on all ranks
        engine, graph = next(iter(model._soap.engines.values()))
        own = costs[0] or _C.CostModel(_C.Machine(world))
        measure_operators(own, engine.program, graph, model._soap.comm, known)
        predicted[label] = _C.simulate(engine.program, own).step_ns / 1e6
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for _ in range(steps):
        for label, (model, optimizer, x) in models.items():
            calibrate.barrier(model._soap.comm)
            begin = time.perf_counter()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            seconds[label].append(time.perf_counter() - begin)
    used = {label: [str(r) for r in model.plan.strategy.rewrites] for label, (model, _, _) in models.items()}
    report({label: {"measured_ms": [1e3 * s for s in seconds[label]], "predicted_ms": predicted[label], "rewrites": used[label]} for label in models})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
