"""The same training in one process and over all ranks, and the largest difference between them."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import torch_soap
from tests.models import Example

SEED = 1234
LEARNING_RATE = 0.05


@dataclass
class History:
    losses: list[float] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def rows_of(total: int, world_size: int) -> list[int]:
    return [total // world_size + (r < total % world_size) for r in range(world_size)]


def part(inputs: Sequence[Any], rows: Sequence[int], rank: int) -> tuple[Any, ...]:
    begin = sum(rows[:rank])
    return tuple(t[begin : begin + rows[rank]] for t in inputs)


def in_dtype(example: Example, dtype: torch.dtype) -> Example:
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in example.inputs)
    return Example(copy.deepcopy(example.module).to(dtype), inputs, example.loss, example.outside)


def alone(example: Example, rows: Sequence[int], steps: int) -> History:
    """One process, the whole batch; a loss outside is the mean over the feeding processes."""
    history = History()
    model = example.module
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    split = len(example.inputs) - (1 if example.loss is not None else 0)
    with torch_soap.counter_rng(model, seed=SEED):
        for _ in range(steps):
            optimizer.zero_grad()
            output = model(*example.inputs[:split])
            if example.loss is not None:
                loss = example.loss(output, *example.inputs[split:])
            elif example.outside is not None:
                shares = [example.outside(o, *part(example.inputs, rows, r)) for r, o in enumerate(output.split(list(rows)))]
                loss = torch.stack(shares).mean()
            else:
                loss = output
            loss.backward()
            optimizer.step()
            history.losses.append(float(loss.detach()))
    history.state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return history


def together(example: Example, plan: Any, rows: Sequence[int], steps: int, delays: random.Random | None = None) -> History:
    """This rank's part of the same training through `parallelize`."""
    history = History()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED)
    model = torch_soap.parallelize(example.module, loss=example.loss, plan=plan)
    if delays is not None:
        inject_delays(model._soap.comm, delays)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    mine = part(example.inputs, rows, rank)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(*mine)
        loss = output if example.outside is None else example.outside(output, *mine)
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if example.outside is not None:
            dist.all_reduce(total)
            total /= world
        history.losses.append(float(total))
    history.state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return history


def inject_delays(comm: Any, delays: random.Random) -> None:
    """Before each collective one rank, drawn alike on all, sleeps up to 2 ms: order must not depend on who comes first."""

    def late(call: Callable[..., Any]) -> Callable[..., Any]:
        def wait_then_call(*args: Any) -> Any:
            if delays.random() < 0.3:
                time.sleep(delays.random() * 2e-3)
            return call(*args)

        return wait_then_call

    comm.all_reduce, comm.exchange, comm.shared = late(comm.all_reduce), late(comm.exchange), late(comm.shared)


def difference(got: History, wanted: History, steps: int) -> tuple[float, str]:
    """Largest error by name, as docs/exactness.md measures it: parameters against lr * steps, others against the largest of their kind.

    In float32 one ReLU that rounding flips moves a weight's gradient by percents, in one process with permuted rows too: there the
    losses are compared, and the model's state as one vector (relative L2).
    """
    worst = (0.0, "")
    for i, (a, b) in enumerate(zip(got.losses, wanted.losses, strict=True)):
        worst = max(worst, (abs(a - b) / max(abs(b), 1e-3), f"loss of step {i}"))
    if got.state.keys() != wanted.state.keys():
        return float("inf"), f"state_dict keys {sorted(got.state.keys() ^ wanted.state.keys())}"
    squares = [0.0, 0.0]
    for name, b in wanted.state.items():
        a = got.state[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf"), f"{name} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}"
        if b.numel() == 0:
            continue
        single = b.dtype == torch.float32
        a, b = a.double(), b.double()
        if single:
            squares = [squares[0] + float((a - b).square().sum()), squares[1] + float(b.square().sum())]
            continue
        error = float((a - b).abs().max()) / max(float(b.abs().max()), LEARNING_RATE * steps)
        worst = max(worst, (error if error == error else float("inf"), name))
    error = math.sqrt(squares[0] / max(squares[1], 1e-30))
    worst = max(worst, (error if error == error else float("inf"), "the state as one vector"))
    return worst
