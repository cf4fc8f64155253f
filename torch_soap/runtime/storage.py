"""Where parameters and buffers live: which box of each this rank stores, cutting it out, and putting wholes together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from torch_soap import _C
from torch_soap.runtime.movement import index_of, put, take


def stored_boxes(program: _C.Program, rank: int) -> dict[str, list[_C.IndexSet] | None]:
    """By node name of each param, buffer and const: the box that the rank stores, None when it stores nothing."""
    kinds = (_C.NodeKind.param, _C.NodeKind.buffer, _C.NodeKind.const)
    out: dict[str, list[_C.IndexSet] | None] = {}
    for node in program.graph.nodes:
        if node.kind in kinds:
            coords = program.tiles[node.outputs[0]].coords
            out[node.name] = next((c.box for c in coords if rank in c.devices), None)
    return out


def cut(full: torch.Tensor, box: list[_C.IndexSet] | None) -> torch.Tensor:
    """The stored part of a whole tensor; an empty tensor when nothing is stored. Shares storage where it is contiguous."""
    if box is None:
        return full.new_empty((0, *full.shape[1:]))
    return take(full, index_of(box, list(full.shape)))


def assemble(shape: Sequence[int], parts: Sequence[tuple[list[_C.IndexSet] | None, torch.Tensor]]) -> torch.Tensor:
    """The whole tensor from the parts that ranks store; replicas may repeat."""
    out = torch.empty(tuple(shape), dtype=parts[0][1].dtype)
    for box, tensor in parts:
        if box is not None:
            put(out, index_of(box, list(shape)), tensor.detach())
    return out


def materialise(module: nn.Module, boxes: Mapping[str, list[_C.IndexSet] | None]) -> int:
    """Gives parameters and buffers of the meta device memory for this rank's parts (`boxes`, by name) only, unset. How many parameters there were."""
    made: dict[int, nn.Parameter] = {}
    for prefix, child in module.named_modules():
        for name, p in list(child._parameters.items()):
            if p is not None and p.is_meta:
                full = f"{prefix}.{name}".removeprefix(".")
                canonical = next((n for n, q in module.named_parameters() if q is p), full)
                box = boxes.get(canonical)
                shape = [len(s) for s in box] if box is not None else [0, *p.shape[1:]] if canonical in boxes else list(p.shape)
                child._parameters[name] = made.setdefault(id(p), nn.Parameter(torch.empty(shape, dtype=p.dtype), requires_grad=p.requires_grad))
        for name, b in list(child._buffers.items()):
            if b is not None and b.is_meta:
                child._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return len(made)
