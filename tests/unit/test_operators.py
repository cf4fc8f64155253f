"""Operators that models use, by how many use them (a count over 219 captured models): which factors of each can be cut.

The families of elementwise operators, views and creation come after the ranked ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.unit.planning import graph_of, rule
from torch_soap import _C

X = torch.linspace(-1, 1, 4 * 6 * 8).reshape(4, 6, 8)
INDEX = torch.arange(4 * 3 * 8).reshape(4, 3, 8) % 6
EXPERTS, OFFSETS = torch.ones(4, 8, 5), torch.tensor([1, 3, 3, 6], dtype=torch.int32)
STATE, LSTM = X[:1, :, :2], [torch.ones(8, 8), torch.ones(8, 2)]
Fn = Callable[[torch.Tensor], torch.Tensor]


def image(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, 2, 6, 8)


def volume(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, 2, 3, 2, 8)


# (how it is called, operator in the graph, factors that can be cut); the first 43 rows are the ranking's line of 95 % of models.
RANKED: list[tuple[str, Fn, str, str]] = [
    ("cross_entropy_loss", lambda x: F.cross_entropy(x.flatten(0, 1), INDEX.flatten()[:24]), "ce_rows", "n v"),
    ("linear", lambda x: F.linear(x, X[0, :, :8]), "linear", "n s i o"),
    ("dropout", lambda x: F.dropout(x, 0.5), "dropout", "d0 d1 d2"),
    ("conv2d", lambda x: F.conv2d(image(x), X.reshape(-1)[:36].reshape(2, 2, 3, 3)), "conv2d", "n c k h w"),
    ("layer_norm", lambda x: F.layer_norm(x, (8,)), "layer_norm", "n s d"),
    ("scaled_dot_product_attention", lambda x: F.scaled_dot_product_attention(image(x), image(x), image(x)), "scaled_dot_product_attention", "n h s t e"),
    ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(image(x), 2), "adaptive_avg_pool2d", "n c h w"),
    ("batch_norm", lambda x: F.batch_norm(image(x), None, None, training=True), "batch_norm", "n c h w"),
    ("mean", lambda x: x.mean(1), "mean", "d0 d1 d2"),
    ("index", lambda x: x[:, torch.tensor([0, 2])], "index_take", "d0 d1 d2"),
    ("embedding", lambda x: F.embedding(INDEX[0], x[0, :, :]), "embedding", "n s v d"),
    ("softmax", lambda x: x.softmax(-1), "softmax", "d0 d1 d2"),
    ("matmul", lambda x: x @ x.mT, "matmul", "b0 m i o"),
    ("max_pool2d", lambda x: F.max_pool2d(image(x), 2), "max_pool2d", "n c h w"),
    ("cumsum", lambda x: x.cumsum(1), "cumsum", "d0 d2"),
    ("diff", lambda x: x.diff(dim=1), "sub", "d0 d1 d2"),
    ("avg_pool2d", lambda x: F.avg_pool2d(image(x), 2), "avg_pool2d", "n c h w"),
    ("sum", lambda x: x.sum(1), "sum", "d0 d1 d2"),
    ("bernoulli", lambda x: torch.bernoulli(x.sigmoid()), "bernoulli", "d0 d1 d2"),
    ("conv1d", lambda x: F.conv1d(x, X[:, :, :3]), "conv1d", "n c k l"),
    ("gather", lambda x: x.gather(1, INDEX), "gather", "d0 d2"),
    ("upsample_bilinear2d", lambda x: F.interpolate(image(x), scale_factor=2, mode="bilinear"), "upsample_bilinear2d", "n c h w"),
    ("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, dim=-1), "linalg_vector_norm", "d0 d1"),
    ("conv3d", lambda x: F.conv3d(volume(x), X.reshape(-1)[:16].reshape(2, 2, 1, 2, 2)), "conv3d", "n c k d w"),
    ("grouped matrix products", lambda x: grouped_mm_fallback(x[0].detach(), EXPERTS, OFFSETS), "transformers.grouped_mm_fallback", "i o"),
    ("topk", lambda x: x.topk(3, -1)[0], "topk", "d0 d1"),
    ("histc", lambda x: torch.histc(x.detach(), 4, -1, 1), "histc", "d0 d1 d2"),
    ("index_put", lambda x: x.index_put((torch.tensor([0, 1]),), X[:2]), "index_write", "d1 d2"),
    ("sort", lambda x: x.sort(-1)[0], "sort", "d0 d1"),
    ("einsum", lambda x: torch.einsum("bij,bkj->bik", x, x), "einsum", "b i j k"),
    ("group_norm", lambda x: F.group_norm(x, 2), "group_norm", "n g"),
    ("bmm", lambda x: torch.bmm(x, x.mT), "bmm", "b0 m i o"),
    ("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(volume(x), 2), "adaptive_avg_pool3d", "n c h w"),
    ("max_pool3d", lambda x: F.max_pool3d(volume(x), (1, 2, 2)), "max_pool3d", "n c d w"),
    ("upsample_nearest2d", lambda x: F.interpolate(image(x), scale_factor=2), "upsample_nearest2d", "n c h w"),
    ("im2col", lambda x: F.unfold(image(x), 3), "unfold", "d0 d1 d2 l d4"),
    ("rand", lambda x: x + torch.rand(6, 8), "rand", "d0 d1"),
    ("rms_norm", lambda x: F.rms_norm(x, (8,)), "rms_norm", "n s d"),
    ("amax", lambda x: x.amax(1), "amax", "d0 d2"),
    ("baddbmm", lambda x: torch.baddbmm(X[:, :, :6], x, x.mT), "baddbmm", "b m o i"),
    ("upsample_bicubic2d", lambda x: F.interpolate(image(x), scale_factor=2, mode="bicubic"), "upsample_bicubic2d", "n c"),
    ("lstm", lambda x: torch.lstm(x, (STATE, STATE), LSTM, False, 1, 0.0, True, False, False)[0], "lstm_layer", "t n o"),
    ("addmm", lambda x: torch.addmm(X[0, 0, :6], x[0], x[0].t()), "addmm", "m o i"),
    ("conv_transpose2d", lambda x: F.conv_transpose2d(image(x), X.reshape(-1)[:36].reshape(2, 2, 3, 3)), "conv_transpose2d", "n c k h w"),
    ("col2im", lambda x: F.fold(x[:, :4, :6], (3, 4), (2, 2)), "col2im", "n"),
    ("argmax", lambda x: x.argmax(-1), "argmax", "d0 d1"),
    ("scatter", lambda x: x.scatter(1, INDEX, X[:, :3]), "scatter", "d0 d2"),
    ("index_select", lambda x: x.index_select(1, torch.tensor([0, 3])), "index_select", "d0 d1 d2"),
    ("index_add", lambda x: x.index_add(1, torch.tensor([1, 1, 4]), X[:, :3] * 2), "index_add", "d0 d2"),
    ("index_put of a number where a mask says", lambda x: x.index_put((X[:, :, 0] > 0,), X[0, 0, 0]), "where", "d0 d1 d2"),
    ("weight_norm", lambda x: torch._weight_norm(x, X[:, :1, :1], 0), "linalg_vector_norm", "d0"),
    ("fft_fftn", lambda x: torch.fft.fftn(x, dim=(1, 2)).real, "fft_fftn", "d0"),
    ("fft_rfft", lambda x: torch.fft.rfft(x, dim=1).abs(), "fft_rfft", "d0 d2"),
    ("one_hot", lambda x: F.one_hot((x > 0).long(), 3), "eq", "d0 d1 d2 d3"),
]  # fmt: skip

FAMILIES: list[tuple[str, Fn, str, str]] = [
    ("gelu", lambda x: F.gelu(x), "gelu", "d0 d1 d2"),
    ("where", lambda x: torch.where(x > 0, x, -x), "where", "d0 d1 d2"),
    ("masked_fill", lambda x: x.masked_fill(x > 0, 0.0), "masked_fill", "d0 d1 d2"),
    ("type_as", lambda x: x * x.mean().double().type_as(x[0]), "mul", "d0 d1 d2"),
    ("transpose", lambda x: x.transpose(1, 2), "permute", "d0 d1 d2"),
    ("view", lambda x: x.view(4, 48), "view", "f2 f1 f0"),
    ("slice", lambda x: x[:, 1:5:2], "slice", "d0 d1 d2"),
    ("cat", lambda x: torch.cat([x, x], 1), "cat", "d0 d1 d2"),
    ("stack", lambda x: torch.stack([x, x], 1), "cat", "d0 d1 d2 d3"),
    ("expand", lambda x: x[:, None].expand(4, 2, 6, 8), "expand", "d0 d1 d2 d3"),
    ("pad", lambda x: F.pad(x, (1, 1)), "pad", "d0 d1 d2"),
    ("repeat_interleave", lambda x: x.repeat_interleave(2, 1), "expand", "d0 d1 d2 d3"),
    ("roll", lambda x: x.roll(2, 1), "cat", "d0 d1 d2"),
    ("tril", lambda x: x.tril(), "masked_fill", "d0 d1 d2"),
    ("flip", lambda x: x.flip(1), "flip", "d0 d1 d2"),
    ("arange", lambda x: x + torch.arange(8), "arange", "d0"),
    ("zeros", lambda x: x + torch.zeros(6, 8), "full", "d0 d1"),
    ("eye", lambda x: x @ torch.eye(8), "eye", "d0 d1"),
]


@torch.library.custom_op("transformers::grouped_mm_fallback", mutates_args=())
def grouped_mm_fallback(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Of the name and arguments that transformers' mixtures of experts call."""
    begins = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ w for a, b, w in zip(begins, begins[1:], weight, strict=False)])


@grouped_mm_fallback.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


class Scaled(nn.Module):
    def __init__(self, fn: Fn) -> None:
        super().__init__()
        self.fn = fn
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x * self.scale)


@pytest.mark.parametrize(("fn", "target", "factors"), [row[1:] for row in RANKED + FAMILIES], ids=[row[0] for row in RANKED + FAMILIES])
def test_can_be_cut(fn: Fn, target: str, factors: str) -> None:
    graph = graph_of(Scaled(fn), X)
    nodes = [n for n in graph.nodes if n.target == target]
    assert nodes, str(graph)
    cut = {f.name for f in rule(graph, nodes[-1].name).factors if f.cut != _C.Cuttable.whole and f.size > 1}
    assert cut == set(factors.split()), f"{nodes[-1].name}: {sorted(cut)}"
