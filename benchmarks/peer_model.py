"""The model that peers and torch_soap plan: transformer layers of plain products, so that everybody's capture sees the same operators."""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.grow, self.shrink = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3) for w in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
        x = x + self.project((weights @ v).permute(0, 2, 1, 3).flatten(-2))
        return x + self.shrink(torch.relu(self.grow(x)))


class Model(nn.Module):
    def __init__(self, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
