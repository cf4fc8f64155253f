"""On each rank: training loops as users write them, each against one process; reports the largest difference or the error of each check."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torch_soap
from tests.dist.worker_user import CUT, SHARD, batch, difference, mlp, own, run, train, whole

PLANS = (CUT, SHARD, "* n=fed")
PIPELINE = "set order=1f1b\n0 n=2x2t store=shard\n* n=2x2t"


def refused(what: str, text: str, fn: Callable[[], Any]) -> None:
    """fn() raises, and says `text`."""
    try:
        fn()
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        assert text in str(error), f"{what}: {error}"
        return
    raise AssertionError(f"{what} was not refused")


def backward(m: nn.Module, scale: float = 1.0) -> None:
    x, y = batch()
    cut = own if hasattr(m, "_soap") else whole
    ((m(cut(x) * scale) - cut(y)) ** 2).mean().backward()


def step(m: nn.Module) -> None:
    torch.optim.SGD(m.parameters(), lr=0.1).step()


def reduced_bytes(model: nn.Module, fn: Callable[[], Any]) -> int:
    """Bytes that all-reduces and exchanges moved in fn()."""
    traffic = model._soap.comm.traffic.num_bytes
    before = traffic.total()
    fn()
    return traffic.total() - before


def accumulation() -> float:
    """k backwards under no_sync and one outside: the results of one process, gradients reduced once, also where shapes differ."""
    x, y = batch()
    worst = 0.0
    for plan in (CUT, SHARD, "* n=fed"):
        for to_none in (True, False):
            reference, model = mlp(), torch_soap.parallelize(mlp(), plan=plan)
            for rows in (3, 2):  # another engine

                def backward(m: nn.Module, scale: float, rows: int = rows) -> None:
                    cut = whole if m is reference else own
                    ((m(cut(x[: 2 * rows]) * scale) - cut(y[: 2 * rows])) ** 2).mean().backward()

                backward(model, 1)
                model.zero_grad()
                once = reduced_bytes(model, lambda: backward(model, 1))  # noqa: B023
                under = 0
                reference.zero_grad(to_none)
                model.zero_grad(to_none)
                for k in (1, 2, 3):
                    backward(reference, k)
                    with model.no_sync():
                        under += reduced_bytes(model, lambda: backward(model, k))  # noqa: B023
                backward(reference, 4)
                total = under + reduced_bytes(model, lambda: backward(model, 4))  # noqa: B023
                if plan == "* n=fed":
                    assert under == 0 and total == once, (under, total, once)
                assert 4 * once - total == 3 * (once - under // 3), (under, total, once)  # what is left out is made up for once
                backward(reference, 5)
                with model.no_sync():
                    backward(model, 5)
                for m in (reference, model):
                    torch.optim.SGD(m.parameters(), lr=0.1).step()
            worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    return worst


def retained_graphs() -> float:
    """Two forwards before one backward, and several backwards through one forward, with keep=use too."""
    x, y = batch()
    worst = 0.0
    for plan in (CUT, SHARD):
        reference, model = mlp(), torch_soap.parallelize(mlp(), plan=plan)
        for m, cut in ((reference, whole), (model, own)):
            first, second = ((m(cut(x)) - cut(y)) ** 2).mean(), (m(cut(x) * 2) ** 2).mean()
            first.backward(retain_graph=True)
            first.backward(retain_graph=True)
            (first + 3 * second).backward()
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.1 * p.grad
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    return worst


def deferred_reads() -> float:
    """What reads gradients while some are deferred reduces them first, or is an error; what clears them clears these."""
    worst = 0.0
    for plan in PLANS:
        reference, model = mlp(), torch_soap.parallelize(mlp(), plan=plan)
        backward(model)
        model.zero_grad()

        def both(fn: Callable[[nn.Module], Any], model: nn.Module = model, reference: nn.Module = reference) -> tuple[Any, Any]:
            fn(reference)
            with model.no_sync():
                return None, fn(model)

        both(backward)
        worst = max(worst, float((torch_soap.grad_norm(model) - torch_soap.grad_norm(reference)).abs()))
        both(lambda m: backward(m, 2))
        for m in (reference, model):
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            step(m)
        for clear in (lambda m: m.zero_grad(), lambda m: m.zero_grad(set_to_none=False), lambda m: torch.optim.SGD(m.parameters()).zero_grad()):
            both(lambda m: backward(m, 3))
            clear(reference)
            clear(model)
            both(lambda m: backward(m, 0.5))
            step(reference)
            step(model)
        both(backward)
        if plan == "* n=fed":
            refused("a read", "isn't reduced", lambda model=model: model[0].weight.grad.norm())
            refused("its data", "isn't reduced", lambda model=model: model[0].weight.grad.data)
            refused("a clip by value", "isn't reduced", lambda model=model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.1))
        for m in (reference, model):
            scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.SGD(m.parameters(), lr=0.1)
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    return worst


def deferred_pipeline() -> float:
    """1F1B, whose backward runs in the forward."""
    x, target = batch(8)[0], torch.arange(8) % 4
    reference, model = mlp(), torch_soap.parallelize(mlp(), (own(x), own(target)), loss=F.cross_entropy, plan=PIPELINE)
    for _ in range(2):
        for k in (1, 2):
            F.cross_entropy(reference(k * x), target).backward()
            with model.no_sync():
                model(k * own(x), own(target)).backward()
        (3 * F.cross_entropy(reference(x), target)).backward()
        (3 * model(own(x), own(target))).backward()
        for m in (reference, model):
            step(m)
            m.zero_grad()
    return difference(dict(model.state_dict()), dict(reference.state_dict()))


class Multiplied(TorchDispatchMode):
    """Shapes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[torch.Size]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.mul.Tensor:
            self.shapes.add(args[0].shape)
        return func(*args, **(kwargs or {}))


def pipeline_backward() -> float:
    """An interleaved program has its gradients before backward: what comes in multiplies them, where that isn't 1, as in every plain loop."""
    x, target = batch(8)[0], torch.arange(8) % 4
    worst = 0.0
    for factor in (1.0, 3.0):
        reference = mlp()
        model = torch_soap.parallelize(mlp(), (own(x), own(target)), loss=F.cross_entropy, plan=PIPELINE)
        (factor * F.cross_entropy(reference(x), target)).backward()
        loss = model(own(x), own(target))
        scaled = loss if factor == 1 else factor * loss
        with Multiplied() as multiplied:
            scaled.backward()
        parts = {p.shape for p in model.parameters() if p.grad is not None and p.numel()}
        assert parts.isdisjoint(multiplied.shapes) == (factor == 1), f"times {factor}: {multiplied.shapes} multiplied"
        for m in (reference, model):
            step(m)
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    reference, model = mlp(), torch_soap.parallelize(mlp(), (own(x), own(target)), loss=F.cross_entropy, plan=PIPELINE)
    for m in (reference, model):
        loss = F.cross_entropy(m(x), target) if m is reference else m(own(x), own(target))
        for _ in range(2):  # the gradients stay those of the first time, whatever becomes of the parameters'
            loss.backward(retain_graph=True)
            torch.nn.utils.clip_grad_value_(m.parameters(), 0.01)
        loss.backward()
        step(m)
    return max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))


def undeferred() -> float:
    """Reduced there: autograd.grad, backward(inputs=...), parameters with hooks."""
    reference, model = mlp(), torch_soap.parallelize(mlp(), plan="* n=fed")
    x, _ = batch()
    worst = 0.0
    with model.no_sync():
        ((model(own(x))) ** 2).mean().backward()
        (mine,) = torch.autograd.grad((model(own(x)) ** 2).mean(), [model[2].weight])
        (model(own(x)) ** 2).mean().backward(inputs=[model[0].weight])
        worst = max(worst, float((mine - torch.autograd.grad((reference(x) ** 2).mean(), [reference[2].weight])[0]).abs().max()))
    (reference(x) ** 2).mean().backward()
    (reference(x) ** 2).mean().backward(inputs=[reference[0].weight])
    step(reference)
    step(model)
    seen: dict[nn.Module, list[float]] = {reference: [], model: []}
    for m, values in seen.items():
        m[0].weight.register_post_accumulate_grad_hook(lambda p, values=values: values.append(float(p.grad.norm())))
    backward(reference)
    with model.no_sync():
        backward(model)
    assert len(seen[model]) == 1
    worst = max(worst, abs(seen[model][0] - seen[reference][0]))
    return max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))


def same(steps: Callable[[nn.Module, Callable[[torch.Tensor], torch.Tensor]], Any], make: Callable[[], nn.Module] = mlp, plans: Sequence[str] = PLANS) -> float:
    """The largest difference of states after steps(model, cut), over plans."""
    worst = 0.0
    for plan in plans:
        reference, model = make(), torch_soap.parallelize(make(), plan=plan)
        steps(reference, whole)
        steps(model, own)
        worst = max(worst, difference(dict(model.state_dict()), dict(reference.state_dict())))
    return worst


def closures() -> float:
    """Optimizers that decide by the loss: it is the mean over processes."""

    def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        optimizer = torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")
        x, y = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((m(cut(x)) - cut(y)) ** 2).mean()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)

    return same(steps)


def norms() -> float:
    """Of several orders, also where a rank has nothing to count, and where squares overflow in half precision."""

    def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        backward(m)
        for order in (float("inf"), 1.0, 3.0):
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1, order)
        step(m)

    worst = same(steps)
    model = torch_soap.parallelize(mlp().half(), plan=CUT)
    (model(own(batch()[0]).half()) * 300).sum().backward()
    assert torch_soap.grad_norm(model).isfinite()
    return worst


def wrapped() -> float:
    """torch.utils.checkpoint around the model before it is planned, compiled submodules and models."""
    x, y = batch()
    worst = 0.0
    for reentrant in (False, True):

        def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor], reentrant: bool = reentrant) -> None:
            for _ in range(2):
                out = checkpoint(m, cut(x).clone().requires_grad_(), use_reentrant=reentrant)
                ((out - cut(y)) ** 2).mean().backward()
                step(m)

        worst = max(worst, same(steps))

    def compiled(parts: bool) -> nn.Module:
        m = mlp()
        for part in m if parts else [m]:
            part.compile(backend="eager")
        return m

    def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        backward(m)
        step(m)

    return max(worst, same(steps, lambda: compiled(True)), same(steps, lambda: compiled(False)))


def replaced() -> float:
    """Submodules and parameters set after planning: taken where they fit, else an error."""
    x, _ = batch()
    reference, model = mlp(), torch_soap.parallelize(mlp(), plan=CUT)
    model(own(x))
    reference[1] = nn.ReLU()
    model[1] = nn.ReLU()
    worst = float((model(own(x)) - own(reference(x))).detach().abs().max())
    model.load_state_dict(reference.state_dict(), assign=True)
    worst = max(worst, float((model(own(x)) - own(reference(x))).detach().abs().max()))
    part = model[0].weight
    model[0].weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    refused("a whole parameter", "this rank's part [4, 6]", lambda: model(own(x)))
    model[0].weight = part
    model.append(nn.Linear(4, 4))
    refused("another parameter", "5.bias came after the plan", lambda: model(own(x)))
    del model[5]
    model(own(x))
    with torch.no_grad():
        model[4].bias = nn.Parameter(model[4].bias + dist.get_rank())
    refused("a parameter of this rank's own", "not the same on ranks 0 and 1", lambda: model(own(x)))
    refused("torch.func", "plain one", lambda: torch.func.vmap(model)(own(x)))
    return worst


def edits() -> float:
    """Parameters edited through `.data` and under no_grad between steps: copies are made anew in each forward, nothing goes stale."""

    def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for _ in range(2):
            backward(m)
            step(m)
            m.zero_grad()
            for p in m.parameters():
                p.data.mul_(0.5)
                p.data = p.data * 1.5
            with torch.no_grad():
                for p in m.parameters():
                    p.clamp_(-0.2, 0.2)

    return same(steps)


def initialised() -> float:
    """Weights set after parallelize, before the plan is made; after it torch.nn.init refuses parts."""

    def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        torch.manual_seed(7)
        for layer in (m[0], m[2]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        backward(m)
        step(m)

    worst = same(steps)
    model = torch_soap.parallelize(mlp(), own(batch()[0]), plan=CUT)
    for init in (nn.init.xavier_uniform_, nn.init.normal_, nn.init.orthogonal_, lambda w: nn.init.normal_(w.data)):
        refused("an init", "0.weight, of which this rank has a part", lambda init=init: init(model[0].weight))
    refused("a reset", "has a part", model[0].reset_parameters)
    return worst


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(10, 4, sparse=True).double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids).sum(1)


def sparse() -> float:
    """Gradients of sparse embeddings come dense."""

    def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor = torch.arange(12).reshape(6, 2) % 7) -> None:
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            m(cut(ids)).square().mean().backward()
            optimizer.step()
        if cut is own:
            refuses = torch.optim.SparseAdam(m.parameters())
            refused("SparseAdam", "gradients are dense", refuses.step)

    return same(steps, Sparse, ("* n=fed", "embed v=2 store=v\n* n=fed"))


def averages() -> float:
    """EMA: deepcopies, made before and after planning, updated by name, and torch's AveragedModel."""

    def steps(m: nn.Module, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        x, _ = batch()
        averaged, early = AveragedModel(m), copy.deepcopy(m)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            backward(m)
            optimizer.step()
        late = copy.deepcopy(m)
        for _ in range(2):
            optimizer.zero_grad()
            backward(m)
            optimizer.step()
            averaged.update_parameters(m)
            for copied in (early, late):
                with torch.no_grad():
                    for (_, a), (_, b) in zip(copied.named_parameters(), m.named_parameters(), strict=True):
                        a.lerp_(b, 0.3)
        out = sum(e(cut(x)) for e in (averaged, early, late))
        if cut is whole:
            outputs.append(own(out.detach()))
        else:
            worst.append(float((out.detach() - outputs.pop()).abs().max()))
        m.load_state_dict({n: t + averaged.module.state_dict()[n] for n, t in late.state_dict().items()})

    outputs: list[torch.Tensor] = []
    worst: list[float] = []
    return max(same(steps), *worst)


def torchs_checkpoints() -> float:
    """torch.distributed.checkpoint's own functions: their optimizer states go by names."""
    models = [torch_soap.parallelize(mlp(), plan=plan) for plan in (CUT, SHARD)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in models]
    for m, optimizer in zip(models, optimizers, strict=True):
        train(m, optimizer, own)
    state = copy.deepcopy(get_state_dict(models[0], optimizers[0]))
    train(models[1], optimizers[1], own)
    set_state_dict(models[1], optimizers[1], model_state_dict=state[0], optim_state_dict=state[1])
    for m, optimizer in zip(models, optimizers, strict=True):
        train(m, optimizer, own)
    return difference(dict(models[0].state_dict()), dict(models[1].state_dict()))


CHECKS: dict[str, Callable[[], float]] = {
    f.__name__: f
    for f in (
        accumulation,
        retained_graphs,
        deferred_reads,
        deferred_pipeline,
        pipeline_backward,
        undeferred,
        closures,
        norms,
        wrapped,
        replaced,
        edits,
        initialised,
        sparse,
        averages,
        torchs_checkpoints,
    )
}

if __name__ == "__main__":
    run(CHECKS, sys.argv[1:])
