"""Local computations of views, creation and matrix products."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx

from torch_soap.rewrite.local import Call, Emit, captured_call, local


def first(call: Call) -> fx.Node:
    operand = call.operands[0]
    if operand is None:
        raise RuntimeError(f"[rewrite] {call.node.name}: operand 0 isn't there")
    return operand


@local("view")
def view(e: Emit, call: Call) -> fx.Node:
    return e(torch.reshape, first(call), call.shapes[0])


@local("expand")
def expand(e: Emit, call: Call) -> fx.Node:
    return e(torch.Tensor.expand, first(call), call.shapes[0])


@local("narrow", "slice", "flip")
def moved(e: Emit, call: Call) -> fx.Node:
    """The operand's box is the result's: its index map has done the work, as far as order is kept."""
    dims = call.attr("dims", [])
    if call.node.target == "flip":
        return e(torch.flip, first(call), list(dims))
    return first(call)


@local("cat")
def cat(e: Emit, call: Call) -> fx.Node:
    return e(torch.cat, list(call.operands), int(call.attr("dim", 0)))


@local("split")
def split(e: Emit, call: Call) -> list[fx.Node]:
    """All parts of one call: its gradient is one concatenation."""
    dim = int(call.attr("dim", 0))
    parts = e(torch.split, first(call), [shape[dim] for shape in call.shapes], dim)
    return [e(operator.getitem, parts, i) for i in range(len(call.shapes))]


@local("permute")
def permute(e: Emit, call: Call) -> fx.Node:
    return e(torch.permute, first(call), list(call.attr("dims")))


@local("full")
def full(e: Emit, call: Call) -> fx.Node:
    return e(torch.full, call.shapes[0], call.attr("fill_value"), dtype=call.dtypes[0])


def own_part(whole: torch.Tensor, boxes: list[list[tuple[int, int]]]) -> torch.Tensor:
    """The indices `boxes` (runs for each dim) of a tensor."""
    for dim, runs in enumerate(boxes):
        parts = [whole.narrow(dim, begin, end - begin) for begin, end in runs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return whole


@local("arange", "eye", "linspace")
def created(e: Emit, call: Call) -> fx.Node:
    """Made whole, which costs nothing next to what reads it, so that every element is torch's own to the last bit."""
    return e(own_part, captured_call(e, call)[0], [list(s.runs) for s in call.results[0]])


@local("cdist")
def distances(e: Emit, call: Call) -> fx.Node:
    """With the formula (products, or differences) that torch takes for the *global* numbers of rows: they differ by more than rounding."""
    mode = call.attr("compute_mode") or 0
    if mode == 0:
        rows = [call.global_shape(name)[-2] for name in call.node.operand_names]
        mode = 1 if max(rows) > 25 else 2
    return e(torch.ops.aten.cdist.default, call.operands[0], call.operands[1], float(call.attr("p", 2.0)), mode)


def linear_in_order(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Torch adds the bias apart, to a second result, where more than rows and columns come transposed; the copy in order it makes either way."""
    return F.linear(x if x.dim() < 3 else x.contiguous(), weight, bias)


@local("linear")
def linear(e: Emit, call: Call) -> fx.Node:
    return e(linear_in_order, call.operand("input"), call.operand("weight"), call.operand("bias"))


@local("addmm", "baddbmm")
def addmm(e: Emit, call: Call) -> fx.Node:
    bias, a, b = call.operands
    product = e(torch.matmul, a, b)
    alpha, beta = call.attr("alpha", 1), call.attr("beta", 1)
    if alpha != 1:
        product = e(torch.mul, product, alpha)
    if bias is None or beta == 0:
        return product
    return e(torch.add, product, e(torch.mul, bias, beta) if beta != 1 else bias)


@local("matmul", "mm", "bmm", "mv", "dot")
def matmul(e: Emit, call: Call) -> fx.Node:
    return e(torch.matmul, call.operands[0], call.operands[1])
