"""Local computations of reductions, softmax and normalisation pieces, and losses: sums are shares of the global sum."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from torch_soap import statistics
from torch_soap.rewrite.basic import first
from torch_soap.rewrite.local import Call, Emit, captured_call, local


def dims_of(call: Call) -> list[int]:
    dims = call.attr("dim")
    rank = len(call.global_shape(call.node.operand_names[0]))
    if isinstance(dims, int):
        dims = [dims]
    return [d % rank for d in dims] if dims else list(range(rank))


def summed(e: Emit, call: Call, dtype: torch.dtype) -> fx.Node:
    dims = dims_of(call)
    if not dims:
        return e(torch.Tensor.to, first(call), dtype)
    return e(torch.sum, first(call), dims, bool(call.attr("keepdim", False)), dtype=dtype)


@local("sum")
def total(e: Emit, call: Call) -> fx.Node:
    return summed(e, call, call.dtypes[0])


@local("mean")
def mean(e: Emit, call: Call) -> fx.Node:
    """This tile's share: its sum over the *global* count."""
    shape = call.global_shape(call.node.operand_names[0])
    count = math.prod(shape[d] for d in dims_of(call))
    dtype = torch.promote_types(call.dtypes[0], torch.float32)  # a sum of float16 may be beyond its range
    return e(torch.Tensor.to, e(torch.mul, summed(e, call, dtype), 1.0 / count if count else math.nan), call.dtypes[0])


@local("max_shift")
def max_shift(e: Emit, call: Call) -> fx.Node:
    return e(torch.amax, e(torch.Tensor.detach, first(call)), dims_of(call), bool(call.attr("keepdim", False)))


@local("to")
def to(e: Emit, call: Call) -> fx.Node:
    return e(torch.Tensor.to, first(call), call.dtypes[0])


@local("exp_shifted")
def exp_shifted(e: Emit, call: Call) -> fx.Node:
    return e(torch.exp, e(torch.sub, call.operands[0], call.operands[1]))


@local("log_shifted")
def log_shifted(e: Emit, call: Call) -> fx.Node:
    return e(torch.sub, e(torch.sub, call.operands[0], call.operands[1]), e(torch.log, call.operands[2]))


@local("scale")
def scale(e: Emit, call: Call) -> fx.Node:
    return e(torch.mul, first(call), float(call.attr("by")))


@local("normalize")
def normalize(e: Emit, call: Call) -> fx.Node:
    x, squares = call.operands[0], call.operands[1]
    variance = e(torch.mul, squares, 1.0 / int(call.attr("count")))
    y = e(torch.mul, x, e(torch.rsqrt, e(torch.add, variance, float(call.attr("eps")))))
    rank = len(call.shapes[0])
    dims = list(call.attr("weight_dims", []))
    shape = [call.shapes[0][d] if d in dims else 1 for d in range(rank)]
    for name, fn in (("weight", torch.mul), ("bias", torch.add)):
        operand = call.operand(name)
        if operand is not None:
            y = e(fn, y, e(torch.reshape, operand, shape))
    return y


@local("channel_moments")
def channel_moments(e: Emit, call: Call) -> fx.Node:
    return e(torch.reshape, e(statistics.channel_moments, first(call)), call.shapes[0])


@local("merge_moments")
def merge_moments(e: Emit, call: Call) -> list[fx.Node]:
    made = e(statistics.merge_moments, first(call), tuple(call.attr("counts")))
    return [e(operator.getitem, made, i) for i in range(len(call.shapes))]


@local("channel_normalize")
def channel_normalize(e: Emit, call: Call) -> fx.Node:
    return e(statistics.channel_normalize, *call.operands[:2], call.operand("weight"), call.operand("bias"), float(call.attr("eps")))


@local("group_norm")
def group_norm(e: Emit, call: Call) -> fx.Node:
    return e(F.group_norm, first(call), len(call.sets["g"]), call.operand("weight"), call.operand("bias"), float(call.attr("eps", 1e-5)))


@local("layer_norm", "rms_norm")
def layer_norm(e: Emit, call: Call) -> fx.Node:
    shape = list(call.attr("normalized_shape"))
    eps = call.attr("eps")
    if call.node.target == "rms_norm":
        return e(F.rms_norm, call.operand("input"), shape, call.operand("weight"), eps)
    return e(F.layer_norm, call.operand("input"), shape, call.operand("weight"), call.operand("bias"), 1e-5 if eps is None else float(eps))


@local("ce_count")
def ce_count(e: Emit, call: Call) -> fx.Node:
    return captured_call(e, call)[0]


def pick_logit(shifted: torch.Tensor, target: torch.Tensor, runs: list[tuple[int, int]], dim: int) -> torch.Tensor:
    """shifted[target] where the target lies in one of the runs of classes that are here, else 0."""
    index, here, first = torch.zeros_like(target), torch.zeros_like(target, dtype=torch.bool), 0
    for begin, end in runs:
        inside = (target >= begin) & (target < end)
        index = torch.where(inside, target - (begin - first), index)
        here = here | inside
        first += end - begin
    picked = shifted.gather(dim, index.unsqueeze(dim)).squeeze(dim)
    return torch.where(here, picked, torch.zeros_like(picked))


def join_rows(total_exp: torch.Tensor, picked: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    rows = total_exp.log() - picked
    return torch.where(target == ignore_index, torch.zeros_like(rows), rows)


@local("ce_pick")
def ce_pick(e: Emit, call: Call) -> fx.Node:
    dim = 0 if len(call.global_shape("input")) == 1 else 1
    return e(pick_logit, call.operand("input"), call.operand("target"), list(call.sets["v"].runs), dim)


@local("ce_join")
def ce_join(e: Emit, call: Call) -> fx.Node:
    return e(join_rows, call.operand("sum"), call.operand("picked"), call.operand("target"), int(call.attr("ignore_index", -100)))


def synthetic(fn: Any) -> Any:
    """Pointwise sub-operators of expansions have no captured call; captured ones keep theirs."""

    def compute(e: Emit, call: Call) -> fx.Node:
        return captured_call(e, call)[0] if call.captured is not None else e(fn, *call.operands)

    return compute


for _name, _fn in {"sub": torch.sub, "square": torch.square, "exp": torch.exp, "div": torch.div}.items():
    local(_name)(synthetic(_fn))
