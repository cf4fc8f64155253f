"""Runs a captured graph in one process: what the capture is checked with, and the reference for every plan."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from torch_soap.capture.graph import Graph, Node, substitute


def region(node: Node) -> contextlib.AbstractContextManager[Any]:
    """The autocast and no_grad region that the node was captured in."""
    stack = contextlib.ExitStack()
    if node.no_grad:
        stack.enter_context(torch.no_grad())
    if node.autocast is not None:
        device, dtype, enabled = node.autocast
        stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
    return stack


def run_graph(graph: Graph, tensors: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Computes the graph.

    Args:
        tensors: by node name, for every param, buffer, const and feed.

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
            with region(node):
                result = fn(*substitute(node.args, env.__getitem__), **substitute(node.kwargs, env.__getitem__))
            results = list(result) if isinstance(result, list | tuple) else [result]
            for value, tensor in zip(node.outputs, results, strict=True):
                env[value] = tensor
    return outputs, writes
