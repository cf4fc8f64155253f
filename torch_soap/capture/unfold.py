"""The importer's side of folding: what a repeated module's operator stands for are the first one's nodes, with other values and paths."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from torch_soap.capture.graph import Ref, substitute
from torch_soap.capture.observe import CannotFold

if TYPE_CHECKING:
    from torch_soap.capture.importer import Importer


@dataclass
class Region:
    """The nodes of a first module: those in [begin, end) of the graph.

    Attributes:
        operands: values of its inputs, parameters and buffers, and of what it reads besides, with their tensors.
        results: of its outputs: handle, tensor of the present value.
    """

    path: str
    begin: int
    first_value: int
    first_random: int
    modes: tuple[Any, ...]
    before: set[int]
    writes: int
    operands: list[torch.Tensor]
    end: int = 0
    num_values: int = 0
    num_random: int = 0
    results: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def enter(importer: Importer, path: str, inputs: list[torch.Tensor]) -> Region:
    operands = present(importer, [*stored(importer, path), *inputs])
    graph, aliases = importer.graph, importer.aliases
    modes = (importer.no_grad, importer.autocast)
    return Region(path, len(graph.nodes), len(graph.values), importer.num_random, modes, set(aliases.handles), len(aliases.written), operands)


def leave(importer: Importer, region: Region, outputs: list[torch.Tensor], outer: list[torch.Tensor]) -> Region:
    """Raises CannotFold where the region does more than compute outputs from operands."""
    graph, aliases = importer.graph, importer.aliases
    region.results = list(zip(outputs, present(importer, outputs), strict=True))
    region.operands += present(importer, outer)
    region.end, region.num_values, region.num_random = len(graph.nodes), len(graph.values) - region.first_value, importer.num_random - region.first_random
    if any(handle in region.before for handle in aliases.written[region.writes :]):
        raise CannotFold("it writes tensors that it was given")
    if region.modes != (importer.no_grad, importer.autocast):
        raise CannotFold("it changes modes")
    region.before = set()
    known = {importer.ids[id(t)] for t in region.operands}
    for node in graph.nodes[region.begin : region.end]:
        if node.kind != "op" or node.target == "opaque":
            raise CannotFold("something opaque in it")
        if not all(v >= region.first_value or v in known for v in node.inputs):
            raise CannotFold("it reads a tensor that it wasn't given")
    if any(importer.ids[id(t)] < region.first_value for _, t in region.results):
        raise CannotFold("it returns a tensor that it was given")
    return region


def again(importer: Importer, region: Region, path: str, inputs: list[torch.Tensor], outer: list[torch.Tensor]) -> list[torch.Tensor]:
    """The region's nodes once more: handles of their outputs."""
    graph, ids = importer.graph, importer.ids
    if region.modes != (importer.no_grad, importer.autocast):
        raise CannotFold("its copies have other modes")
    values: dict[int, int] = {}
    for mine, other in zip(region.operands, present(importer, [*stored(importer, path), *inputs, *outer]), strict=True):
        if look(mine) != look(other):
            raise CannotFold("its copies have other operands")
        if values.setdefault(ids[id(mine)], ids[id(other)]) != ids[id(other)]:
            raise CannotFold("operands that are one tensor in one of its copies only")
    moved, drawn = len(graph.values) - region.first_value, importer.num_random - region.first_random
    for old in graph.values[region.first_value : region.first_value + region.num_values]:
        graph.values.append(dataclasses.replace(old, id=old.id + moved))

    def value(old: int) -> int:
        return old + moved if old >= region.first_value else values[old]

    def ref(old: int) -> Ref:
        return Ref(value(old))

    for node in graph.nodes[region.begin : region.end]:
        inside = node.module_path == region.path or node.module_path.startswith(region.path + ".")
        graph.nodes.append(
            dataclasses.replace(
                node,
                args=substitute(node.args, ref),
                kwargs=substitute(node.kwargs, ref),
                arg_names=substitute(node.arg_names, ref),
                inputs=tuple(map(value, node.inputs)),
                outputs=tuple(map(value, node.outputs)),
                module_path=path + node.module_path.removeprefix(region.path) if inside else node.module_path,
                rng_index=None if node.rng_index is None else node.rng_index + drawn,
            )
        )
    importer.num_random += region.num_random
    return [importer.aliases.sealed(twin(importer, handle), twin(importer, now), value(ids[id(now)]), handle is now) for handle, now in region.results]


def stored(importer: Importer, path: str) -> list[torch.Tensor]:
    """Handles of the parameters and buffers in a module: for copies in the same order."""
    return [handle for _, handle in sorted(importer.stored[path].items())]


def present(importer: Importer, handles: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their present values, as long as no operator is needed to have them."""
    nodes = len(importer.graph.nodes)
    values = [importer.aliases.read(h) for h in handles]
    if len(importer.graph.nodes) != nodes:
        raise CannotFold("a view of what was written since")
    return values


def look(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


def twin(importer: Importer, tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(importer.mode, made, tensor.device).requires_grad_(tensor.requires_grad)
