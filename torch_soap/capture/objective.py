"""The module with its loss, and the form of it that is exported: tensors in, tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from torch_soap.capture.names import unique
from torch_soap.capture.opaque import split_leaves
from torch_soap.capture.structure import flatten, leaf_names


class Objective(nn.Module):
    """forward(*model_args, *targets, **model_kwargs) -> loss(model(*model_args, **model_kwargs), *targets)."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.num_targets = num_targets(loss)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.loss is None:
            return self.model(*args, **kwargs)
        split = len(args) - self.num_targets
        return self.loss(self.model(*args[:split], **kwargs), *args[split:])

    def loss_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.loss.named_parameters() if isinstance(self.loss, nn.Module) else iter(())

    def loss_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.loss.named_buffers() if isinstance(self.loss, nn.Module) else iter(())


def num_targets(loss: Callable[..., Any] | None) -> int:
    """Positional arguments of the loss without default, less the model's output."""
    if loss is None:
        return 0
    required = [
        p
        for p in inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(required) - 1


def keep_buffers(owned: list[tuple[nn.Module, str, torch.Tensor]]) -> None:
    """`self.buffer = x` becomes a write into the buffer: export loses the assignment, but for the root module's."""
    for owner, name, buffer in owned:
        new = owner._buffers[name]
        if new is buffer:
            continue
        if new is None or new.shape != buffer.shape or new.dtype != buffer.dtype:
            raise RuntimeError(f"buffer {name} of {type(owner).__name__} is assigned another shape or type")
        with torch.no_grad():
            buffer.copy_(new)
        owner._buffers[name] = buffer


def python_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": value
        for path, m in module.named_modules()
        for name, value in vars(m).items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }


def tensor_attributes(module: nn.Module) -> dict[str, int]:
    """Identities of tensors that are attributes, but neither parameters nor buffers."""
    return {f"{path}.{name}": id(value) for path, m in module.named_modules() for name, value in vars(m).items() if isinstance(value, torch.Tensor)}


@dataclass
class Result:
    """The structure of the last output."""

    constants: list[Any] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    spec: pytree.TreeSpec | None = None
    names: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # "path.attribute" of Python values that the forward changed
    assigned: list[str] = field(default_factory=list)  # of tensors that the forward assigned


class FlatCall(nn.Module):
    """forward(*tensors) -> tuple of the output's tensors; everything else is as in the example. `called`: while forward runs."""

    def __init__(self, objective: Objective, leaves: list[Any], slots: list[int], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.objective = objective
        self.leaves = [None if i in slots else leaf for i, leaf in enumerate(leaves)]
        self.slots = slots
        self.spec = spec
        self.result = Result()
        self.called = False

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self.leaves)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        owned = [(m, n, b) for m in self.objective.modules() for n, b in m._buffers.items() if b is not None]
        before, tensors_before = python_attributes(self.objective), tensor_attributes(self.objective)
        self.called = True
        try:
            output = self.objective(*args, **kwargs)
        finally:
            self.called = False
        keep_buffers(owned)
        after = python_attributes(self.objective)
        self.result.changed = [name for name, value in after.items() if before.get(name, value) != value]
        self.result.assigned = [name for name, value in tensor_attributes(self.objective).items() if tensors_before.get(name) != value]
        made, self.result.spec = flatten(output)
        names = unique(leaf_names(output))
        self.result.constants, self.result.slots = split_leaves(made)
        self.result.names = [names[i] for i in self.result.slots]
        return tuple(made[i] for i in self.result.slots)
