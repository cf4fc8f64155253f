"""On each rank: modules whose parameters are made, written or looked up in other ways than by a plain layer, each against one process."""

from __future__ import annotations

import copy
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import torch_soap
from tests.dist.launch import report
from tests.dist.worker_user import batch, difference, own, run, train, whole
from tests.property.cases_modules import LowRank

IDS = torch.tensor([[1, 2, 3], [3, 4, 0], [9, 9, 1], [5, 0, 7]])


def parametrized() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(8, 5)), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(5, 4)),
    )  # fmt: skip
    model[4].weight.requires_grad_(False)
    parametrize.register_parametrization(model[4], "weight", LowRank(5, 5))
    return model.double()


def parametrized_parts() -> float:
    """Parts stored of originals; state_dict there and back, and on in training."""
    plan = "0 n=fed store=shard\n2 n=fed store=shard\n4 n=fed store=shard\n* n=fed"
    reference, model = parametrized(), torch_soap.parallelize(parametrized(), plan=plan)
    for m, cut in ((reference, whole), (model, own)):
        train(m, torch.optim.AdamW(m.parameters(), lr=0.01), cut)
    worst = difference(dict(model.state_dict()), dict(reference.state_dict()))
    again = torch_soap.parallelize(parametrized(), plan="0 o=2\n* n=fed")
    again(own(batch()[0]))
    again.load_state_dict(model.state_dict())
    plain = parametrized()
    plain.load_state_dict(copy.deepcopy(again.state_dict()))
    for m, cut in ((plain, whole), (again, own)):
        train(m, torch.optim.AdamW(m.parameters(), lr=0.01), cut)
    return max(worst, difference(dict(again.state_dict()), dict(plain.state_dict())))


class Tables(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(10, 4, **options), nn.Linear(4, 3)
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


def step_tables(plan: str, **options: Any) -> float:
    reference, model = Tables(**options), torch_soap.parallelize(Tables(**options), plan=plan)
    for m, cut in ((reference, whole), (model, own)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            m(cut(IDS)).square().mean().backward()
            optimizer.step()
    return difference(dict(model.state_dict()), dict(reference.state_dict()))


def tables() -> float:
    worst = 0.0
    for plan in ("* n=fed", "{} v=2 store=v\n* n=fed", "{} d=2 store=d\n* n=fed"):
        worst = max(worst, step_tables(plan.format("table"), sparse=True, padding_idx=9), step_tables(plan.format("table/embedding"), max_norm=0.7))
    return worst


def sparse_adam() -> float:
    model = torch_soap.parallelize(Tables(sparse=True), plan="* n=fed")
    model(own(IDS)).sum().backward()
    try:
        torch.optim.SparseAdam([model.table.weight], lr=0.1).step()
    except RuntimeError as error:
        assert "SparseAdam" in str(error) and "use Adam" in str(error), error
        return 0.0
    raise AssertionError("SparseAdam was not refused")


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.bags = nn.EmbeddingBag(10, 4).double()

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.bags(ids, offsets)


def ragged_bags() -> float:
    """Each process' offsets count its own indices: refused, with the way out."""
    model = torch_soap.parallelize(Bags(), plan="* n=fed")
    try:
        model(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2]))
    except ValueError as error:
        assert "2-D" in str(error), error
        return 0.0
    raise AssertionError("offsets were taken as they came")


def bfloat16() -> float:
    """Gradients by gloo, scattered to parts."""
    model = torch_soap.parallelize(nn.Sequential(nn.Linear(1, 4, bias=False)).bfloat16(), plan="0 n=fed store=shard")
    model(torch.tensor([[256.0]] if dist.get_rank() == 0 else [[1.0]] * 3, dtype=torch.bfloat16)).sum().mul(2).backward()
    grad = next(model.parameters()).grad
    return float((grad - 260).abs().amax()) if grad.numel() else 0.0


class Positions(nn.Module):
    """The first forward gives its table another shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear = nn.Linear(6, 4).double()
        self.register_buffer("table", torch.zeros(1).double(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)
        return self.linear(x + self.table)


def shaped_buffers() -> float:
    x, _ = batch()
    reference, model = Positions(), torch_soap.parallelize(Positions(), plan="* n=fed")
    worst = 0.0
    for _ in range(2):
        worst = max(worst, float((model(own(x)) - own(reference(x))).detach().abs().amax()))
    return worst if torch.equal(model.table, reference.table) else float("inf")


class Drawing(nn.Module):
    """Opaque, and of a number from Python's generator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + random.random()


def drawing_modules() -> float:
    """Two modules that draw get different numbers in one forward, all ranks the same, and others in the next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not those of one process
        model = torch_soap.parallelize(nn.Sequential(nn.Linear(6, 6), Drawing(), nn.Identity(), Drawing()), plan="* n=2")
        zero = torch.zeros(2, 6)
        seen = []
        for _ in range(2):
            y = model(zero)
            seen.append(float((y - model[0].bias).mean().detach()))
        first = torch_soap.parallelize(nn.Sequential(nn.Linear(6, 6), Drawing()), plan="* n=2")
        one = float((first(zero) - first[0].bias).mean().detach())
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, seen)
    assert all(g == gathered[0] for g in gathered), gathered
    assert abs(seen[0] - seen[1]) > 1e-6 and abs(seen[0] - 2 * one) > 1e-6, (seen, one)
    return 0.0


class Siblings(nn.Module):
    """Three products of one input, and parts of a tensor; dropout makes another graph of eval."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.q, self.k, self.v, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.0)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.drop(torch.softmax(self.q(x) * self.k(x), 1) * self.v(x)).split([2, 6], 1)
        return self.head(torch.cat([torch.tanh(a), torch.tanh(b)], 1))


SIBLINGS = """
rewrite fuse_linears q k v
rewrite unary_after_cat /cat
q/joined o=2:3.8.1
q/weight d0=2:3.8.1
q/bias   d0=2:3.8.1
head     i=2 store=i
*        n=fed
"""


def rewritten_graphs() -> float:
    """A plan with rewrites from its file: training, eval, and its state_dict in the plain module. Parameters are the module's own."""
    worst = 0.0
    for text in (SIBLINGS, "rewrite fuse_linears q k v\nparam:k.weight d0=2 keep=use\n* n=fed"):
        reference, module = Siblings(), Siblings()
        named = {n: id(p) for n, p in module.named_parameters()}
        model = torch_soap.parallelize(module, plan=text)
        for m, cut in ((reference, whole), (model, own)):
            train(m, torch.optim.AdamW(m.parameters(), lr=0.01), cut)
        assert {n: id(p) for n, p in model.named_parameters()} == named
        assert model.plan.text.startswith("rewrite fuse_linears q k v"), model.plan.text
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
        x, _ = batch()
        reference.eval(), model.eval()
        worst = max(worst, float((model(own(x)) - own(reference(x))).detach().abs().amax()))
    return worst


CHECKS: dict[str, Callable[[], float]] = {
    f.__name__: f for f in (parametrized_parts, tables, sparse_adam, ragged_bags, bfloat16, shaped_buffers, drawing_modules, rewritten_graphs)
}

if __name__ == "__main__":
    run(CHECKS, sys.argv[1:])
