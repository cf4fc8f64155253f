"""Small versions of the architectures that tests train and that torchvision doesn't have."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Two levels; skips by cat; up by transposed convolution."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down1 = self.double(1, width)
        self.down2 = self.double(width, 2 * width)
        self.bottom = self.double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = self.double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = self.double(2 * width, width)
        self.out = nn.Conv2d(width, 3, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.bottom(F.max_pool2d(b, 2)))
        y = self.up1(self.join2(torch.cat([b, y], 1)))
        return self.out(self.join1(torch.cat([a, y], 1)))


class Bert(nn.Module):
    """Token, segment and position embeddings, nn.TransformerEncoder layers, a masked-word head."""

    def __init__(self, vocabulary: int = 40, hidden: int = 16, layers: int = 2, heads: int = 4, context: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, hidden, padding_idx=0)
        self.segments = nn.Embedding(2, hidden)
        self.positions = nn.Parameter(torch.randn(context, hidden) * 0.1)
        self.norm = nn.LayerNorm(hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout=0.1, activation="gelu", batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(tokens) + self.segments(segments) + self.positions[: tokens.shape[1]])
        padding = tokens == 0
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.head(x)


class T5Attention(nn.Module):
    """Attention without scale, with a relative position bias by buckets (arXiv 1910.10683, section 2.1)."""

    def __init__(self, hidden: int, heads: int, bidirectional: bool, biased: bool, buckets: int = 8) -> None:
        super().__init__()
        self.heads, self.buckets, self.bidirectional = heads, buckets, bidirectional
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.bias = nn.Embedding(buckets, heads) if biased else None

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """Exact for near positions, logarithmic for far ones; `distance` = key - query."""
        buckets = self.buckets
        out = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            out = out + (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        exact = buckets // 2
        far = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(16 / exact) * (buckets - exact)).long()
        return out + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        scores = q @ k.transpose(-1, -2)
        if self.bias is not None:
            distance = torch.arange(memory.shape[1])[None, :] - torch.arange(x.shape[1])[:, None]
            scores = scores + self.bias(self.bucket(distance)).permute(2, 0, 1)[None]
        if not self.bidirectional:
            hidden = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class T5Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, decoder: bool, biased: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = RMSNorm(hidden), RMSNorm(hidden) if decoder else None, RMSNorm(hidden)
        self.attention = T5Attention(hidden, heads, not decoder, biased)
        self.cross = T5Attention(hidden, heads, True, False) if decoder else None
        self.up, self.down = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        if self.cross is not None and self.norm2 is not None and memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.down(F.relu(self.up(self.norm3(x))))


class T5(nn.Module):
    def __init__(self, vocabulary: int = 30, hidden: int = 16, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.shared = nn.Embedding(vocabulary, hidden)
        self.encoder = nn.ModuleList(T5Layer(hidden, heads, False, i == 0) for i in range(layers))
        self.decoder = nn.ModuleList(T5Layer(hidden, heads, True, i == 0) for i in range(layers))
        self.norm1, self.norm2 = RMSNorm(hidden), RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, x = self.shared(source), self.shared(target)
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.norm1(memory)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.head(self.norm2(x))


class LSTMLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 30, hidden: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=layers, dropout=0.2)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [batch, time] -> logits [batch, time, vocabulary]; time first inside."""
        y, _ = self.lstm(self.words(tokens).transpose(0, 1))
        return self.head(y).transpose(0, 1)


class Translator(nn.Module):
    """Sequence to sequence LSTMs with Luong's general attention (arXiv 1508.04025)."""

    def __init__(self, vocabulary: int = 30, hidden: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, hidden), nn.Embedding(vocabulary, hidden)
        self.encoder = nn.LSTM(hidden, hidden, layers)
        self.decoder = nn.LSTM(hidden, hidden, layers)
        self.general = nn.Linear(hidden, hidden, bias=False)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory, state = self.encoder(self.source(source).transpose(0, 1))
        y, _ = self.decoder(self.target(target).transpose(0, 1), state)
        y, memory = y.transpose(0, 1), memory.transpose(0, 1)
        weights = torch.softmax(y @ self.general(memory).transpose(1, 2), -1)
        return self.head(torch.tanh(self.combine(torch.cat([weights @ memory, y], -1))))


class DLRM(nn.Module):
    """Embedding bags, a bottom MLP, pairwise dot interactions, a top MLP (arXiv 1906.00091)."""

    def __init__(self, rows: tuple[int, ...] = (50, 30, 20), width: int = 8, dense: int = 5) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum") for n in rows)
        self.bottom = nn.Sequential(nn.Linear(dense, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        pairs = (len(rows) + 1) * len(rows) // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
        first, second = torch.tril_indices(len(rows) + 1, len(rows) + 1, -1)
        self.register_buffer("first", first)
        self.register_buffer("second", second)

    def forward(self, dense: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        x = self.bottom(dense)
        features = torch.stack([x, *(bag(t) for bag, t in zip(self.bags, (a, b, c), strict=True))], 1)
        products = features @ features.transpose(1, 2)
        return self.top(torch.cat([x, products[:, self.first, self.second]], 1)).squeeze(1)


class MoE(nn.Module):
    """Top-2 of 4 experts; each a module of its own that sees all tokens, weighted by the gate."""

    def __init__(self, hidden: int = 8, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.chosen = chosen
        self.inward = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)) for _ in range(experts))
        self.out = nn.Linear(hidden, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inward(x))
        scores = self.gate(x).softmax(-1)
        top, index = scores.topk(self.chosen, -1)
        weights = torch.zeros_like(scores).scatter(-1, index, top / top.sum(-1, keepdim=True))
        y = sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.out(x + y)
