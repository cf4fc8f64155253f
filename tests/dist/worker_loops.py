"""On each rank: training loops as users write them, each against one process; reports the largest difference or the error of each check."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import torch_soap
from tests.dist.worker_user import CUT, SHARD, batch, difference, mlp, own, reduced_bytes, run, whole

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


CHECKS: dict[str, Callable[[], float]] = {f.__name__: f for f in (deferred_reads, deferred_pipeline, undeferred)}

if __name__ == "__main__":
    run(CHECKS, sys.argv[1:])
