"""Memory shared between tensors, made explicit.

In-place operators write a storage that several tensors (handles) may look into. A graph of functional operators has values
instead, so each handle knows which value it holds *now*: a write through a view becomes a new value of the view, and of
what it is a view of (the view's inverse: the untouched parts joined with the new one), up to the tensor that owns the
storage; the other views are derived again when they are read next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torch_soap import functional
from torch_soap.capture.canonical import REWRITES, narrow, permute, view
from torch_soap.capture.observe import CannotFold

RESHAPES = {"view", "reshape", "_unsafe_view", "reshape_as", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"}
PERMUTES = {"transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "permute", "movedim", "moveaxis"}
SAME = {"alias", "detach", "contiguous", "to", "lift_fresh", "type_as"}
PARTS = {"split", "split_with_sizes", "chunk", "tensor_split"}


class Functional(Protocol):
    mode: Any
    no_grad: bool
    ids: dict[int, int]

    def emit(self, target: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...

    def functional(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class CannotWrite(RuntimeError):
    """A write through a view that has no inverse (overlapping or strided in a way of its own)."""


@dataclass
class View:
    """`handle = target(parent, *args)`, the `index`-th of several results; right as of `seen` writes to the storage."""

    parent: torch.Tensor
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None
    seen: int
    sizes: list[tuple[int, ...]]  # shapes of all results


class Aliases:
    """Handles are fake tensors; so are values, and a handle that nothing wrote is its own value."""

    def __init__(self, graph: Functional) -> None:
        self.graph = graph
        self.views: dict[int, View] = {}
        self.now: dict[int, torch.Tensor] = {}
        self.writes: dict[int, int] = {}
        self.handles: dict[int, torch.Tensor] = {}  # alive, so that their id() stays theirs
        self.written: list[int] = []  # ids of the handles that own what was written, in order
        self.no_writes: set[int] = set()  # ids of handles whose memory's other views aren't known

    def fresh(self, value: Any) -> Any:
        """Handles for results that share no memory with anything."""
        if isinstance(value, list | tuple):
            return [self.fresh(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        handle = value
        if id(value) in self.handles:
            with torch.no_grad(), self.graph.mode:
                handle = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            self.now[id(handle)] = value
        self.handles[id(handle)] = handle
        return handle

    def sealed(self, handle: torch.Tensor, value: torch.Tensor, number: int, same: bool) -> torch.Tensor:
        """A handle of value `number`, which looks like `value`; the memory that it shares with others isn't known, so it can't be written."""
        value = handle if same else value
        self.graph.ids[id(value)] = number
        self.handles |= {id(handle): handle, id(value): value}
        self.no_writes.add(id(handle))
        if not same:
            self.now[id(handle)] = value
        return handle

    def copied(self, handle: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """A handle with the operator's own strides (`contiguous`), which the value may not have: later views need them. Where
        gradients allow, the handle becomes the value's own tensor, so that what follows has eager's strides too."""
        self.handles[id(handle)] = handle
        if handle.requires_grad == value.requires_grad:
            self.graph.ids[id(handle)] = self.graph.ids[id(value)]
        else:
            self.now[id(handle)] = value
        return handle

    def bind_view(self, handle: torch.Tensor, value: torch.Tensor, entry: View) -> torch.Tensor:
        if id(handle) in self.handles:  # the operator had nothing to do and gave its argument
            return self.handles[id(handle)]
        self.copied(handle, value)
        entry.seen = self.writes.get(id(self.root(entry.parent)), 0)
        self.views[id(handle)] = entry
        return handle

    def root(self, handle: torch.Tensor) -> torch.Tensor:
        while id(handle) in self.views:
            handle = self.views[id(handle)].parent
        return handle

    def read(self, item: Any) -> Any:
        """The present values of handles in nested lists and dicts."""
        if isinstance(item, torch.Tensor):
            return self._read(item)
        if isinstance(item, list | tuple):
            return type(item)(self.read(i) for i in item) if type(item) in (list, tuple) else [self.read(i) for i in item]
        if isinstance(item, dict):
            return {k: self.read(v) for k, v in item.items()}
        return item

    def _read(self, handle: torch.Tensor) -> torch.Tensor:
        entry = self.views.get(id(handle))
        if entry is not None:
            writes = self.writes.get(id(self.root(handle)), 0)
            if entry.seen != writes:
                args = (self._read(entry.parent), *self.read(entry.args))
                value = self.graph.functional(entry.name, entry.target, args, self.read(entry.kwargs))
                self.now[id(handle)] = value if entry.index is None else value[entry.index]
                entry.seen = writes
        return self.now.get(id(handle), handle)

    def write(self, handle: torch.Tensor, value: torch.Tensor) -> None:
        entry = self.views.get(id(handle))
        if entry is None and self.graph.no_grad and handle.requires_grad:
            value = self._past_autograd(self._read(handle), value)
        if entry is None:
            if id(handle) in self.no_writes:
                raise CannotFold("an output of a copy is written")
            self.written.append(id(handle))
            self.writes[id(handle)] = self.writes.get(id(handle), 0) + 1
        else:
            self.write(entry.parent, self._scatter(entry, self._read(entry.parent), value))
            entry.seen = self.writes[id(self.root(handle))]
        self.now[id(handle)] = value

    def _past_autograd(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        before, self.graph.no_grad = self.graph.no_grad, False
        value: torch.Tensor = self.graph.emit("rewritten", functional.rewritten, old, new)
        self.graph.no_grad = before
        return value

    def _scatter(self, entry: View, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The parent's value after the view of it became `new`."""
        e, name = self.graph, entry.name
        if name in SAME and new.dtype == old.dtype:
            return self._past_autograd(old, new) if name == "detach" and old.requires_grad else new
        if name in RESHAPES and new.numel() == old.numel():
            return view(e, new, list(old.shape))
        if name in PERMUTES:
            # Distinct sizes say where each dim went.
            probe = torch.empty(tuple(range(2, 2 + old.dim())), device="meta")
            order = [size - 2 for size in entry.target(probe, *entry.args, **entry.kwargs).shape]
            return permute(e, new, [order.index(d) for d in range(old.dim())])
        if name in ("select", "unbind"):
            dim = (entry.args[0] if entry.args else entry.kwargs.get("dim", 0)) % old.dim()
            index = entry.args[1] % old.shape[dim] if name == "select" else entry.index or 0
            part = view(e, new, [*old.shape[:dim], 1, *old.shape[dim + 1 :]])
            return put(e, old, part, dim, index)
        if name in ("slice", "narrow"):
            given: tuple[Any, ...] = (*entry.args, *(0, None, None, 1)[len(entry.args) :])
            dim, start, end, step = given
            dim %= old.dim()
            if name == "narrow":
                return put(e, old, new, dim, start % old.shape[dim])
            begin, stop, step = slice(start, end, step).indices(old.shape[dim])
            if step == 1:
                return put(e, old, new, dim, begin)
            return e.emit("slice_scatter", torch.ops.aten.slice_scatter.default, old, new, dim, begin, stop, step)
        if name in PARTS:
            dim = (entry.args[1] if len(entry.args) > 1 else entry.kwargs.get("dim", 0)) % old.dim()
            return put(e, old, new, dim, sum(s[dim] for s in entry.sizes[: entry.index]))
        raise CannotWrite(f"an in-place write through {name}")


def put(e: Functional, old: torch.Tensor, new: torch.Tensor, dim: int, start: int) -> torch.Tensor:
    """`old` with `new` in place of its part along `dim` from `start`."""
    end, total = start + new.shape[dim], old.shape[dim]
    parts = [narrow(e, old, dim, 0, start)] if start else []
    parts.append(new)
    if end < total:
        parts.append(narrow(e, old, dim, end, total - end))
    return new if len(parts) == 1 else REWRITES["cat"](e, parts, dim)
