"""Random graphs full of siblings, parts and concatenations, random rewrites of them, random plans of what is left: exact in float64."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_soap import _C, testing
from torch_soap.capture import capture
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.verify import verify_captured

NUM_CASES = 16
UNARY: list[Callable[[torch.Tensor], torch.Tensor]] = [torch.tanh, torch.sigmoid, torch.sin, lambda x: x * 0.5]


class Tangle(nn.Module):
    """A few layers, each drawn: siblings with or without biases, of equal or other widths, convolutions, parts, concatenations, permutations."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.layers = nn.ModuleList()
        self.kinds = []
        self.rng_seed = seed
        for _ in range(rng.randint(2, 3)):
            kind = rng.choice(["linears", "convolutions", "parts", "cats", "permutes", "shared"])
            self.kinds.append(kind)
            if kind == "linears":
                bias = rng.random() < 0.7
                sizes = rng.choice([[4, 4], [2, 4, 2], [3, 5], [2, 2, 2, 2]])
                self.layers.append(nn.ModuleList(nn.Linear(width, n, bias=bias) for n in sizes))
            elif kind == "convolutions":
                padding, kernel = rng.choice([(0, 1), (1, 3)])
                self.layers.append(
                    nn.ModuleList(nn.Conv1d(6, n, kernel, padding=padding, bias=rng.random() < 0.5) for n in rng.choice([[3, 3], [2, 4], [1, 2, 3]]))
                )
            elif kind == "shared":
                self.layers.append(nn.Linear(width, width))
            else:
                self.layers.append(nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [n, 6, width]
        rng = random.Random(self.rng_seed)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            act = UNARY[rng.randrange(len(UNARY))]
            if kind == "linears":
                parts = [linear(x) for linear in layer]
                x = torch.cat([act(p) for p in parts] if rng.random() < 0.5 else [parts[0].tanh(), *parts[1:]], -1)
            elif kind == "convolutions":
                x = act(torch.cat([conv(x) for conv in layer], 1))
            elif kind == "parts":
                sizes = rng.choice([[4, 4], [2, 6], [1, 3, 4]])
                parts = list(x.split(sizes, -1))
                x = torch.cat([p.tanh() if i == 0 and rng.random() < 0.5 else p for i, p in enumerate(parts)], -1)
            elif kind == "cats":
                x = torch.cat([x, torch.cat([x.sin(), act(x)], -1)], -1)[..., 8:16] + x
            elif kind == "permutes":
                x = act(act(x.transpose(1, 2)).transpose(1, 2).contiguous().transpose(0, 1)).transpose(0, 1)
            else:
                x = layer(x.sin()) + F.linear(x, layer.weight, layer.bias).tanh()
        return x


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_random_rewrites(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        captured = capture(Tangle(seed).double(), (torch.randn(4, 6, 8, dtype=torch.float64),), {})
        world = 1 + seed % 4
        plan = testing.random_plan_of(captured, world, seed, rewrites=4)
        assert plan.strategy.rewrites, "nothing to rewrite: the draw is too poor"
        graph = to_op_graph(captured.instantiate(captured._signature_of(captured.inputs)))
        assert _C.parse_plan(graph, plan.text, world).rewrites == plan.strategy.rewrites
        report = verify_captured(captured, plan, steps=2, dtype=torch.float64)
        assert report.ok, f"{plan}\n{report}"
