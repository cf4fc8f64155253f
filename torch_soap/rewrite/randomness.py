"""Local computations of random operators: a tile draws the numbers of its *global* elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from torch_soap import random
from torch_soap.capture.graph import substitute
from torch_soap.capture.opaque import ModuleCall, seeded
from torch_soap.random import CounterState
from torch_soap.random_ops import RANDOM_KERNELS
from torch_soap.rewrite.local import Call, Emit, captured_call, local, results_of

Runs = list[list[tuple[int, int]]]


def runs_of(box: list[Any]) -> Runs:
    return [list(part.runs) for part in box]


def random_call(state: CounterState, op_index: int, fn: Any, tile: Runs, sizes: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator's counter-based kernel; the operator itself where nothing is drawn (p = 0)."""
    result = RANDOM_KERNELS[fn](*args, **kwargs, key=state.key(op_index), tile=tile, global_sizes=sizes)
    return fn(*args, **kwargs) if result is NotImplemented else result


def draw(e: Emit, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], tile: Runs, sizes: list[int]) -> fx.Node:
    node = call.captured
    if node is None or node.rng_index is None:
        raise RuntimeError(f"[rewrite] {call.node.name} draws random numbers but has no index")
    return e(random_call, e.random, node.rng_index, node.fn, tile, sizes, args, kwargs)


@local(
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "randint",
    "randint_like", "uniform", "normal",
)  # fmt: skip
def elementwise(e: Emit, call: Call) -> fx.Node:
    node = call.captured
    if node is None:
        raise RuntimeError(f"[rewrite] {call.node.name} has no captured call")
    feed = iter(call.operands)
    args, kwargs = (substitute(tree, lambda _: next(feed)) for tree in (node.args, node.kwargs))
    return draw(e, call, args, kwargs, runs_of(call.results[0]), global_shape(call))


def global_shape(call: Call) -> list[int]:
    return list(call.program.graph.tensors[call.node.outputs[0]].shape)


def layer_dropout(state: CounterState, op_index: int, x: torch.Tensor, p: float, layer: int, tile: Runs, sizes: list[int]) -> torch.Tensor:
    """Dropout after recurrent layer `layer`: its masks are slice `layer` of one tensor [layers - 1, t, n, units]."""
    where = {"key": state.key(op_index), "tile": [[(layer, layer + 1)], *tile], "global_sizes": sizes}
    return random.dropout(x.unsqueeze(0), p, True, **where).squeeze(0)  # type: ignore[arg-type]


def seeded_call(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """What is opaque draws from global generators: seeded alike on all ranks, or replicas would drift apart."""

    def call(state: CounterState, *tensors: torch.Tensor) -> Any:
        with ModuleCall.lock, seeded(f"{state.seed} {state.call} {name}"):
            return fn(*tensors)

    return call


@local("opaque")
def opaque(e: Emit, call: Call) -> list[fx.Node]:
    node = call.captured
    if node is None or not isinstance(node.fn, ModuleCall) or not node.fn.random:
        return captured_call(e, call)
    return results_of(e, call, node, e(seeded_call(node.fn, call.node.name), e.random, *call.operands))


@local("layer_dropout")
def rnn_dropout(e: Emit, call: Call) -> fx.Node:
    node = call.captured
    if node is None or node.rng_index is None:
        raise RuntimeError(f"[rewrite] {call.node.name} draws random numbers but has no index")
    sizes = [int(call.attr("num_masks")), *global_shape(call)]
    return e(layer_dropout, e.random, node.rng_index, call.operands[0], float(call.attr("p")), int(call.attr("layer")), runs_of(call.results[0]), sizes)
