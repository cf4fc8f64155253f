"""The module's submodules, parameters and buffers as lists, walked anew only where the module has changed.

`nn.Module` finds them by walking all submodules, which takes longer than a small forward. Whether any has come, gone or been replaced since
is seen by comparing identities.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Tree:
    """Of a module at one time."""

    def __init__(self, module: nn.Module, number: int) -> None:
        self.number = number  # equal for equal submodules
        self.modules = list(module.modules())
        self.named = dict(module.named_parameters())
        self.parameters = list(self.named.values())
        self.every_name = dict(module.named_parameters(remove_duplicate=False))
        self.buffers: dict[str, tuple[nn.Module, str]] = {}  # qualified name -> its module, and its name there
        for name, _ in module.named_buffers(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            self.buffers[name] = module.get_submodule(owner), leaf
        self.ids, self.keys = self.identities(), self.names()
        self.kept = [v for m in self.modules for v in m._parameters.values()]  # an id is a thing's as long as it lives

    def identities(self) -> list[int]:
        children = [id(v) for m in self.modules for v in m._modules.values()]
        return children + [id(v) for m in self.modules for v in m._parameters.values()]

    def names(self) -> list[str]:
        return [k for m in self.modules for k in (*m._modules.keys(), *m._parameters.keys(), *m._buffers.keys())]

    def is_current(self) -> bool:
        return self.identities() == self.ids and self.names() == self.keys


class ModuleTree:
    """Keeps the Tree of a module, and makes another one where the module has changed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tree: Tree | None = None
        self.numbers: dict[Any, int] = {}  # submodules -> number

    def now(self) -> Tree:
        if self.tree is None or not self.tree.is_current():
            modules = tuple(self.module.modules())
            self.tree = Tree(self.module, self.numbers.setdefault(modules, len(self.numbers)))
        return self.tree

    def last(self) -> Tree:
        """As of the last `now`, within one call."""
        return self.now() if self.tree is None else self.tree
