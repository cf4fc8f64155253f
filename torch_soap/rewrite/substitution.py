"""A use of a substitution is computed both ways, forward and backward, before a plan may have it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from torch_soap import _C
from torch_soap.capture.graph import Graph
from torch_soap.rewrite.basic import own_part
from torch_soap.rewrite.segment import DTYPES, build_item

BOUND = 1e-10  # of a difference in float64, relative to the largest element
LARGEST = 1 << 24  # elements of one tensor of a sample
SEED = 5

Values = list[torch.Tensor | None]


def computed(graph: _C.OpGraph, captured: Graph, feeds: dict[str, torch.Tensor]) -> tuple[Values, Values]:
    """Results of a sample's graph on these feeds, and the gradients of the feeds that need one, by the local computations that a plan runs."""
    program = _C.lower(graph, _C.Strategy(1), [1])
    env: dict[int, torch.Tensor] = {}
    results: list[torch.Tensor] = []
    for node in program.graph.nodes:
        if node.kind == _C.NodeKind.feed:
            env[node.outputs[0]] = feeds[node.name]
        elif node.kind == _C.NodeKind.return_:
            results.append(env[node.inputs[0]])
        else:
            module = build_item(program, node.id, 0, 0, captured)[0]
            boxes = _C.compute_item(program, node.id, 0, 0).operand_boxes
            operands = [own_part(env[t], [list(s.runs) for s in box]) for t, box in zip(node.inputs, boxes, strict=True) if box is not None]
            env.update(zip(node.outputs, module(*operands), strict=True))
    wanted = [t for t in feeds.values() if t.requires_grad]
    reached = [r for r in results if r.requires_grad]
    grads: Sequence[torch.Tensor | None] = [None] * len(wanted)
    if reached and wanted:
        generator = torch.Generator().manual_seed(SEED)
        seeds = [torch.randn(r.shape, dtype=r.dtype, generator=generator) for r in reached]
        grads = torch.autograd.grad(reached, wanted, seeds, allow_unused=True)
    return [r.detach() for r in results], list(grads)


def feeds_of(graph: _C.OpGraph) -> dict[str, torch.Tensor]:
    """Random tensors for a sample's feeds."""
    generator = torch.Generator().manual_seed(SEED)
    feeds = {}
    for node in graph.nodes:
        if node.kind != _C.NodeKind.feed:
            continue
        tensor = graph.tensors[node.outputs[0]]
        dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
        if dtype.is_floating_point or dtype.is_complex:
            feeds[node.name] = torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(tensor.requires_grad)
        else:
            feeds[node.name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return feeds


def difference(source: torch.Tensor | None, target: torch.Tensor | None, bits: bool) -> str:
    """ "" where two tensors are the same, else what differs."""
    if source is None or target is None:
        other = target if source is None else source
        return "" if other is None or not bool((other != 0).any()) else "only one side has it"
    if source.shape != target.shape or source.dtype != target.dtype:
        return f"{source.dtype} {list(source.shape)} and {target.dtype} {list(target.shape)}"
    if torch.allclose(source, target, rtol=0, atol=0, equal_nan=True):
        return ""
    if bits or not source.is_floating_point():
        return "they aren't equal to the last bit"
    scale = float(source[torch.isfinite(source)].abs().max().clamp(min=1e-300)) if bool(torch.isfinite(source).any()) else 1.0
    if torch.allclose(source, target, rtol=0, atol=BOUND * scale, equal_nan=True):
        return ""
    return f"they differ by {float((source - target).abs().nan_to_num().max()) / scale:.1e} of the largest element"


def refusal(rewrite: _C.Rewrite, sample: _C.Sample, captured: Graph, table: list[_C.Substitution] | None = None) -> str:
    """Why a rewrite may not be used, "" where both sides compute the same on this sample."""
    substitution = _C.find_substitution(table or _C.substitutions(), rewrite.substitution)
    elements = max((torch.Size(t.shape).numel() for t in sample.source.tensors), default=0)
    if elements > LARGEST:
        return f"[rewrite] {rewrite}: not used, it can't be checked: its smallest sample has tensors of {elements} elements"
    feeds = feeds_of(sample.source)
    try:
        source, target = computed(sample.source, captured, feeds), computed(sample.target, captured, feeds)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"[rewrite] {rewrite}: not used, its check failed: {type(error).__name__}: {error}".splitlines()[0]
    for what, before, after in zip(("results", "gradients"), source, target, strict=True):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            if found := difference(a, b, substitution.bits):
                return f"[rewrite] {rewrite}: not used, {substitution.name} is wrong here: {what} {i} of both sides: {found}"
    return ""


class Checker:
    """What has been checked already, by signature."""

    def __init__(self, captured: Graph, table: list[_C.Substitution] | None = None) -> None:
        self.captured = captured
        self.table = table or _C.substitutions()
        self.known: dict[str, str] = {}

    def __call__(self, rewrite: _C.Rewrite, sample: _C.Sample) -> str:
        found = refusal(rewrite, sample, self.captured, self.table)
        if found:
            warnings.warn(found, stacklevel=2)
        return found

    def check(self, graph: _C.OpGraph, rewrites: Sequence[_C.Rewrite]) -> None:
        """Checks rewrites that somebody has written, each on the graph that the ones before leave.

        Raises:
            ValueError: one of them doesn't compute the same.
        """
        for rewrite in rewrites:
            key = _C.signature(graph, rewrite, self.table)
            if key not in self.known:
                self.known[key] = refusal(rewrite, _C.sample_of(graph, rewrite, self.table), self.captured, self.table)
            if self.known[key]:
                raise ValueError(self.known[key])
            graph = _C.rewritten(graph, [rewrite], self.table)
