"""Tensors above the sizes from which large ones are treated in their own way: as exact as small ones."""

from __future__ import annotations

import pytest
import torch

from tests.large_models import CASES, DEVICES, KIB, LargeCase, border_bytes
from torch_soap.capture import capture
from torch_soap.plan import as_plan, lower
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.verify import even_rows, verify_captured


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.model}-{c.plan}")
def test_large_tensors_are_exact(case: LargeCase) -> None:
    torch.set_num_threads(1)
    example = case.example()
    text = case.text(example)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in example.inputs)
    captured = capture(example.module.double(), inputs, {}, loss=example.loss)
    graph = to_op_graph(captured.instantiate(captured._signature_of(captured.inputs)))
    program = lower(graph, as_plan(text, graph, DEVICES), even_rows(len(inputs[0]), DEVICES))
    sizes = [s for rank in range(DEVICES) for s in border_bytes(program, rank)]
    parameters = [p.numel() * p.element_size() for p in example.module.parameters()]
    for of in (sizes, parameters) if case.plan == "megatron" else (parameters,):  # under DDP a model can be one segment
        assert any(256 * KIB <= s < 1024 * KIB for s in of) and max(of) > 1024 * KIB, "the case has lost its large tensors"
    report = verify_captured(captured, text, steps=2, dtype=torch.float64, world_size=DEVICES)
    assert report.ok, str(report)
