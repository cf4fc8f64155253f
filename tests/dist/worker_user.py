"""On each rank: what users do to a model, each against one process; reports the largest difference or the error of each check."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import torch_soap
from tests.dist.launch import report

CUT = "0 o=2 store=o\n2 i=2 store=i\n* n=fed"
SHARD = "0 n=fed store=shard keep=use\n2 n=fed store=shard keep=use\n* n=fed"
STEPS = 3


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 6, generator=g, dtype=torch.float64), torch.randn(rows, 4, generator=g, dtype=torch.float64)


def own(t: torch.Tensor, rows: list[int] | None = None) -> torch.Tensor:
    """This process' rows; even halves by default."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = rows or [t.shape[0] // world] * world
    return t[sum(rows[:rank]) : sum(rows[: rank + 1])]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert list(a) == list(b), (list(a), list(b))
    for name in a:
        assert a[name].shape == b[name].shape, (name, a[name].shape, b[name].shape)
    errors = [float((a[n] - b[n]).abs().max()) if a[n].numel() else 0.0 for n in a]
    return float("inf") if any(e != e for e in errors) else max(errors)  # max(0.0, nan) is 0.0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    cut: Callable[[torch.Tensor], torch.Tensor],
    steps: int = STEPS,
    clip: float | None = None,
    norm: float = 2.0,
) -> None:
    x, y = batch()
    for _ in range(steps):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((model(cut(x)) - cut(y)) ** 2).mean()
            loss.backward()
            return loss

        closure()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip, norm)
        optimizer.step()


def whole(t: torch.Tensor) -> torch.Tensor:
    return t


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def optimizers() -> float:
    worst = 0.0
    for make in OPTIMIZERS.values():
        reference = mlp()
        train(reference, make(reference.parameters()), whole)
        for plan in (CUT, SHARD):
            model = mlp()
            before = [id(p) for p in model.parameters()]
            model = torch_soap.parallelize(model, plan=plan)
            optimizer = make(model.parameters())  # before the first forward: planning is lazy
            train(model, optimizer, own)
            assert before == [id(p) for p in model.parameters()], "other Parameter objects"
            assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
            worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    return worst


def clipping() -> float:
    worst = 0.0
    for norm in (2.0, float("inf")):
        reference, model = mlp(), torch_soap.parallelize(mlp(), plan=CUT)
        train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), whole, clip=0.01, norm=norm)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), own, clip=0.01, norm=norm)
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
        a, b = torch_soap.grad_norm(model), torch_soap.grad_norm(reference)
        worst = max(worst, float((a - b).abs()))
    return worst


def scaling() -> float:
    """GradScaler: an overflow in one rank's part skips the step on all; the scale falls alike."""
    reference, model = mlp(), torch_soap.parallelize(mlp(), plan=CUT)
    for m, cut in ((reference, whole), (model, own)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        x, y = batch()
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(((m(cut(x)) - cut(y)) ** 2).mean()).backward()
            if step == 1 and (m is reference or dist.get_rank() == 1):
                m[0].weight.grad[-1, 0] = float("inf")  # the last row is rank 1's
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512.0, scaler.get_scale()
    return difference(dict(model.state_dict()), dict(reference.state_dict()))


def checkpoints() -> float:
    reference = mlp()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    train(reference, optimizer, whole)
    saved, saved_optimizer = copy.deepcopy(reference.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(reference, optimizer, whole)
    # A plain checkpoint into a plan, before and after its first forward; one plan's checkpoint into another and into the plain module.
    worst = 0.0
    first: dict[str, Any] = {}
    for plan in (CUT, SHARD):
        model = torch_soap.parallelize(mlp(), plan=plan)
        mine = torch.optim.AdamW(model.parameters(), lr=0.01)
        train(model, mine, own, steps=1)
        model.load_state_dict(first.get("model", saved))
        mine.load_state_dict(first.get("optimizer", saved_optimizer))
        if not first:
            first = {"model": copy.deepcopy(model.state_dict()), "optimizer": copy.deepcopy(mine.state_dict())}
            worst = max(worst, difference(dict(first["model"]), dict(saved)))
        train(model, mine, own)
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    early = torch_soap.parallelize(mlp(), plan=CUT)
    early.load_state_dict(saved)
    early(own(batch()[0]))
    plain = mlp()
    plain.load_state_dict(early.state_dict())
    return max(worst, difference(dict(plain.state_dict()), dict(saved)))


class Special(nn.Module):
    """Tied, frozen and unused parameters, several outputs, a dict in, a dataclass out, keywords, integers."""

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        hidden: torch.Tensor
        scale: float

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.aside = nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.body.bias.requires_grad_(False)
        self.double()

    def forward(self, batch: dict[str, torch.Tensor], *, twice: bool = False) -> dict[str, Any]:
        h = torch.tanh(self.body(self.embed(batch["ids"]) * batch["weight"].unsqueeze(-1)))
        return {"out": (self.head(h) * (2 if twice else 1), self.aside(h)), "scale": 0.5}


def special() -> float:
    ids = torch.arange(24).reshape(6, 4) % 11
    weight = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference, model = Special(), torch_soap.parallelize(Special(), plan="embed v=2 store=v\nbody o=2 store=o\n* n=fed")
    worst = 0.0
    for m, cut in ((reference, whole), (model, own)):
        out = m({"ids": cut(ids), "weight": cut(weight)}, twice=True)
        assert out["scale"] == 0.5
        out["out"][0].square().mean().backward()
    assert model.embed.weight is model.head.weight
    assert model.unused.weight.grad is None and model.body.bias.grad is None
    assert reference.aside.weight.grad is None and model.aside.weight.grad is None
    with torch.no_grad():
        for m in (reference, model):
            for p in m.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    return worst


def modes() -> float:
    """eval and train, another batch size, uneven rows and none, no_grad."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()
    reference, model = copy.deepcopy(net), torch_soap.parallelize(copy.deepcopy(net), plan="0 o=2\n* n=fed")
    worst = 0.0
    for rows in ([3, 3], [4, 1], [0, 5], [2, 2]):
        x, y = batch(sum(rows))
        weights = torch.cat([torch.full((n,), 1 / (2 * max(n, 1)), dtype=torch.float64) for n in rows])
        reference.train()
        model.train()
        (((reference(x) - y) ** 2).mean(1) * weights).sum().backward()
        mine = ((model(own(x, rows)) - own(y, rows)) ** 2).mean(1)
        (mine.mean() if mine.numel() else mine.sum()).backward()
        reference.eval()
        model.eval()
        with torch.no_grad():
            apart = (model(own(x, rows)) - own(reference(x), rows)).abs()
            worst = max(worst, float(apart.amax()) if apart.numel() else 0.0)
            for m in (reference, model):
                for p in m.parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
    return max(worst, difference({k: v.double() for k, v in model.state_dict().items()}, {k: v.double() for k, v in reference.state_dict().items()}))


def seeds() -> float:
    """One rank alone seeds torch anew after the first forward: all still draw what rank 0 draws."""
    torch.manual_seed(6)
    net, (x, _) = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)).double(), batch()
    drawn = []
    for seeded in (False, True):
        torch.manual_seed(6)
        model = torch_soap.parallelize(copy.deepcopy(net), plan="* n=fed")
        model(own(x))
        if seeded and dist.get_rank() == 1:
            torch.manual_seed(11)
        drawn.append(model(own(x)))
    return float((drawn[1] - drawn[0]).abs().max())


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear = nn.Linear(4, 2).double()

    def forward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return self.linear(torch.stack(tensors).sum(0))


def many_inputs() -> float:
    """More sizes than the header holds."""
    tensors = [torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(60)]
    model = torch_soap.parallelize(Many(), plan="* n=fed")
    return float((model([own(t) for t in tensors]) - own(Many()(tensors))).abs().amax().detach())


def saving() -> float:
    """torch_soap.save under one plan; load under another and into the plain module, optimizers included."""
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    path = Path(str(shared[0])) / "checkpoint"
    reference = mlp()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    train(reference, optimizer, whole)
    first = torch_soap.parallelize(mlp(), plan=CUT)
    mine = torch.optim.AdamW(first.parameters(), lr=0.01)
    train(first, mine, own)
    torch_soap.save(path, first, mine)
    train(reference, optimizer, whole)
    second, plain = torch_soap.parallelize(mlp(), plan=SHARD), mlp()
    worst = 0.0
    for model, cut in ((second, own), (plain, whole)):
        theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
        if model is second:
            train(model, theirs, cut, steps=1)
        torch_soap.load(path, model, theirs)
        train(model, theirs, cut)
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    if dist.get_rank() == 0:
        shutil.rmtree(path.parent)
    return worst


class Tempered(nn.Module):
    """Reads a plain attribute, and leaves something behind that a parallelized forward can't."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.linear, self.norm, self.temperature, self.seen = nn.Linear(6, 4), nn.BatchNorm1d(4), 1.0, torch.zeros(())
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.linear(x)) * self.temperature
        self.seen = y.detach().mean()
        return y


def attributes() -> float:
    """A changed attribute, and a submodule that alone goes to eval, are another program."""
    reference, model = Tempered(), torch_soap.parallelize(Tempered(), plan="* n=fed")
    x, _ = batch()
    worst = 0.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for temperature, norm_trains in ((1.0, True), (3.0, True), (3.0, False), (1.0, True)):
            for m, cut in ((reference, whole), (model, own)):
                m.temperature = temperature
                m.norm.train(norm_trains)
                m(cut(x)).square().sum().backward()
            worst = max(worst, float((model(own(x)) - own(reference(x))).abs().amax().detach()))
    assert any("forward changes the module's seen" in str(w.message) for w in told), [str(w.message) for w in told]
    return max(worst, difference({k: v.double() for k, v in model.state_dict().items()}, {k: v.double() for k, v in reference.state_dict().items()}))


def loss_inside() -> float:
    worst = 0.0
    x, _ = batch(8)
    target = torch.arange(8) % 4
    for plan in ("* n=fed", "0 o=2 store=o\n/ce_rows v=2\n* n=fed", "set order=1f1b\n0 n=1x4t @ [0]\n2 n=1x4t @ [0]\n4 n=1x4t @ [1]\n* n=1x4t @ [1]"):
        reference, model = mlp(), torch_soap.parallelize(mlp(), (own(x), own(target)), loss=F.cross_entropy, plan=plan)
        for _ in range(STEPS):
            a, b = F.cross_entropy(reference(x), target), model(own(x), own(target))
            worst = max(worst, float((a - b).abs().detach()))
            (a * 3).backward()
            (b * 3).backward()
            with torch.no_grad():
                for m in (reference, model):
                    for p in m.parameters():
                        p -= 0.1 * p.grad
                        p.grad = None
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    return worst


def plans() -> float:
    x, _ = batch()
    model = torch_soap.parallelize(mlp(), own(x), plan=CUT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        model.plan.save(path)
        again = torch_soap.parallelize(mlp(), own(x), plan=str(path))
    same = torch_soap.parallelize(mlp(), own(x), plan=model.plan)
    assert again.plan.text == model.plan.text == same.plan.text
    searched = torch_soap.parallelize(mlp(), own(x))
    assert "predicted step" in searched.plan.explain()
    return float((again(own(x)) - searched(own(x))).abs().amax().detach())


def refusals() -> float:
    """What can't be meant is an error in words."""
    x, _ = batch()
    model = torch_soap.parallelize(mlp(), plan=CUT)

    def refused(what: str, fn: Callable[[], Any]) -> None:
        try:
            fn()
        except (RuntimeError, ValueError, NotImplementedError):
            return
        raise AssertionError(f"{what} was not refused")

    out = model(own(x)).sum()
    refused("double backward", lambda: torch.autograd.grad(out, [next(model.parameters())], create_graph=True))
    out = model(own(x)).sum()
    out.backward()
    refused("a second backward", out.backward)
    refused("a submodule on its own", lambda: model[0](x))
    refused("parallelizing twice", lambda: torch_soap.parallelize(model))
    refused("parallelizing a part", lambda: torch_soap.parallelize(model[0]))
    refused("parallelizing around", lambda: torch_soap.parallelize(nn.Sequential(model)))
    return 0.0


def copies() -> float:
    """A deepcopy is parallelized alike, planned or not, and independent; pickled it is plain and whole."""
    x, _ = batch()
    model = torch_soap.parallelize(mlp(), plan=CUT)
    early = copy.deepcopy(model)
    model(own(x))
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    assert type(pickled) is nn.Sequential and isinstance(model, nn.Sequential)
    for a, b, c in zip(model.parameters(), early.parameters(), twin.parameters(), strict=True):
        assert a.shape == b.shape == c.shape and len({id(a), id(b), id(c)}) == 3
    wanted = own(mlp()(x)).detach()
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    model(own(x)).sum().backward()
    step.step()
    worst = max(float((m(own(x)).detach() - wanted).abs().max()) for m in (early, twin, copy.deepcopy(early)))
    assert float((model(own(x)).detach() - wanted).abs().max()) > 0.01
    return max(worst, *(difference(dict(m.state_dict()), dict(mlp().state_dict())) for m in (early, twin, pickled)))


def meta() -> float:
    """A module on the meta device: each rank gets memory for its part, and a whole checkpoint fills it."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    model = torch_soap.parallelize(model, own(batch()[0]), plan=CUT)
    assert model[0].weight.shape == (4, 6), model[0].weight.shape
    model.load_state_dict(mlp().state_dict())
    x, _ = batch()
    return float((model(own(x)) - own(mlp()(x))).abs().amax().detach())


def watches() -> float:
    """Told: a replica that was written on one rank, a gradient from outside of forward, hooks that will never fire."""
    x, _ = batch()
    model = torch_soap.parallelize(mlp(), plan="* n=fed")
    model(own(x)).sum().backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (model(own(x)).sum() + model[0].weight.square().sum()).backward()
        model[2].register_forward_hook(lambda *_: None)
        model(own(x))
    texts = [str(w.message) for w in told]
    assert sum("0.weight has a part from outside" in t for t in texts) == 1, texts
    assert sum("hooks were put on submodules" in t for t in texts) == 1, texts
    if dist.get_rank() == 1:
        with torch.no_grad():
            model[4].bias[0] += 1e-15
    model._soap.calls = 99
    try:
        model(own(x))
    except torch_soap.RankMismatchError as error:
        assert "4.bias" in str(error) and "0 and 1" in str(error), error
    else:
        raise AssertionError("replicas differ and nobody said so")
    return 0.0


CHECKS: dict[str, Callable[[], float]] = {
    f.__name__: f for f in (optimizers, clipping, scaling, checkpoints, saving, many_inputs, special, modes, seeds, attributes, loss_inside, plans, refusals, copies, meta, watches)
}


def run(checks: dict[str, Callable[[], float]], names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name in names or list(checks):
        try:
            results[name] = checks[name]()
        except Exception:  # every type: the test prints it
            results[name] = traceback.format_exc()[-1500:]
        report(results)


if __name__ == "__main__":
    run(CHECKS, sys.argv[1:])
