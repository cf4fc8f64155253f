"""Llama 3 (Grattafiori et al. 2024, table 3): RMSNorm, rotary positions, grouped queries, SwiGLU; untied head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    layers: int
    hidden: int
    ffn: int
    heads: int
    key_heads: int
    vocabulary: int = 128256
    rope_base: float = 5e5


SIZES = {
    "tiny": Sizes(2, 64, 192, 4, 2, 512),
    "8b": Sizes(32, 4096, 14336, 32, 8),
    "70b": Sizes(80, 8192, 28672, 64, 8),
    "405b": Sizes(126, 16384, 53248, 128, 8),
}


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, sequence, width]; cos, sin [sequence, width / 2]. Pairs are halves of the width."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.width = s.hidden // s.heads
        self.q = nn.Linear(s.hidden, s.heads * self.width, bias=False)
        self.k = nn.Linear(s.hidden, s.key_heads * self.width, bias=False)
        self.v = nn.Linear(s.hidden, s.key_heads * self.width, bias=False)
        self.o = nn.Linear(s.heads * self.width, s.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (f(x).view(b, s, -1, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotary(q, cos, sin), rotary(k, cos, sin), v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


class FeedForward(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(s.hidden, s.ffn, bias=False)
        self.up = nn.Linear(s.hidden, s.ffn, bias=False)
        self.down = nn.Linear(s.ffn, s.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.attention = Attention(s)
        self.ffn_norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.ffn = FeedForward(s)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """tokens [batch, sequence] -> logits [batch, sequence, vocabulary]; with targets: the mean cross entropy."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, s: Sizes, context: int = 8192) -> None:
        super().__init__()
        self.tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.head = nn.Linear(s.hidden, s.vocabulary, bias=False)
        width = s.hidden // s.heads
        rates = s.rope_base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(context, dtype=torch.float32), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]].to(x.dtype), self.sin[: tokens.shape[1]].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def llama(size: str, context: int = 8192, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Llama:
    """A Llama of a size of SIZES; on the meta device it takes no memory."""
    with torch.device(device):
        return Llama(SIZES[size], context).to(dtype)
