"""bfloat16 and autocast: sums over ranks, chunks and split statistics have float32's digits; regions hold for tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.property.cases import Fn, build
from torch_soap.testing import random_plan
from torch_soap.verify import verify


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def linear(weight: list[list[float]]) -> nn.Module:
    made = nn.Linear(len(weight[0]), len(weight), bias=False)
    made.weight = nn.Parameter(torch.tensor(weight))
    return nn.Sequential(made, nn.ReLU())


@pytest.mark.parametrize("more", ["", "\n1 d0=2 @ [0,1]"])  # an all-reduce; an exchange
def test_partial_values_are_added_in_float32(more: str) -> None:
    """256 + 1 is 256 in bfloat16, 256 + 7 isn't."""
    report = verify(linear([[256.0] + [1.0] * 7]), torch.ones(2, 8), "0 i=8" + more, dtype=torch.bfloat16, world_size=8, steps=1)
    assert report.worst is not None and report.worst.error == 0, report


@pytest.mark.parametrize("plan", ["* n=fed", "0 n=8 store=shard", "0 n=1x8t @ [0]"])
def test_gradients_are_added_in_float32(plan: str) -> None:
    """Over ranks (all-reduce, scatter) and over chunks."""
    x = torch.tensor([[256.0]] + [[1.0]] * 7)
    report = verify(linear([[1.0]] * 8), x, plan, loss=lambda y: y.sum(), dtype=torch.bfloat16, world_size=8, steps=1)
    assert report.worst is not None and report.worst.error == 0, report


def test_a_mean_of_float16_beyond_its_range() -> None:
    module = Fn(lambda m, x: (x * m.scale).mean(1), scale=nn.Parameter(torch.full((1,), 300.0)))
    report = verify(module, torch.full((2, 512), 1.0), "* n=fed", dtype=torch.float16, world_size=2, steps=1)
    assert report.ok, report


def in_autocast(m: Any, ids: torch.Tensor) -> Any:
    x = m.table(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = m.qkv(m.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        z = torch.softmax(m.up(a) @ (m.down + m.up.weight), -1)
        return m.conv(z), a, torch.addmm(m.up.bias, a[:, 0], m.up.weight.t())


@pytest.mark.parametrize("seed", range(6))
def test_autocast_regions(seed: int) -> None:
    members = {"table": nn.Embedding(7, 8), "norm": nn.LayerNorm(8), "qkv": nn.Linear(8, 24), "up": nn.Linear(8, 16), "conv": nn.Conv1d(4, 4, 3, padding=1)}
    module, ids = Fn(in_autocast, **members, down=nn.Parameter(torch.randn(16, 8))), torch.randint(7, (6, 4))
    report = verify(module, ids, random_plan(module, ids, 3, seed), dtype=torch.float32, steps=1)
    assert report.ok, report


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name", ["mlp_loss", "causal", "conv1d", "cross_entropy_smooth", "cross_entropy", "norms", "softmaxes", "lstm", "gru", "embedding_bags", "tied"]
)
def test_bfloat16(name: str, seed: int) -> None:
    built = build(name)
    module, inputs = built.module.bfloat16(), tuple(x.bfloat16() if x.is_floating_point() else x for x in built.inputs)
    report = verify(module, inputs, random_plan(module, inputs, 3, seed, loss=built.loss), loss=built.loss, dtype=torch.bfloat16, steps=1)
    assert report.ok, report
