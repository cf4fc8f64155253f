"""What a call brings, and what the calls of one engine look up in the module and the graph, gathered once."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from torch_soap.capture import Captured
from torch_soap.capture.graph import Graph
from torch_soap.runtime.engine import Engine
from torch_soap.runtime.tree import Tree
from torch_soap.runtime.watch import GradientWatch


class Calling:
    """What calls of one engine need to know of the module as it is."""

    def __init__(self, captured: Captured, graph: Graph, tree: Tree, engine: Engine, watch: GradientWatch) -> None:
        self.tree = tree
        self.feeds = [n.name for n in graph.nodes if n.kind == "feed"]
        self.fixed: dict[str, torch.Tensor] = {}  # by node name, in the graph's order; buffers, which forwards may replace, as they were
        self.buffers: list[tuple[str, nn.Module, str]] = []
        for n in graph.nodes:
            if n.kind not in ("param", "buffer", "const"):
                continue
            if n.kind == "param" and n.qualname in tree.every_name:
                self.fixed[n.name] = tree.every_name[n.qualname]
                continue
            self.fixed[n.name] = captured.stored_tensor(n.kind, n.qualname)
            if n.kind == "buffer" and n.qualname in tree.buffers:
                self.buffers.append((n.name, *tree.buffers[n.qualname]))
        self.param_names = [n.name for n in graph.nodes if n.kind == "param"]
        self.parameters = [self.fixed[name] for name in self.param_names]
        self.inputs = [*self.feeds, *self.param_names]
        self.nodes = [engine.node_of[name] for name in self.inputs]
        self.values = [engine.value_of_store[n] for n in self.nodes]
        self.dtypes = [engine.dtypes[n] for n in self.nodes]
        self.watched = watch.indices(self.inputs)
        # Inputs whose gradient may be made here: parts that are empty, or that another rank stores.
        self.special = [i for i, v in enumerate(self.values) if v < 0 or 0 in engine.shapes[v]]
        self.reaching: dict[frozenset[int], list[bool]] = {}  # returns that are used -> whether inputs have a part in them

    def stored(self) -> dict[str, torch.Tensor]:
        """As Parallel.stored."""
        out = dict(self.fixed)
        for name, owner, leaf in self.buffers:
            buffer = owner._buffers[leaf]
            if buffer is not None:
                out[name] = buffer
        return out

    def reached(self, engine: Engine, used: frozenset[int]) -> list[bool]:
        if used not in self.reaching:
            nodes = engine.nodes_before(used)
            self.reaching[used] = [n in nodes for n in self.nodes]
        return self.reaching[used]

    def any_trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters)


def input_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


def all_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Nothing but tensors, one after the other: what most calls are, and what needs no look into structures."""
    return not kwargs and all(type(a) is torch.Tensor for a in args)


def structure_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a capture is bound to besides shapes: the structure of the call and its constants. Equal on ranks that call alike."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for leaf in leaves:
        hidden = not isinstance(leaf, torch.Tensor | nn.Module) and any(isinstance(v, torch.Tensor) for v in getattr(leaf, "__dict__", {}).values())
        if hidden or type(leaf).__module__ == "numpy":
            raise TypeError(f"[forward] an argument of type {type(leaf).__name__}: give tensors, in tuples, dicts or dataclasses that pytree knows")
    if any(isinstance(x, PackedSequence) for x in pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence))):
        raise TypeError("[forward] a PackedSequence's rows aren't a dim: give padded tensors and lengths")

    def key(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return str(leaf.dtype), leaf.dim(), leaf.requires_grad
        plain = isinstance(leaf, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device))
        return repr(leaf) if plain else type(leaf).__qualname__  # the repr of other objects may have their address

    return str(spec), tuple(key(leaf) for leaf in leaves)
