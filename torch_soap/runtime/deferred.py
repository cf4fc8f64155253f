"""no_sync: gradients of parameters whose reduction waits.

[Note: deferred] Under `no_sync` a backward leaves out the gradient fills of parameters and keeps what they would read. The next backward
outside of it adds its own, and reduces the sum, once; so does whoever reads gradients before (a step, a norm, a scaler). Until then `p.grad`
is a DeferredGradient: reading it is an error, and clearing it drops what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from torch_soap.runtime.engine import Engine, StepState

# What doesn't look at values.
HARMLESS = {
    *("__hash__", "__set__", "as_subclass", "detach_", "device", "dim", "dtype", "grad_fn", "is_complex", "is_cpu", "is_cuda", "is_floating_point"),
    *("is_leaf", "is_meta", "is_sparse", "layout", "ndim", "numel", "requires_grad", "requires_grad_", "retains_grad", "shape", "size", "_version"),
}


class DeferredGradient(torch.Tensor):
    """A `p.grad` of which a part waits for its reduction."""

    cleared = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name == "__get__" else name
        if name in ("zero_", "_foreach_zero_"):
            for t in pytree.tree_leaves(args):
                if isinstance(t, cls):
                    t.cleared = True
        elif name not in HARMLESS:
            raise RuntimeError(
                f"[no_sync] {name} of a gradient that isn't reduced over ranks yet: read gradients after a backward outside of no_sync, or call "
                "torch_soap.grad_norm(model), torch.nn.utils.clip_grad_norm_ or a step first, which reduce it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Deferred:
    """What waits, on one rank, of one parallelized module.

    Args:
        parameters: by name, now.
    """

    def __init__(self, parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]]) -> None:
        self.parameters = parameters
        self.on = False  # inside no_sync
        self.waiting: dict[Engine, dict[int, torch.Tensor]] = {}  # local value -> gradient, as the fills read it
        self.names: set[str] = set()  # parameters with a gradient that waits

    def wanted(self) -> bool:
        """The backward of a forward called now may leave its reduction to a later one. Hooks on parameters see each backward's gradient."""
        return self.on and not any(hooks_of(p) for _, p in self.parameters())

    def add(self, engine: Engine, state: StepState, scale: torch.Tensor | None, reached: set[int]) -> None:
        """Keeps what a backward left. `reached`: nodes that the used returns depend on."""
        self.drop_cleared()
        known = self.waiting.setdefault(engine, {})
        for value, node in engine.fill_sources.items():
            grad = state.grads.get(value)
            if grad is not None and node in reached:
                grad = grad if scale is None else grad * scale.to(grad.dtype)
                # A copy of its own: another value may be the same memory, and become a parameter's gradient, which is changed in place.
                known[value] = known[value] + grad if value in known else grad.clone()
        parameters = dict(self.parameters())
        for node in engine.filled_params & reached:
            name = engine.names[node].removeprefix("param:")
            p = parameters.get(name)
            if p is not None and p.requires_grad:
                self.names.add(name)
                if not isinstance(p.grad, DeferredGradient) or p.grad.cleared:
                    p.grad = (torch.zeros_like(p) if p.grad is None else plain(p.grad)).detach().as_subclass(DeferredGradient)

    def drop_cleared(self) -> None:
        """Forgets what waits for parameters whose `.grad` was cleared or replaced."""
        alive = {n for n, p in self.parameters() if n in self.names and isinstance(p.grad, DeferredGradient) and not p.grad.cleared}
        if alive != self.names:
            for engine, grads in self.waiting.items():
                for value in [v for v in grads if engine.names[engine.fill_sources[v]].removeprefix("param:") not in alive]:
                    del grads[value]
            self.names = alive

    def flush(self) -> None:
        """Reduces what waits and adds it to the parameters' `.grad`. Collective."""
        self.drop_cleared()
        sums: dict[str, torch.Tensor] = {}
        for engine, grads in self.waiting.items():
            state = engine.state()
            for value, waiting in grads.items():
                state.grads[value] = waiting
            engine.reduce(state)
            for node in engine.filled_params:
                name, grad = engine.names[node].removeprefix("param:"), engine.gradient(state, node)
                if grad is not None:
                    sums[name] = sums[name] + grad if name in sums else grad
        with torch.no_grad():
            for name, p in self.parameters():
                if isinstance(p.grad, DeferredGradient):
                    p.grad = plain(p.grad)
                if name in self.names and name in sums and p.grad is not None:
                    p.grad += sums[name]
        self.waiting, self.names = {}, set()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


def hooks_of(p: nn.Parameter) -> bool:
    """Whether the user put hooks on the parameter."""
    hooks: Mapping[int, Any] = p._backward_hooks or {}
    return any(not getattr(hook, "torch_soap", False) for hook in hooks.values()) or bool(p._post_accumulate_grad_hooks)
