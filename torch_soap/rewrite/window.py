"""Local computations of convolutions, pools and interpolation: global padding only at global borders."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from torch_soap.rewrite.basic import first
from torch_soap.rewrite.local import Call, Emit, captured_call, local

SPATIAL = {1: ("l",), 2: ("h", "w"), 3: ("d", "h", "w")}


def ints(value: Any, n: int, default: int) -> list[int]:
    """A list argument of length n; one value is repeated."""
    if value is None or value == []:
        return [default] * n
    if isinstance(value, int):
        return [value] * n
    return list(value) * n if len(value) == 1 else list(value)


def spatial_dims(target: str) -> int:
    return next(n for n in (1, 2, 3) if f"{n}d" in target)


def border(out: tuple[int, int], stride: int, pad: int, dilation: int, kernel: int, box: Any) -> tuple[int, int]:
    """Rows to add before and after the tile's input rows: those of its windows that lie outside the input."""
    low = out[0] * stride - pad
    high = (out[1] - 1) * stride - pad + dilation * (kernel - 1) + 1
    before = min(max(-low, 0), high - low)
    return before, high - low - before - len(box)


def padded(e: Emit, x: fx.Node, borders: list[tuple[int, int]], value: float) -> fx.Node:
    if all(b == (0, 0) for b in borders):
        return x
    amounts = [n for b in reversed(borders) for n in b]
    return e(F.pad, x, amounts, "constant", value)


@local("conv1d", "conv2d", "conv3d")
def conv(e: Emit, call: Call) -> fx.Node:
    n = spatial_dims(call.node.target)
    kernel = call.global_shape("weight")[2:]
    stride, dilation = ints(call.attr("stride"), n, 1), ints(call.attr("dilation"), n, 1)
    padding = call.attr("padding", 0)
    if padding == "same":
        pads = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    else:
        pads = [0] * n if padding == "valid" else ints(padding, n, 0)
    boxes = call.box("input")[-n:]
    borders = [border(call.interval(name), s, p, d, k, box) for name, s, p, d, k, box in zip(SPATIAL[n], stride, pads, dilation, kernel, boxes, strict=True)]
    fn = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    groups = int(call.attr("groups", 1))
    if groups > 1:
        groups = len(call.sets["g"])
    x, own = call.operand("input"), [0] * n
    if all(a == b for a, b in borders):
        own = [a for a, _ in borders]
    elif x is not None:
        x = padded(e, x, borders, 0.0)
    return e(fn, x, call.operand("weight"), call.operand("bias"), stride, own, dilation, groups)


@local("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(e: Emit, call: Call) -> fx.Node:
    """The whole reach of the tile's input rows without padding, then cropped (or extended by zeros) to the tile."""
    n = spatial_dims(call.node.target)
    kernel = call.global_shape("weight")[2:]
    stride, dilation, pads = ints(call.attr("stride"), n, 1), ints(call.attr("dilation"), n, 1), ints(call.attr("padding"), n, 0)
    groups = int(call.attr("groups", 1))
    if groups > 1:
        groups = len(call.sets["g"])
    fn = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    boxes = call.box("input")[-n:]
    if any(len(b) == 0 for b in boxes):
        y = e(torch.zeros, call.shapes[0], dtype=call.dtypes[0])
    else:
        y = e(fn, call.operand("input"), call.operand("weight"), None, stride, [0] * n, [0] * n, groups, dilation)
        crops = []
        for name, s, p, d, k, box in zip(SPATIAL[n], stride, pads, dilation, kernel, boxes, strict=True):
            begin, end = call.interval(name)
            length = (len(box) - 1) * s + d * (k - 1) + 1
            start = begin + p - box.begin * s
            crops.append((-start, start + (end - begin) - length))
        y = padded(e, y, crops, 0.0)
    bias = call.operand("bias")
    return y if bias is None else e(torch.add, y, e(torch.reshape, bias, [-1] + [1] * n))


def pool_geometry(call: Call, n: int) -> tuple[list[int], list[int], list[int], list[int]]:
    kernel = ints(call.attr("kernel_size"), n, 1)
    stride = ints(call.attr("stride"), n, 0)
    return kernel, [s or k for s, k in zip(stride, kernel, strict=True)], ints(call.attr("padding"), n, 0), ints(call.attr("dilation"), n, 1)


@local("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(e: Emit, call: Call) -> fx.Node:
    n = spatial_dims(call.node.target)
    kernel, stride, pads, dilation = pool_geometry(call, n)
    boxes = call.box(call.node.operand_names[0])[-n:]
    borders = [border(call.interval(name), s, p, d, k, box) for name, s, p, d, k, box in zip(SPATIAL[n], stride, pads, dilation, kernel, boxes, strict=True)]
    fn = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
    return e(fn, padded(e, first(call), borders, -math.inf), kernel, stride, 0, dilation)


@local("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(e: Emit, call: Call) -> fx.Node:
    """Sum of each window over its divisor, which at the global border is the clipped one."""
    n = spatial_dims(call.node.target)
    kernel, stride, pads, _ = pool_geometry(call, n)
    operand = call.node.operand_names[0]
    sizes = call.global_shape(operand)[-n:]
    include_pad = bool(call.attr("count_include_pad", True))
    borders, divisors = [], []
    for name, k, s, p, size, box in zip(SPATIAL[n], kernel, stride, pads, sizes, call.box(operand)[-n:], strict=True):
        begin, end = call.interval(name)
        borders.append(border((begin, end), s, p, 1, k, box))
        counts = []
        for i in range(begin, end):
            low, high = i * s - p, min(i * s - p + k, size + p)
            counts.append(high - low if include_pad else min(high, size) - max(low, 0))
        divisors.append(counts)
    fn = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]
    x = padded(e, first(call), borders, 0.0)
    override = call.attr("divisor_override")
    mean = e(fn, x, kernel, stride, 0)
    full = math.prod(kernel)
    if override is not None:
        return e(torch.mul, mean, full / int(override))
    for d, (counts, k) in enumerate(zip(divisors, kernel, strict=True)):
        if any(c != k for c in counts):
            scale = e(torch.tensor, [k / c for c in counts], dtype=call.dtypes[0])
            mean = e(torch.mul, mean, e(torch.reshape, scale, [-1] + [1] * (n - 1 - d)))
    return mean


@local("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(e: Emit, call: Call) -> fx.Node:
    n = spatial_dims(call.node.target)
    # A spatial dim is cut only where all windows have one size: there the pool is local.
    return e((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[n - 1], first(call), call.shapes[0][-n:])


@local("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
def interpolate(e: Emit, call: Call) -> fx.Node:
    """Separable: each spatial dim is resampled by the tile's own source rows and weights."""
    n = spatial_dims(call.node.target)
    names = SPATIAL[n]
    if not any(call.is_cut(name) for name in names):
        return captured_call(e, call)[0]
    x = first(call)
    operand = call.node.operand_names[0]
    given = call.attr("scale_factors")
    align = bool(call.attr("align_corners", False))
    linear = "linear" in call.node.target
    for d, (name, size, box) in enumerate(zip(names, call.global_shape(operand)[-n:], call.box(operand)[-n:], strict=True)):
        out = call.sizes[name]
        factor = given[d] if given else call.attr("scales" if n == 1 else ("scales_d", "scales_h", "scales_w")[3 - n + d])
        if align:
            scale = (size - 1) / (out - 1) if out > 1 else 0.0
        else:
            scale = 1.0 / factor if factor else size / out
        low, high, weights = [], [], []
        for i in range(*call.interval(name)):
            if not linear:
                low.append(min(math.floor(i * scale), size - 1) - box.begin)
                continue
            source = scale * i if align else max(scale * (i + 0.5) - 0.5, 0.0)
            index = min(int(source), size - 1)
            low.append(index - box.begin)
            high.append(min(index + 1, size - 1) - box.begin)
            weights.append(min(max(source - index, 0.0), 1.0))
        dim = d - n
        a = e(torch.index_select, x, dim, e(torch.tensor, low))
        if linear:
            b = e(torch.index_select, x, dim, e(torch.tensor, high))
            w = e(torch.reshape, e(torch.tensor, weights, dtype=call.dtypes[0]), [-1] + [1] * (n - 1 - d))
            a = e(torch.add, e(torch.mul, a, e(torch.rsub, w, 1)), e(torch.mul, b, w))
        x = a
    return x


@local("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def resample_whole(e: Emit, call: Call) -> fx.Node:
    return captured_call(e, call)[0]
