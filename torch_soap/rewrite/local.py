"""What a rank calls on one tile of an operator.

A local computation gets the tile's operands (fx nodes; None where an operand is absent or anchored on another tile) and
emits calls that give the tile's results. It may read the *global* index sets of the tile: sizes, paddings, masks and
offsets come from there, never from the captured call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torch_soap import _C
from torch_soap.capture.graph import Node, substitute
from torch_soap.capture.interpret import region
from torch_soap.random import CounterState
from torch_soap.random_ops import RANDOM_KERNELS


class Emit:
    """Appends calls to a segment's fx graph; inside `mode`, the no_grad and autocast region of the operator at hand."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.random: fx.Node | None = None  # the forward's CallKey
        self.mode: tuple[bool, Any] = (False, None)

    def __call__(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        if self.mode != (False, None) and fn is not operator.getitem:
            fn = in_region(fn, *self.mode)
        return self.graph.call_function(fn, args, kwargs)


@dataclass
class Call:
    """One tile of one operator.

    Attributes:
        operands: the tile's operands, in the order of the node's inputs.
        sets: by factor name, the global indices that this tile works on.
        boxes: of each operand (None when absent), global indices per dim.
        shapes: local shape of each result; `results` are their global boxes.
    """

    program: _C.Program
    node: _C.Node
    captured: Node | None
    operands: list[fx.Node | None]
    sets: dict[str, _C.IndexSet]
    sizes: dict[str, int]
    boxes: list[list[_C.IndexSet] | None]
    results: list[list[_C.IndexSet]]
    shapes: list[list[int]]
    dtypes: list[torch.dtype]

    def attr(self, name: str, default: Any = None) -> Any:
        value = self.node.attrs.get(name)
        return default if value is None else value

    def operand(self, name: str) -> fx.Node | None:
        names = self.node.operand_names
        return self.operands[names.index(name)] if name in names else None

    def box(self, name: str) -> list[_C.IndexSet]:
        box = self.boxes[self.node.operand_names.index(name)]
        if box is None:
            raise RuntimeError(f"[rewrite] {self.node.name}: operand {name} isn't read by this tile")
        return box

    def global_shape(self, name: str) -> list[int]:
        index = self.node.operand_names.index(name)
        return list(self.program.graph.tensors[self.node.inputs[index]].shape)

    def interval(self, factor: str) -> tuple[int, int]:
        """First index and one past the last of the tile's part of a factor; whole when the operator lacks it."""
        part = self.sets.get(factor)
        if part is None:
            return 0, 1
        return part.begin, part.end

    def is_cut(self, factor: str) -> bool:
        return factor in self.sets and not self.sets[factor].is_all(self.sizes[factor])


Local = Callable[[Emit, Call], "fx.Node | list[fx.Node]"]
LOCALS: dict[str, Local] = {}


def local(*targets: str) -> Callable[[Local], Local]:
    """Registers the local computation of operators by canonical name."""

    def register(fn: Local) -> Local:
        for target in targets:
            if target in LOCALS:
                raise ValueError(f"[rewrite] {target} is registered twice")
            LOCALS[target] = fn
        return fn

    return register


def in_region(fn: Callable[..., Any], no_grad: bool, autocast: Any) -> Callable[..., Any]:
    """`fn` inside the autocast or no_grad region that it was captured in. A function of its own: fx can't print functions as arguments."""
    mode = Node(name="", kind="op", no_grad=no_grad, autocast=autocast)

    def call(*args: Any, **kwargs: Any) -> Any:
        with region(mode):
            return fn(*args, **kwargs)

    return call


def drawn(state: CounterState, op_index: int, fn: Any, *args: Any, **kwargs: Any) -> Any:
    """A random operator as a whole: its counter-based kernel; itself where nothing is drawn."""
    result = RANDOM_KERNELS[fn](*args, **kwargs, key=state.key(op_index))
    return fn(*args, **kwargs) if result is NotImplemented else result


def captured_call(e: Emit, call: Call, fn: Callable[..., Any] | None = None) -> list[fx.Node]:
    """The captured call as it is, on the tile's operands."""
    node = call.captured
    if node is None or node.fn is None:
        raise RuntimeError(f"[rewrite] {call.node.name} ({call.node.target}) has no local computation")
    feed = iter(call.operands)
    args = substitute(node.args, lambda _: next(feed))
    kwargs = substitute(node.kwargs, lambda _: next(feed))
    called: Any = fn or node.fn
    if node.rng_index is not None and called in RANDOM_KERNELS:
        called, args = drawn, (e.random, node.rng_index, called, *args)
    result = e(called, *args, **kwargs)
    return results_of(e, call, node, result)


def results_of(e: Emit, call: Call, node: Node, result: fx.Node) -> list[fx.Node]:
    if len(call.shapes) == 1 and not returns_list(node):
        return [result]
    return [e(operator.getitem, result, i) for i in range(len(call.shapes))]


def returns_list(node: Node) -> bool:
    schema = getattr(node.fn, "_schema", None)
    if schema is None:
        return len(node.outputs) > 1
    return len(schema.returns) > 1 or str(schema.returns[0].type).startswith("List") if schema.returns else False


def emit_local(e: Emit, call: Call) -> list[fx.Node]:
    """The tile's results."""
    fn = LOCALS.get(call.node.target)
    autocast = call.captured.autocast if call.captured is not None else None
    e.mode = (call.node.no_grad, autocast)
    result = fn(e, call) if fn is not None else captured_call(e, call)
    e.mode = (False, None)
    results = result if isinstance(result, list) else [result]
    if autocast is None:
        return results
    # A tile may be computed by other operators than the whole, which autocast treats in other ways.
    return [e(torch.Tensor.to, r, dtype) for r, dtype in zip(results, call.dtypes, strict=True)]
