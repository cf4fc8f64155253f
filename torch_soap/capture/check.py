"""The check of a capture against eager: outputs, gradients of parameters and inputs, buffers; everything is put back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torch_soap.capture.importer import CaptureError
from torch_soap.capture.opaque import Recording, mode_of, split_leaves
from torch_soap.capture.structure import flatten
from torch_soap.capture.watch import python_random_state

# Largest difference, relative to the largest magnitude; operators may be summed in another order (batch norm, losses).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Run:
    """What one forward (and backward) gave, by name."""

    outputs: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor | None] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def preserved(module: nn.Module, parameters: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Random states, buffers and these parameters are afterwards what they were."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy is not None else None
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    owned = [(m, n, b, b.detach().clone()) for m in module.modules() for n, b in m._buffers.items() if b is not None]
    others = [(p, p.detach().clone()) for p in parameters]
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            with torch.no_grad():
                for owner, name, tensor, saved in owned:
                    owner._buffers[name] = tensor
                    if not tensor.is_meta:
                        tensor.copy_(saved)
                for parameter, saved in others:
                    parameter.copy_(saved)


@contextlib.contextmanager
def recorded(root: nn.Module, paths: Sequence[str], drawn: Callable[[], tuple[int, int]]) -> Iterator[dict[str, list[Recording]]]:
    """Shapes at each call of the modules at `paths`. `drawn`: random operators so far, and what they drew."""
    calls: dict[str, list[Recording]] = {p: [] for p in paths}
    hooks = []
    for path in paths:
        module = root.get_submodule(path)
        before: list[tuple[dict[str, torch.Tensor], tuple[int, int], Any]] = []

        def enter(m: nn.Module, _args: Any, _kwargs: Any, before: Any = before) -> None:
            before.append(({n: b.detach().clone() for n, b in m.named_buffers()}, drawn(), all_random_states()))

        def leave(m: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path, before: Any = before) -> None:
            old, (count, draws), states = before.pop()
            now, drawn_now = drawn()
            written = [n for n, b in m.named_buffers() if not b.is_meta and not torch.equal(b, old[n])]
            made = record((args, kwargs), result, written)
            made.num_random = now - count
            made.random = drawn_now > draws or all_random_states() != states
            calls[path].append(made)

        hooks += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave, with_kwargs=True)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def all_random_states() -> tuple[Any, ...]:
    return (*python_random_state(), torch.get_rng_state().numpy().tobytes())


def record(args: Any, result: Any, written: list[str]) -> Recording:
    leaves, spec = flatten(result)
    constants, slots = split_leaves(leaves)
    made = [leaves[i] for i in slots]
    inputs = [tuple(t.shape) for t in flatten(args)[0] if isinstance(t, torch.Tensor)]
    return Recording(inputs, [tuple(t.shape) for t in made], [t.dtype for t in made], [t.requires_grad for t in made], constants, slots, spec, written)


Compute = Callable[[list[torch.Tensor]], tuple[list[torch.Tensor], dict[str, torch.Tensor]]]


def run(module: nn.Module, compute: Compute, inputs: Sequence[torch.Tensor], grad: bool) -> Run:
    """One forward of `compute` (outputs, buffers) and the gradients for seeded cotangents."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    with torch.set_grad_enabled(grad):
        outputs, buffers = compute(leaves)
    result = Run({f"output {i}": o for i, o in enumerate(outputs)}, {}, {f"buffer {n}": b.detach().clone() for n, b in buffers.items()})
    wanted = [o for o in outputs if o.requires_grad] if grad else []
    sources: dict[str, torch.Tensor] = {f"gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad}
    sources |= {f"gradient of input {i}": t for i, t in enumerate(leaves) if t.requires_grad}
    if wanted and sources:
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in wanted]
        grads = torch.autograd.grad(wanted, list(sources.values()), seeds, allow_unused=True)
        result.grads = {n: g.to_dense() if g is not None and g.is_sparse else g for n, g in zip(sources, grads, strict=True)}
    result.outputs = {n: o.detach() for n, o in result.outputs.items()}
    return result


def compare(eager: Run, traced: Run, dtypes: Iterable[torch.dtype] = ()) -> None:
    """Raises CaptureError at the first thing that differs. `dtypes`: of values on the way (autocast), which bound everything behind them."""
    least = max((TOLERANCE[d] for d in dtypes if d in (torch.float16, torch.bfloat16)), default=0.0)
    for wanted, got in ((eager.outputs, traced.outputs), (eager.buffers, traced.buffers), (eager.grads, traced.grads)):
        if wanted.keys() != got.keys():
            raise CaptureError(f"the trace gives {sorted(got)}, the module {sorted(wanted)}")
        tensors = [t for t in wanted.values() if t is not None and t.numel() and t.is_floating_point()]
        top = max((float(t.abs().nan_to_num(posinf=0.0).max()) for t in tensors), default=0.0)
        for name, a in wanted.items():
            difference = differs(a, got[name], 1e-2 * top, least)
            if difference:
                raise CaptureError(f"the trace differs from the module: {name} {difference}")


def differs(a: torch.Tensor | None, b: torch.Tensor | None, scale: float, least: float) -> str:
    if a is None or b is None:
        other = a if b is None else b
        return f"is {'None' if b is None else 'there'} in the trace" if other is not None and bool((other != 0).any()) else ""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}"
    if not a.numel():
        return ""
    if not (a.is_floating_point() or a.is_complex()):
        return "" if torch.equal(a, b) else "has other values"
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "is finite elsewhere"
    finite = a.isfinite()
    error = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
    size = max(float(a[finite].abs().max()) if bool(finite.any()) else 0.0, scale)
    return f"by {error:.1e} of {size:.1e}" if error > max(TOLERANCE.get(a.dtype, 2e-4), least) * size else ""


__all__ = ["Run", "compare", "mode_of", "preserved", "record", "recorded", "run"]
