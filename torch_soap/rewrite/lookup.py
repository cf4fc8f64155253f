"""Local computations of embeddings (whose gradients are dense: they are summed over ranks), padding, attention and recurrent layers."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import fx

from torch_soap import functional
from torch_soap.rewrite.basic import first
from torch_soap.rewrite.local import Call, Emit, captured_call, local
from torch_soap.rewrite.randomness import draw, runs_of


def masked_lookup(indices: torch.Tensor, weight: torch.Tensor, begin: int, end: int, padding_idx: int) -> torch.Tensor:
    """Rows of [begin, end) of a table of which `weight` is that part; zero for other indices. Source: Megatron-LM, section 3."""
    here = (indices >= begin) & (indices < end)
    local_index = torch.where(here, indices - begin, torch.zeros_like(indices))
    pad = padding_idx - begin if begin <= padding_idx < end else None
    rows = F.embedding(local_index, weight, padding_idx=pad)
    return torch.where(here.unsqueeze(-1), rows, torch.zeros_like(rows))


@local("embedding")
def embedding(e: Emit, call: Call) -> fx.Node:
    """Gradients are dense, also where the module asks for sparse ones: parts of them move and are stored."""
    padding = int(call.attr("padding_idx", -1))
    if call.is_cut("v"):
        begin, end = call.interval("v")
        return e(masked_lookup, call.operand("indices"), call.operand("weight"), begin, end, padding)
    by_frequency = bool(call.attr("scale_grad_by_freq", False))
    return e(
        F.embedding,
        call.operand("indices"),
        call.operand("weight"),
        padding_idx=padding if padding >= 0 else None,
        scale_grad_by_freq=by_frequency,
    )


@local("embedding_renorm")
def embedding_renorm(e: Emit, call: Call) -> fx.Node:
    begin, end = call.interval("v")
    return e(renormed, call.operands[0], call.operands[1], begin, end, float(call.attr("max_norm")), float(call.attr("norm_type")))


def renormed(weight: torch.Tensor, indices: torch.Tensor, begin: int, end: int, max_norm: float, norm_type: float) -> torch.Tensor:
    """Rows of [begin, end) of a table, those that are looked up scaled down to max_norm."""
    here = indices[(indices >= begin) & (indices < end)] - begin
    return torch.ops.aten.embedding_renorm.default(weight, here, max_norm, norm_type)  # type: ignore[no-any-return]


def bag(indices: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, begin: int, end: int, mode: int) -> torch.Tensor:
    """Bags of equal length over a part of the table; sums and means are shares."""
    if mode == 2:
        return F.embedding_bag(indices, weight, mode="max")
    here = (indices >= begin) & (indices < end)
    local_index = torch.where(here, indices - begin, torch.zeros_like(indices))
    factor = here.to(weight.dtype) / (indices.shape[1] if mode == 1 else 1)
    if scales is not None:
        factor = factor * torch.where(here, scales, torch.zeros_like(scales))
    return F.embedding_bag(local_index, weight, mode="sum", per_sample_weights=factor)


@local("embedding_bag_fixed")
def embedding_bag(e: Emit, call: Call) -> fx.Node:
    begin, end = call.interval("v")
    return e(
        bag,
        call.operand("indices"),
        call.operand("weight"),
        call.operand("per_sample_weights"),
        begin,
        end,
        int(call.attr("mode", 0)),
    )


@local("index_select")
def index_select(e: Emit, call: Call) -> fx.Node:
    return e(torch.index_select, call.operands[0], int(call.attr("dim", 0)), call.operand("index"))


@local("pad", "constant_pad_nd")
def pad(e: Emit, call: Call) -> fx.Node:
    amounts = list(call.attr("pad", []))
    mode = call.attr("mode", "constant")
    if mode != "constant":
        return captured_call(e, call)[0]
    rank = len(call.shapes[0])
    borders: list[int] = []
    for d in reversed(range(rank)):
        i = 2 * (rank - 1 - d)
        before = amounts[i] if i < len(amounts) else 0
        box = call.box(call.node.operand_names[0])[d]
        begin, end = call.results[0][d].begin, call.results[0][d].end
        if i >= len(amounts) or (amounts[i] == 0 and amounts[i + 1] == 0):
            borders += [0, 0]
            continue
        left = min(max(before - begin, 0), end - begin) if len(box) == 0 else box.begin + before - begin
        borders += [left, (end - begin) - left - len(box)]
    value = call.attr("value")
    return e(F.pad, first(call), borders, "constant", 0.0 if value is None else float(value))


def causal_mask(rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> torch.Tensor:
    """True where the query may see the key: upper-left aligned on *global* indices (torch's is_causal)."""
    q = torch.cat([torch.arange(b, e) for b, e in rows])
    k = torch.cat([torch.arange(b, e) for b, e in columns])
    return q[:, None] >= k[None, :]


@local("scaled_dot_product_attention")
def attention(e: Emit, call: Call) -> fx.Node:
    q, k, v = call.operands[:3]
    mask = call.operand("attn_mask")
    causal = bool(call.attr("is_causal", False))
    scale = call.attr("scale")
    gqa = bool(call.attr("enable_gqa", False)) or call.sizes.get("r", 1) > 1
    if causal and call.is_cut("s") and not call.attr("dropout_p", 0.0):
        mask = e(causal_mask, list(call.sets["s"].runs), [(0, call.sizes["t"])])
        causal = False
    if call.captured is not None and call.captured.rng_index is not None and call.attr("dropout_p", 0.0) > 0:
        tile = [*runs_of(call.results[0][:-1]), [(0, call.sizes["t"])]]
        sizes = [*call.global_shape("query")[:-1], call.sizes["t"]]
        arguments = (q, k, v, mask, float(call.attr("dropout_p")), bool(call.attr("is_causal", False)))
        return draw(e, call, arguments, {"scale": scale, "enable_gqa": gqa}, tile, sizes)
    return e(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=causal, scale=scale, enable_gqa=gqa)


def attention_part_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, repeat: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unnormalised attention over some keys: max, sum of exponentials, weighted values; a row that sees no key gives -inf, 0, 0.
    At least in float32: parts are merged."""
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, -3), v.repeat_interleave(repeat, -3)
    scores = (q @ k.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if scores.shape[-1] == 0:
        top = scores.new_full(scores.shape[:-1], -math.inf)
    else:
        top = scores.detach().amax(-1)
    shift = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weights = torch.exp(scores - shift.unsqueeze(-1))
    return top.unsqueeze(-1), weights.sum(-1, keepdim=True), (weights @ v).unsqueeze(-1)


@local("attention_part")
def attention_part(e: Emit, call: Call) -> list[fx.Node]:
    q, k, v = call.operands[:3]
    width = call.global_shape("query")[-1]
    scale = call.attr("scale")
    mask = call.operand("attn_mask")
    keys = call.box("key")[-2]
    begins = list(call.attr("begins"))
    parts = range(*call.interval("p"))
    pieces: list[list[fx.Node]] = []
    for part in parts:
        low, high = begins[part] - keys.begin, begins[part + 1] - keys.begin
        k_part, v_part = e(torch.narrow, k, -2, low, high - low), e(torch.narrow, v, -2, low, high - low)
        part_mask = mask
        if call.attr("is_causal", False):
            part_mask = e(causal_mask, list(call.sets["s"].runs), [(begins[part], begins[part + 1])])
        elif mask is not None and len(call.box("attn_mask")[-1]) > 1:
            part_mask = e(torch.narrow, mask, -1, low, high - low)
        made = e(attention_part_of, q, k_part, v_part, part_mask, 1 / math.sqrt(width) if scale is None else float(scale), len(call.sets.get("r", [0])))
        pieces.append([e(operator.getitem, made, i) for i in range(3)])
    return [column[0] if len(column) == 1 else e(torch.cat, column, -1) for column in (list(c) for c in zip(*pieces, strict=True))]


def merge_parts(m: torch.Tensor, length: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """Joins the parts of attention by their maxima. Source: Milakov & Gimelshein, arXiv 1805.02867."""
    top = m.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weight = torch.exp(m.detach() - top)
    total = (length * weight).sum(-1)
    value = (acc * weight.unsqueeze(-2)).sum(-1)
    empty = total == 0
    return torch.where(empty.unsqueeze(-1), torch.zeros_like(value), value / torch.where(empty, torch.ones_like(total), total).unsqueeze(-1))


@local("attention_merge")
def attention_merge(e: Emit, call: Call) -> fx.Node:
    return e(merge_parts, *call.operands)


@local("lstm_layer")
def lstm_layer(e: Emit, call: Call) -> list[fx.Node]:
    operands = [call.operand(n) for n in ("input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
    made = e(functional.lstm_step, *operands) if call.is_cut("o") else e(functional.lstm_layer, *operands, bool(call.attr("reverse", False)))
    return [e(operator.getitem, made, i) for i in range(3)]


@local("gru_layer", "rnn_layer")
def one_state_layer(e: Emit, call: Call) -> list[fx.Node]:
    operands = [call.operand(n) for n in ("input", "h0", "h0_own", "w_ih", "w_hh", "b_ih", "b_hh")]
    if call.node.target == "rnn_layer":
        made = e(functional.rnn_layer, *operands, bool(call.attr("reverse", False)), bool(call.attr("relu", False)))
    else:
        made = e(functional.gru_layer, *operands, bool(call.attr("reverse", False)))
    return [e(operator.getitem, made, i) for i in range(2)]
