"""Models whose tensors at segments' borders and whose parameters are larger than 256 KiB and than 1 MiB in float64: what is done otherwise with large
tensors (memory that is given back, messages in several parts, gradients that don't wait) is done with these, and with none of the small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT, next_byte_loss
from tests.models import Example
from torch_soap import _C
from torch_soap.manual import manual_plan
from torch_soap.testing import random_plan

KIB = 1 << 10
DEVICES = 2


class Readers(nn.Module):
    """One activation is read by several layers, by a sum and by a part of it."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.up, self.a, self.b, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(hidden, width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(x))
        return self.head(self.a(y) * torch.tanh(self.b(y)) + y[:, : x.shape[1]] + x)


def mlp() -> Example:
    return Example(Readers(width=192, hidden=768, classes=192), (torch.randn(432, 192), torch.randint(192, (432,))), F.cross_entropy)


def gpt() -> Example:
    model = GPT(vocabulary=320, layers=1, hidden=192, heads=4, context=64, tied=True)
    return Example(model, (torch.randint(320, (8, 58)), torch.randint(320, (8, 58))), next_byte_loss)


MODELS: dict[str, Callable[[], Example]] = {"mlp": mlp, "gpt": gpt}


@dataclass(frozen=True)
class LargeCase:
    model: str
    plan: str  # "ddp", "megatron", "zero-3" or "random SEED"

    def example(self) -> Example:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[self.model]()

    def text(self, example: Example) -> str:
        """The plan's text."""
        if self.plan == "ddp":
            return "* n=fed"
        if self.plan == "zero-3":
            return "* n=fed store=shard keep=use"
        if self.plan == "megatron":
            return manual_plan(example.module, example.inputs, machine=_C.Machine(DEVICES), loss=example.loss, tp=DEVICES).text
        return random_plan(example.module, example.inputs, DEVICES, int(self.plan.removeprefix("random ")), loss=example.loss).text


CASES = [LargeCase(model, plan) for model in MODELS for plan in ("ddp", "megatron", "zero-3", "random 0")]
IN_PROCESSES = [c for c in CASES if (c.model, c.plan) in (("mlp", "zero-3"), ("mlp", "random 0"), ("gpt", "ddp"), ("gpt", "megatron"))]


def border_bytes(program: _C.Program, rank: int) -> list[int]:
    """Of each value that leaves one of a rank's segments."""
    own = _C.project(program, rank)
    values = [own.values[v] for segment in own.segments for v in segment.outputs]
    return [torch.Size(v.shape).numel() * program.graph.tensors[v.tensor].element_bytes for v in values]
