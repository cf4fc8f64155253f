"""What goes wrong silently, watched at small cost: replicas that drift apart, gradients from outside of the program, hooks that
will never fire.
"""

from __future__ import annotations

import functools
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Self, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_soap import _C, _backend
from torch_soap.capture import Captured
from torch_soap.runtime.comm import Comm
from torch_soap.runtime.header import RankMismatchError, number
from torch_soap.runtime.tree import ModuleTree, Tree

# Forwards between two comparisons of replicas; 0: never.
CHECK_EVERY = "TORCH_SOAP_CHECK_REPLICAS_EVERY"
BIT_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor) -> int:
    """Sum of the bit patterns, each weighted by its place among 64: equal for bitwise equal tensors."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.detach().contiguous().view(-1).view(BIT_PATTERNS[tensor.element_size()]).to(torch.int64)
    return int((bits * (torch.arange(bits.numel()) % 64 + 1)).sum())


def compare_replicas(comm: Comm, tensors: Mapping[str, torch.Tensor], storage: Mapping[str, _C.Sharding]) -> None:
    """Parameters and buffers (by node name) that several ranks hold are the same there, to the last bit. Collective.

    Raises RankMismatchError, naming the first that isn't and a rank, on all ranks.
    """
    everyone = comm.gather_objects({name: checksum(t) for name, t in tensors.items()})
    for name, sharding in storage.items():
        for coord in sharding.coords:
            holders = [d for d in coord.devices if name in everyone[d]]
            for rank in holders[1:]:
                if everyone[rank][name] != everyone[holders[0]][name]:
                    raise RankMismatchError(
                        f"[torch_soap] {name} is not the same on ranks {holders[0]} and {rank} any more: it was written, or got a gradient, "
                        f"on one rank only. ({CHECK_EVERY}=0 stops this check.)"
                    )


class ReplicaWatch:
    """Compares replicas at the first forward and every `TORCH_SOAP_CHECK_REPLICAS_EVERY` (default 100) ones."""

    def __init__(self) -> None:
        self.every = int(os.environ.get(CHECK_EVERY, "100"))

    def due(self, call: int) -> bool:
        return self.every > 0 and call % self.every == 0


class ParameterWatch:
    """Tells when parameters aren't the objects that were planned. Others of the same name and shape are taken, and compared over ranks."""

    def __init__(self) -> None:
        self.known: dict[str, nn.Parameter] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.tree: Tree | None = None  # with which all was as it should be
        self.fitting: list[torch.Size] = []
        self.replaced = self.compared = 0

    def start(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.known, self.tree = dict(named), None
        self.shapes = {n: p.shape for n, p in self.known.items()}

    def look(self, tree: Tree) -> dict[str, nn.Parameter]:
        """The new ones.

        Raises RuntimeError where they don't fit.
        """
        if not self.known:
            return {}
        if tree is self.tree and [p.shape for p in tree.parameters] == self.fitting:
            return {}
        now = tree.named
        if now.keys() != self.known.keys():
            name = min(now.keys() ^ self.known.keys())
            raise RuntimeError(f"[forward] {name} {'came' if name in now else 'went'} after the plan was made: change the module first, then parallelize it")
        for name, p in now.items():
            if p.shape != self.shapes[name] or p.is_meta:
                raise RuntimeError(
                    f"[forward] {name} is {list(p.shape)} on {p.device}, this rank's part {list(self.shapes[name])}: it was set after the plan was made. Set "
                    "values with load_state_dict, which takes whole ones, or before the plan is made"
                )
        fresh = {n: p for n, p in now.items() if p is not self.known[n]}
        if fresh:
            self.replaced += 1
            self.known = now
        self.tree, self.fitting = tree, [p.shape for p in tree.parameters]
        return fresh

    def fresh(self) -> bool:
        """Once after each replacement."""
        before, self.compared = self.compared, self.replaced
        return before != self.replaced


class GradientWatch:
    """Warns, once for a parameter, when its gradient has a part that the program didn't make: that part isn't summed over ranks."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self.attached: dict[str, tuple[nn.Parameter, int]] = {}
        self.core = _backend.GradientWatch()

    def attach(self, named: Mapping[str, nn.Parameter]) -> None:
        me = weakref.ref(self)

        def look(index: int, name: str, grad: torch.Tensor | None) -> None:
            if (watch := me()) is not None and not watch.core.is_ours(index, grad):
                watch.tell(name)

        for name, p in named.items():
            if p.requires_grad and (name not in self.attached or self.attached[name][0] is not p):
                self.attached[name] = p, self.core.add()
                hook = functools.partial(look, self.attached[name][1], name)
                hook.torch_soap = True  # type: ignore[attr-defined]
                theirs = list(p._backward_hooks or ())
                p.register_hook(hook)
                hooks = cast(dict[int, Any], p._backward_hooks)
                for key in theirs:  # behind ours, which is to see what comes as it comes
                    hooks[key] = hooks.pop(key)

    def indices(self, nodes: Iterable[str]) -> list[int]:
        """Of nodes the number of their parameter; -1: none is looked at."""
        return [self.attached.get(node.removeprefix("param:"), (None, -1))[1] if node.startswith("param:") else -1 for node in nodes]

    def tell(self, name: str) -> None:
        if name in self.told:
            return
        self.told.add(name)
        warnings.warn(
            f"[torch_soap] the gradient of {name} has a part from outside of the model's forward: it is this rank's own, and isn't summed over ranks "
            "as the rest is. Give such a term to parallelize(loss=...), or compute it in forward.",
            stacklevel=2,
        )


PLAIN = (bool, int, float, str)


class ReadAttributes:
    """Context: which plain attributes (a dropout's p, a temperature; not modes) of `module` and its submodules are read in it.

    What a capture read it is bound to: with another value it is another program. What it didn't read may change.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.read: dict[tuple[str, str], Any] = {}
        self.classes: list[tuple[nn.Module, type]] = []

    def __enter__(self) -> Self:
        for path, child in self.module.named_modules():
            own: Any = type(child)

            def get(instance: Any, name: str, own: Any = own, path: str = path) -> Any:
                value = own.__getattribute__(instance, name)
                if type(value) in PLAIN and name != "training" and name in own.__getattribute__(instance, "__dict__"):
                    self.read.setdefault((path, name), value)
                return value

            watched = type(own.__name__, (own,), {"__getattribute__": get, "__module__": own.__module__, "__qualname__": own.__qualname__})
            try:
                child.__class__ = watched
            except TypeError:  # TorchScript's: its attributes are constants
                continue
            self.classes.append((child, own))
        return self

    def __exit__(self, *_: object) -> None:
        for child, own in self.classes:
            child.__class__ = own

    def of(self, module: nn.Module) -> Self:
        """The same reads, watched on another copy of the module."""
        children = dict(module.named_modules())
        self.watched = [(children[path], name, getattr(children[path], name)) for path, name in self.read if hasattr(children.get(path), name)]
        return self

    def unchanged(self) -> bool:
        return all(getattr(child, name, None) == value for child, name, value in self.watched)

    def now(self) -> list[Any]:
        return [getattr(child, name, None) for child, name, _ in self.watched]


class AttributeWatch:
    """Modes of all submodules and the attributes that captures read, as a number for the agreement of ranks."""

    MANY = 8

    def __init__(self, tree: ModuleTree) -> None:
        self.tree = tree
        self.reads: list[ReadAttributes] = []
        self.numbers: dict[Any, int] = {}  # state of all modes, dtypes and requires_grad -> number
        self.state: tuple[list[Any], ...] = ()
        self.read: list[Any] | None = None
        self.mode = self.summary = -1
        self.frozen: list[bool] = []

    def look(self) -> int:
        """A number that is equal on ranks with equal modes and attributes. Sets `mode`, which is equal here for equal modes and dtypes, and `frozen`: which
        parameters require gradients."""
        tree = self.tree.now()
        modes, dtypes = [m.training for m in tree.modules], [p.dtype for p in tree.parameters]
        frozen = [p.requires_grad for p in tree.parameters]
        read = self.reads[0].now() if self.reads else None
        if self.state == (modes, dtypes, frozen) and self.read == read:
            return self.summary
        self.state, self.read, self.frozen = (modes, dtypes, frozen), read, frozen
        self.mode = self.numbers.setdefault((tuple(modes), tuple(dtypes)), len(self.numbers))
        self.summary = number(repr((modes, [str(d) for d in dtypes], frozen, read)))
        return self.summary

    def captured(self, capture: Captured, read: ReadAttributes) -> None:
        """Warns about what a parallel forward can't do to the module, and when it is captured again and again."""
        lost = [name.removeprefix("model").removeprefix(".") for name in dict.fromkeys((*capture._last().changed, *capture._last().assigned))]
        if lost:
            warnings.warn(
                f"[torch_soap] forward changes the module's {', '.join(lost)}: a parallelized forward doesn't. Return it, or make it a buffer.", stacklevel=4
            )
        self.reads.append(read)
        if len(self.reads) == self.MANY:
            warnings.warn(
                f"[torch_soap] captured {self.MANY} times: each new value of an attribute that forward reads, or of an argument that is no tensor, is another "
                "program. Make what changes often a tensor input or a buffer.",
                stacklevel=4,
            )


class HookWatch:
    """Warns when hooks were put on submodules after capture: the program doesn't call submodules, so they don't fire."""

    def __init__(self) -> None:
        self.known = -1
        self.made = -1  # hooks of any kind that torch has made when they were counted

    def look(self, tree: Tree) -> None:
        if self.made == RemovableHandle.next_id:
            return
        self.made = RemovableHandle.next_id
        count = sum(self._hooks(child) for child in tree.modules[1:])
        if 0 <= self.known < count:
            warnings.warn(
                "[torch_soap] hooks were put on submodules after the model was captured: they don't fire, since submodules aren't called any more. "
                "Put them on before parallelize, or on the whole model.",
                stacklevel=3,
            )
        self.known = count

    @staticmethod
    def _hooks(child: Any) -> int:
        return sum(len(getattr(child, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))
