"""On each rank: training loops under plans with and without regions that are computed again; reports the largest difference, which is 0."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import torch_soap
from tests.dist.worker_user import difference, own, run

Loop = Callable[[nn.Module], None]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.norm(self.stem(x))))


PLANS = ["* n=fed", "* n=fed store=shard keep=use", "*.up o=2\n*.down i=2\n* replicas=2"]
REGIONS = "recompute stem+norm blocks.*\n"


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return own(torch.randn(8, 6, generator=g)), own(torch.randn(8, 4, generator=g))


def compared(loop: Loop, plans: list[str]) -> float:
    worst = 0.0
    for plan in plans:
        states = []
        for text in (plan, REGIONS + plan):
            torch.manual_seed(5)
            model = torch_soap.parallelize(Net(), plan=text)
            loop(model)
            states.append(dict(model.state_dict()))
        worst = max(worst, difference(*states))
    return worst


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return ((model(x) - y) ** 2).mean()


def steps() -> float:
    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    return compared(loop, PLANS[1:])


def accumulation() -> float:
    """Under no_sync and without it; two forwards before their backwards, in the other order."""

    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            with model.no_sync():
                loss_of(model, 4 * step).backward()
            loss_of(model, 4 * step + 1).backward()
            first, second = loss_of(model, 4 * step + 2), loss_of(model, 4 * step + 3)
            second.backward()
            first.backward()
            optimizer.step()

    return compared(loop, PLANS[:1])


def retained() -> float:
    def loop(model: nn.Module) -> None:
        loss = loss_of(model, 0)
        loss.backward(retain_graph=True)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    return compared(loop, PLANS[1:2])


def evaluated() -> float:
    """Evaluation between steps, and autocast around forward alone."""

    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                loss_of(model, step)
            model.train()

    return compared(loop, PLANS[:1])


CHECKS: dict[str, Callable[[], float]] = {f.__name__: f for f in (steps, accumulation, retained, evaluated)}


if __name__ == "__main__":
    run(CHECKS, sys.argv[1:])
