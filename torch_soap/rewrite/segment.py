"""A segment of a rank's program as an fx.GraphModule: inputs and outputs are the segment's local values."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import fx, nn

from torch_soap import _C
from torch_soap.capture.graph import Graph
from torch_soap.rewrite.local import Call, Emit, emit_local

for _family in ("basic", "window", "reduction", "lookup", "randomness"):
    importlib.import_module(f"torch_soap.rewrite.{_family}")

DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def make_call(program: _C.Program, rank_program: _C.RankProgram, item: _C.ComputeItem, graph: Graph, env: dict[int, fx.Node]) -> Call:
    node = program.graph.nodes[item.node]
    rule = program.rules[item.node]
    tensors = program.graph.tensors
    values = rank_program.values
    return Call(
        program=program,
        node=node,
        captured=graph.nodes[node.origin] if node.origin >= 0 else None,
        operands=[env[v] if v >= 0 else None for v in item.operands],
        sets={f.name: s for f, s in zip(rule.factors, item.sets, strict=True)},
        sizes={f.name: f.size for f in rule.factors},
        boxes=[values[v].box if v >= 0 else None for v in item.operands],
        results=[values[v].box for v in item.results],
        shapes=[list(values[v].shape) for v in item.results],
        dtypes=[DTYPES[tensors[t].dtype] for t in node.outputs],
    )


def identity(reduce: _C.Reduce, dtype: torch.dtype) -> float | int | bool:
    """The value that doesn't change a sum or a maximum."""
    if reduce != _C.Reduce.max:
        return 0
    if dtype == torch.bool:
        return False
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def build_segment(program: _C.Program, rank_program: _C.RankProgram, segment: _C.Segment, graph: Graph) -> fx.GraphModule:
    """One submodule: called with the tensors of `segment.inputs`, returns those of `segment.outputs`."""
    fx_graph = fx.Graph()
    e = Emit(fx_graph)
    env: dict[int, fx.Node] = {v: fx_graph.placeholder(f"v{v}") for v in segment.inputs}
    e.random = fx_graph.placeholder("random", default_value=None)
    for item in segment.items:
        call = make_call(program, rank_program, item, graph, env)
        if item.empty:
            rule = program.rules[item.node]
            results: list[Any] = [
                e(torch.full, shape, identity(result.reduce, dtype), dtype=dtype)
                for shape, dtype, result in zip(call.shapes, call.dtypes, rule.results, strict=True)
            ]
        else:
            results = emit_local(e, call)
        for made in reversed(fx_graph.nodes):  # for who times a step by operators
            if "soap_node" in made.meta or made.op == "placeholder":
                break
            made.meta["soap_node"] = item.node
        for value, result in zip(item.results, results, strict=True):
            env[value] = result
    fx_graph.output(tuple(env[v] for v in segment.outputs))
    return fx.GraphModule(nn.Module(), fx_graph)


def build_item(program: _C.Program, node_id: int, tile: int, chunk: int, graph: Graph) -> tuple[fx.GraphModule, list[list[int]], list[str], list[bool]]:
    """One tile of one operator by itself, to be timed: the submodule, and shape, dtype and need of a gradient of each input."""
    item = _C.compute_item(program, node_id, tile, chunk)
    fx_graph = fx.Graph()
    e = Emit(fx_graph)
    node, rule = program.graph.nodes[node_id], program.rules[node_id]
    tensors = program.graph.tensors
    present = {i: box for i, box in enumerate(item.operand_boxes) if box is not None}
    inputs = {i: fx_graph.placeholder(f"x{i}") for i in present}
    e.random = fx_graph.placeholder("random", default_value=None)
    call = Call(
        program=program,
        node=node,
        captured=graph.nodes[node.origin] if node.origin >= 0 else None,
        operands=[inputs.get(i) for i in range(len(node.inputs))],
        sets={f.name: s for f, s in zip(rule.factors, item.sets, strict=True)},
        sizes={f.name: f.size for f in rule.factors},
        boxes=list(item.operand_boxes),
        results=list(item.result_boxes),
        shapes=[[len(s) for s in box] for box in item.result_boxes],
        dtypes=[DTYPES[tensors[t].dtype] for t in node.outputs],
    )
    fx_graph.output(tuple(emit_local(e, call)))
    shapes = [[len(s) for s in box] for box in present.values()]
    values = [tensors[node.inputs[i]] for i in present]
    return fx.GraphModule(nn.Module(), fx_graph), shapes, [t.dtype for t in values], [t.requires_grad for t in values]
