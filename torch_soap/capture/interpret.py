"""Runs a captured graph in one process: what the capture is checked with, and the reference for every plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from torch_soap.capture.graph import Graph, Node, substitute
from torch_soap.capture.opaque import ModuleCall
from torch_soap.random import CounterState
from torch_soap.random import dropout as counter_dropout
from torch_soap.random_ops import RANDOM_KERNELS


def region(node: Node) -> contextlib.AbstractContextManager[Any]:
    """The autocast and no_grad region that the node was captured in."""
    stack = contextlib.ExitStack()
    if node.no_grad:
        stack.enter_context(torch.no_grad())
    if node.autocast is not None:
        device, dtype, enabled = node.autocast
        stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
    return stack


def call(node: Node, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], random: CounterState | None) -> Any:
    if random is None or node.rng_index is None:
        return fn(*args, **kwargs)
    key = random.key(node.rng_index)
    if node.target == "layer_dropout":
        x, p, layer, num_masks = args
        where = {"key": key, "tile": [[(layer, layer + 1)], *([(0, n)] for n in x.shape)], "global_sizes": [num_masks, *x.shape]}
        return counter_dropout(x.unsqueeze(0), p, True, **where).squeeze(0)  # type: ignore[arg-type]
    kernel = RANDOM_KERNELS.get(fn)
    result = NotImplemented if kernel is None else kernel(*args, **kwargs, key=key)
    return fn(*args, **kwargs) if result is NotImplemented else result


def run_graph(
    graph: Graph, tensors: dict[str, torch.Tensor], random: CounterState | None = None, split_opaque: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Computes the graph.

    Args:
        tensors: by node name, for every param, buffer, const and feed.
        random: what random operators draw from; default: torch's generator.
        split_opaque: opaque modules compute their rows in two parts.

    Returns:
        The returned tensors in order, and the new values of written buffers by name.
    """
    env: dict[int, torch.Tensor] = {}
    outputs: list[torch.Tensor] = []
    writes: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.kind == "return":
            value = env[node.inputs[0]]
            if node.target == "buffer_write":
                writes[node.qualname] = value.detach()
            else:
                outputs.append(value)
        elif node.kind != "op":
            env[node.outputs[0]] = tensors[node.name]
        else:
            fn = node.fn
            if fn is None:
                raise RuntimeError(f"[capture] operator {node.name} has nothing to call")
            if split_opaque and isinstance(fn, ModuleCall):
                fn = fn.in_two_parts
            with region(node):
                result = call(node, fn, substitute(node.args, env.__getitem__), substitute(node.kwargs, env.__getitem__), random)
            results = list(result) if isinstance(result, list | tuple) else [result]
            for output, tensor in zip(node.outputs, results, strict=True):
                env[output] = tensor
    return outputs, writes
