"""The backward of a parallelized module's autograd node: what ranks agree on before it, and what autograd gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from torch_soap.runtime.comm import Comm
from torch_soap.runtime.engine import Engine, StepState
from torch_soap.runtime.header import RankMismatchError

NUM_OTHERS = 6  # of RunProgram's arguments, before the module's inputs and Parameters


def input_gradients(ctx: Any, state: StepState, used: frozenset[int], scale: torch.Tensor | None) -> list[torch.Tensor | None]:
    """What autograd gets, by input. Nobody else holds them then, or they would be copied."""
    engine, calling = ctx.engine, ctx.calling
    wanted = [needed and reached for needed, reached in zip(ctx.needs_input_grad[NUM_OTHERS:], calling.reached(engine, used), strict=True)]
    made = {i: engine.gradient(state, calling.nodes[i]) for i in calling.special if wanted[i]}
    taken = engine.core.take_gradients(state, calling.values, calling.dtypes)
    grads = [g if w else None for g, w in zip(taken, wanted, strict=True)]
    del taken
    for i, grad in made.items():
        if grad is None and calling.values[i] < 0 and calling.inputs[i].startswith("param:"):
            grad = torch.zeros(ctx.shapes[i], dtype=engine.dtype_of(calling.nodes[i]))  # stored elsewhere: an empty part
        grads[i] = grad
    if scale is not None:
        grads = [None if g is None else g * scale.to(g.dtype) for g in grads]
    for i in ctx.inner:
        grads[i] = None if grads[i] is None else grads[i] * ctx.parallel.comm.world_size
    ctx.parallel.gradients.core.expect(calling.watched, grads)
    return grads


def agree_on_backward(engine: Engine, parallel: Any, grads: Sequence[torch.Tensor | None], accumulates: bool, call: int) -> tuple[frozenset[int], bool]:
    """The returns whose gradient comes in on some rank (one that is used on no rank gives its parameters None, as in one process), and
    whether all ranks say `accumulates`. Collective."""
    parts = [grads[i : i + 100] for i in range(0, max(len(grads), 1), 100)]
    model = parallel.header.model(parallel.label)
    said = [parallel.comm.gather_ints([accumulates, model, call, *(g is not None for g in part)], "backward") for part in parts]
    used = [any(column) for chunk in said for column in list(zip(*chunk, strict=True))[3:]]
    first = said[0][0]
    for rank, other in enumerate(said[0]):
        if other[1] != first[1]:
            raise RankMismatchError(
                f"[backward] rank {rank} and rank 0 go back through different models, here {parallel.label}: call backward in the same order"
            )
        if other[2] != first[2]:
            raise RankMismatchError(
                f"[backward] rank {rank} goes back through its forward {other[2]}, rank 0 through its forward {first[2]}: all ranks must call "
                "backward in the same order"
            )
    return frozenset(n for n, u in zip(engine.returns, used, strict=True) if u), all(s[0] for s in said[0])


def mean_gradient(comm: Comm, grads: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Of the loss, over the processes. An interleaved program's forward has made its gradients, with 1 for the loss': this multiplies them. None where it is 1,
    as of `loss.backward()`: multiplied, they would all be copied."""
    own = next((g for g in grads if g is not None), torch.zeros(()))
    wide = own.detach().to(torch.promote_types(own.dtype, torch.float32), copy=True).reshape(-1)
    mean = comm.all_reduce(wide, list(range(comm.world_size)), False)[0] / comm.world_size
    return None if mean.is_cpu and mean.item() == 1.0 else mean


def accumulates_all(functions: Iterable[tuple[Any, int]]) -> bool:
    """Whether the running backward adds to the `.grad` of all leaves, as `backward()` does, `autograd.grad` and `inputs=` don't."""
    try:
        return all(torch._C._will_engine_execute_node(f) for f, _ in functions if type(f).__name__ == "AccumulateGrad")  # type: ignore[attr-defined]
    except RuntimeError:  # what it says to autograd.grad
        return False
