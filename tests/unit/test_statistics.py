"""Batch norm in parts: its three functions against torch's batch norm of the whole, and what a plan moves for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.unit.planning import graph_of, lowered, node, patterns
from torch_soap import _C
from torch_soap.statistics import channel_moments, channel_normalize, merge_moments


def in_parts(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, rows: Sequence[int], eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = x.split(list(rows))
    moments = torch.stack([channel_moments(part) for part in parts])
    merged, mean, var = merge_moments(moments, tuple(part.numel() // part.shape[1] for part in parts))
    return torch.cat([channel_normalize(part, merged, weight, bias, eps) for part in parts if part.numel()]), mean, var


def worst(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).detach().abs().max() / b.detach().abs().max().clamp(1e-2)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 4, 5), (8, 3, 2, 3, 2)])
@pytest.mark.parametrize("rows", [(8,), (5, 3), (1, 0, 4, 3), (1,) * 8])
@pytest.mark.parametrize("affine", [True, False])
def test_parts_are_the_whole(shape: tuple[int, ...], rows: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)) if affine else (None, None)
    mean, var, cotangent = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    wanted = F.batch_norm(x, mean, var, weight, bias, True, 1.0, 1e-3)
    found, own_mean, own_var = in_parts(x, weight, bias, rows, 1e-3)
    assert worst((found, own_mean, own_var), (wanted, mean, var)) < 1e-13
    leaves = [t for t in (x, weight, bias) if t is not None]
    assert worst(torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent)) < 1e-12


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    x, weight, bias = torch.randn(4, 3), torch.rand(3), torch.rand(3)
    given = {"x": x, "weight": weight, "bias": bias}
    leaves = [t.requires_grad_() for name, t in given.items() if name != frozen]
    found, wanted = in_parts(x, weight, bias, (1, 3), 1e-3)[0], F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-3)
    cotangent = torch.randn(4, 3)
    assert worst(torch.autograd.grad(found, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent)) < 1e-5
    assert given[frozen].grad is None


def test_float32_keeps_its_digits_far_from_zero() -> None:
    """The sum of squares less the square of the sum would have none left: 4096 squared is 2^24."""
    torch.manual_seed(0)
    x = 4096 + torch.randn(64, 4, 8, 8)
    _, mean, var = in_parts(x, None, None, (40, 20, 4), 1e-5)
    wanted = torch.var_mean(x.double(), [0, 2, 3])
    assert worst((var, mean), wanted) < 1e-4


def module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("plan", ["* n=fed", "1 n=2\n* n=fed", "1 h=[0,3,8]\n* n=fed", "1 n=[0,1,8]\n* n=fed", "1 n=2 h=2\n* n=fed"])
def test_one_message_each_way(plan: str) -> None:
    program = lowered(graph_of(module(), torch.randn(8, 2, 8, 8)), plan, [3, 2, 1, 2] if "h=2" in plan else [5, 3])
    assert patterns(program, lambda name: name in ("1/moments", "1/merge")) == {"fill exchange": 1, "grad_fill all_reduce": 1}


def test_parts_of_several_dims() -> None:
    program = lowered(graph_of(module(), torch.randn(8, 2, 8, 8)), "1 n=[0,1,8] h=[0,3,8]\n* n=fed", [3, 2, 1, 2])
    moments = node(program.graph, "1/moments")
    assert program.graph.tensors[moments.outputs[0]].shape == [2, 2, 2, 4]
    assert node(program.graph, "1/merge").attrs["counts"] == [1 * 3 * 8, 1 * 5 * 8, 7 * 3 * 8, 7 * 5 * 8]


def test_uncut_it_is_one_operator() -> None:
    program = lowered(graph_of(module(), torch.randn(8, 2, 8, 8)), "* n=1", [8])
    names = [n.name for n in program.graph.nodes if n.name.startswith("1") and n.kind == _C.NodeKind.op]
    assert names == ["1/add", "1", "1/running_average", "1/running_average.1"]


def test_running_averages_are_one_segment_at_the_end() -> None:
    layers = [m for _ in range(3) for m in (nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())]
    program = lowered(graph_of(nn.Sequential(*layers), torch.randn(8, 2, 8, 8)), "* n=fed", [4, 4])
    for rank in range(2):
        segments = _C.project(program, rank).segments
        targets = [{program.graph.nodes[item.node].target for item in s.items} for s in segments]
        assert [i for i, t in enumerate(targets) if "running_average" in t] == [len(segments) - 1]
        assert targets[-1] <= {"running_average", "add"} and len(segments[-1].items) == 9
