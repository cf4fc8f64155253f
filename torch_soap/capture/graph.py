"""What a capture gives: a flat list of functional operators at concrete sizes, in topological order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor inside argument templates; `value` is the index into `Graph.values`."""

    value: int


@dataclass
class Value:
    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass
class Node:
    """One operator, parameter, buffer, constant, feed or return.

    Attributes:
        name: unique, the key of plans: "features.0", "layer1.0/add", "param:features.0.weight", "in:0", "out:0".
        kind: "op", "param", "buffer", "const", "feed" or "return".
        target: canonical operator name without namespace, overload and in-place suffix ("conv2d"); "buffer_write" for a
            return that is the new value of a buffer.
        family: "pointwise" for elementwise operators, else "".
        fn: what computes it, called with `args` and `kwargs`, in which each tensor is a Ref and each size an int.
        arg_names: the same arguments by schema name, defaults filled in.
        inputs: value ids, one for each Ref in the order of `args`, then `kwargs`.
        rng_index: n-th random operator of the graph (key of counter-based randomness), None when not random.
        qualname: params, buffers and constants: their name in the module; feeds and returns: path of the leaf ("0", "mask").
        sample_dim: feeds and returns: the dim that moves with the batch, None for none; by `sample_ratio` for each row.
    """

    name: str
    kind: str
    target: str = ""
    family: str = ""
    fn: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    arg_names: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    module_path: str = ""
    source: str = ""
    no_grad: bool = False
    autocast: tuple[str, torch.dtype, bool] | None = None
    rng_index: int | None = None
    qualname: str = ""
    sample_dim: int | None = None
    sample_ratio: int = 1


@dataclass
class Graph:
    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    train: bool = True
    dynamic: bool = False

    @property
    def sample_dims(self) -> dict[str, int | None]:
        return {n.name: n.sample_dim for n in self.nodes if n.kind in ("feed", "return") and n.target != "buffer_write"}

    @property
    def buffer_writes(self) -> list[tuple[str, int]]:
        """(buffer, value) of every buffer that the forward writes."""
        return [(n.qualname, n.inputs[0]) for n in self.nodes if n.target == "buffer_write"]

    def add_value(self, tensor: torch.Tensor) -> int:
        self.values.append(Value(len(self.values), tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
        return len(self.values) - 1

    def of_kind(self, kind: str) -> list[Node]:
        return [n for n in self.nodes if n.kind == kind]


def refs(tree: Any) -> Iterator[int]:
    """Value ids of the Refs in nested lists, tuples and dicts, in order."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from refs(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from refs(item)


def substitute(tree: Any, of: Callable[[int], Any]) -> Any:
    """The same nested structure with each Ref replaced by `of(value id)`."""
    if isinstance(tree, Ref):
        return of(tree.value)
    if isinstance(tree, list):
        return [substitute(item, of) for item in tree]
    if isinstance(tree, tuple):
        return tuple(substitute(item, of) for item in tree)
    if isinstance(tree, dict):
        return {k: substitute(item, of) for k, item in tree.items()}
    return tree
