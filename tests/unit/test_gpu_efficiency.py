"""What benchmarks/gpu_efficiency.py counts is what the simulator counts (csrc/cost/work.h); what its table makes of times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_efficiency import Case, bytes_of, cases, made
from benchmarks.gpu_table import curves, efficiencies, parts, preset_of
from torch_soap import _C, Machine
from torch_soap.capture import capture
from torch_soap.rewrite.graph_import import to_op_graph

# One of each way to count; a loss is several operators to us.
PICKED = ["AlexNet 64-192", "VGG-16 64x25088", "GPT-2 8x12/12", "BERT", "Llama 8B 1x32/8 heads, 2048", "batch norm 64x256", "RMS norm", "gelu", "add", "LSTM"]
PICKED += ["embedding 50257", "max pool", "halves joined"]


def picked() -> list[Case]:
    found = [next(c for c in cases() if c.name.startswith(p)) for p in PICKED]
    assert {c.family for c in found} == {c.family for c in cases()} == set(_C.OP_FAMILIES)
    return found


@pytest.mark.parametrize("case", picked(), ids=lambda c: c.name)
def test_operations_and_bytes_are_counted_as_the_simulator_does(case: Case) -> None:
    kind = case.types[-1]
    module, tensors = made(case, kind, "meta")
    captured = capture(module, tuple(t.detach() for t in tensors), {}, check=False)
    graph = to_op_graph(captured.instantiate(captured.inputs))
    program = _C.lower(graph, _C.parse_plan(graph, "* @ [0]", 1), [tensors[0].shape[0]])
    works = [_C.work_of(program, n.id) for n in program.graph.nodes if n.kind == _C.NodeKind.op]
    mine = [w for w in works if w.family == case.family and w.num_bytes > 0]
    if case.flops:
        assert sum(w.flops for w in mine) == pytest.approx(case.flops, rel=0.01)
    with torch.no_grad():
        counted = bytes_of(case, module, tensors, module(*tensors))
    assert sum(w.num_bytes for w in mine) == pytest.approx(counted, rel=0.05)


def operator(family: str, kind: str, forward: float, both: float) -> dict[str, object]:
    return {"family": family, "type": kind, "flops": 67e9, "bytes": 1, "forward": {"s": forward}, "both": {"s": both}}


def test_parts_of_the_peak_by_hand() -> None:
    """67 GFLOP take an H100 1 ms in float32, and a recurrent layer or a convolution, which take TF32, less."""
    machine = preset_of("NVIDIA H100 80GB HBM3")
    assert parts(machine, operator("matmul", "float32", 2e-3, 4e-3)) == pytest.approx((0.5, 0.75))
    assert parts(machine, operator("convolution", "float32", 2e-3, 4e-3))[0] == pytest.approx(0.5 * 67 / 494.7)
    found = [operator("matmul", "float32", 2e-3, t) for t in (3e-3, 6e-3, 12e-3)] + [operator("convolution", "float32", 1, 1)]
    table = efficiencies(machine, [*found, operator("convolution", "tf32", 1, 1)])
    assert table["matmul"] == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(4.0), 3)
    assert table["convolution"][3] == 1


def test_curves_of_a_preset_are_what_was_measured() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_shapes_h100_2026-11-26.json"
    machine = Machine.preset("h100")
    found = curves(machine, json.loads(path.read_text()))
    assert set(found) == {key for key in machine.curves if "bfloat16" in key}
    for key, points in found.items():
        for type_name in ("bfloat16", "float16"):
            written = machine.curves[key.replace("bfloat16", type_name)]
            assert [p[0] for p in written] == [p[0] for p in points]
            assert [list(p[1:]) for p in written] == [pytest.approx(p[1:], abs=0.0051) for p in points]


def test_a_curve_by_hand() -> None:
    """989.4 GFLOP take an H100 1 ms in bfloat16: a product with 2 ms forward and 4 more with backward reaches half of it both ways."""
    product = {"curve": "matmul", "rows": 512, "in": 1024, "out": 4096, "flops": 989.4e9, "bytes": 1}
    operators = [product | {"forward": {"s": t}, "both": {"s": 3 * t}} for t in (2e-3, 1e-3, 8e-3)]
    assert curves(Machine.preset("h100"), {"operators": operators}) == {"matmul/bfloat16": [(512, pytest.approx(0.5), pytest.approx(0.5))]}
