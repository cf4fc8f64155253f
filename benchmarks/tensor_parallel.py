"""Tensor parallelism by torch's DTensor (`parallelize_module`): products by output and by input channel in turns, heads over processes, and
every process with all rows.

A fused projection of queries, keys and values can't be cut by rows, so copies of models get attention of three products with the same parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from benchmarks.hybrids import all_gather
from examples.gpt import Block


class SplitAttention(nn.Module):
    """Self-attention of nn.MultiheadAttention's or GPT's projections; the heads that are there come from the products' widths."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, out: nn.Linear, heads: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.width = causal, out.in_features // heads
        self.q, self.k, self.v = (nn.Linear(out.in_features, out.in_features) for _ in range(3))
        self.out = nn.Linear(out.in_features, out.out_features)
        with torch.no_grad():
            for layer, w, b in zip((self.q, self.k, self.v, self.out), (*weight.chunk(3), out.weight), (*bias.chunk(3), out.bias), strict=True):
                layer.weight.copy_(w)
                layer.bias.copy_(b)

    def forward(self, x: torch.Tensor, *_: Any, key_padding_mask: torch.Tensor | None = None, **__: Any) -> tuple[torch.Tensor, None]:
        q, k, v = (layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None]  # torch's encoder has made it one of floats
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2)), None


class SplitBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2, self.up, self.down = block.norm1, block.norm2, block.up, block.down
        self.attention = SplitAttention(block.qkv.weight, block.qkv.bias, block.proj, block.heads, causal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GatheredRows(nn.Module):
    """Every process works on all rows; so the loss is the whole batch's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.module(*(all_gather(t) for t in batch))  # type: ignore[no-any-return]


def cut(kind: str, module: Any) -> None:
    """In place."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    attention = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "out": RowwiseParallel()}
    if kind == "mlp":
        layers = [n for n, m in module.named_children() if isinstance(m, nn.Linear)]
        parallelize_module(module, mesh, {n: ColwiseParallel() if i % 2 == 0 else RowwiseParallel() for i, n in enumerate(layers)})
    elif kind == "gpt":
        module.blocks = nn.ModuleList(SplitBlock(b) for b in module.blocks)
        for block in module.blocks:
            parallelize_module(block.attention, mesh, attention)
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        by_word(module, mesh, "tokens")
        module.head.weight = module.tokens.weight
    elif kind == "encoder":
        for layer in list(module.modules()):
            name = next((n for n, m in layer.named_children() if isinstance(m, nn.MultiheadAttention)), None)
            if name is None:
                continue
            own = getattr(layer, name)
            split = SplitAttention(own.in_proj_weight, own.in_proj_bias, own.out_proj, own.num_heads, causal=False)
            setattr(layer, name, parallelize_module(split, mesh, attention))
            wide = ("linear1", "linear2") if hasattr(layer, "linear1") else ("mlp.0", "mlp.3")
            parallelize_module(layer, mesh, {wide[0]: ColwiseParallel(), wide[1]: RowwiseParallel()})
        if hasattr(module, "words"):
            by_word(module, mesh, "words")
    else:
        raise ValueError(f"[tensor_parallel] no kind {kind}")


def by_word(module: nn.Module, mesh: dist.DeviceMesh, words: str) -> None:
    """An embedding and the head: the vocabulary over processes."""
    rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(module, mesh, {words: rows, "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
