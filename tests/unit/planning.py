"""Helpers of planner tests: graphs of small modules, lowered plans, what moves in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torch_soap import _C
from torch_soap.capture import Captured, capture
from torch_soap.rewrite.graph_import import to_op_graph


def graph_of(module: nn.Module, *inputs: torch.Tensor, loss: Callable[..., Any] | None = None) -> _C.OpGraph:
    return op_graph(capture(module, inputs, {}, loss=loss))


def op_graph(captured: Captured) -> _C.OpGraph:
    return to_op_graph(captured.instantiate(captured._signature_of([captured.leaves[i] for i in captured.tensor_slots])))


def lowered(graph: _C.OpGraph, text: str, rows: Sequence[int]) -> _C.Program:
    return _C.lower(graph, _C.parse_plan(graph, text, len(rows)), list(rows))


def movements(program: _C.Program, only: Callable[[str], bool] = lambda name: True) -> list[tuple[str, str, str, int]]:
    """(step kind, producer's name, pattern, elements) of every item that crosses devices, in order."""
    out = []
    for step in program.steps:
        if step.kind in (_C.StepKind.compute, _C.StepKind.compute_backward):
            continue
        for item in step.items:
            m = program.movement(step.kind, item)
            tensor = program.graph.tensors[program.groups[item.id].tensor]
            name = program.graph.nodes[tensor.producer].name
            if m.pattern != _C.Pattern.local and only(name):
                out.append((step.kind.name, name, m.pattern.name, m.elements))
    return out


def patterns(program: _C.Program, only: Callable[[str], bool] = lambda name: True) -> Counter[str]:
    return Counter(f"{kind} {pattern}" for kind, _, pattern, _ in movements(program, only))


def node(graph: _C.OpGraph, name: str) -> _C.Node:
    return next(n for n in graph.nodes if n.name == name)


def rule(graph: _C.OpGraph, name: str, world_size: int = 4) -> _C.Rule:
    return _C.make_rule(graph, node(graph, name), world_size)


def copies(program: _C.Program, producer: str, consumer_group: int = 0) -> list[tuple[list[str], list[int]]]:
    """(box as text per dim, devices) of each copy of a node's first result, for its n-th group of readers."""
    tensor = node(program.graph, producer).outputs[0]
    groups = [g for g in program.groups if g.tensor == tensor]
    return [([str(s) for s in c.box], list(c.devices)) for c in groups[consumer_group].copies.coords]


def p100(devices: int, hosts: int = 1) -> _C.Machine:
    """OptCNN's testbed: P100s (NVIDIA's data sheet: 9.3 TFLOP/s in float32, 732 GB/s, 16 GB) joined by NVLink of 20 GB/s, hosts by 100 Gb/s."""
    machine = _C.Machine(devices, hosts)
    machine.name = "p100"
    machine.flops_per_s, machine.memory_bytes_per_s, machine.memory_bytes = 9.3e12, 732e9, 16 << 30
    machine.op_overhead_ns = 10e3
    machine.intra, machine.inter = _C.Link(10e3, 20e9), _C.Link(20e3, 12.5e9)
    return machine
