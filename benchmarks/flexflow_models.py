"""The models of FlexFlow's Table 5 (Jia et al., MLSys 2019, section 8.1), at its sizes, on the meta device.

Its recurrent models are unrolled for 40 steps, so every step of every layer may lie elsewhere: here too, one `nn.LSTM` call for each. What the
paper doesn't say is ours: vocabularies (Penn Treebank's 10,000; 32,000 for translation, as WMT's subwords; 20,000 for the movie reviews).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F

STEPS = 40
BATCH = {"alexnet": 256}  # per device; the others 64
NAMES = ("alexnet", "resnet101", "inception_v3", "rnntc", "rnnlm", "nmt")


class Unrolled(nn.Module):
    """An LSTM layer, step by step, on a list of [1, n, width]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden)

    def forward(self, steps: list[torch.Tensor], state: Any = None) -> tuple[list[torch.Tensor], Any]:
        out = []
        for x in steps:
            y, state = self.lstm(x, state)
            out.append(y)
        return out, state


class Embedded(nn.Module):
    """Words [n, STEPS] as a list of [1, n, width]: one look-up for each step."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)

    def forward(self, words: torch.Tensor) -> list[torch.Tensor]:
        return [self.table(words[:, t]).unsqueeze(0) for t in range(STEPS)]


class RNNTC(nn.Module):
    """Text classification: 4 layers of 1024, a class from the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = Embedded(20_000, 1024)
        self.layers = nn.ModuleList(Unrolled(1024, 1024) for _ in range(4))
        self.classes = nn.Linear(1024, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        steps = self.embedded(words)
        for layer in self.layers:
            steps, _ = layer(steps)
        return self.classes(steps[-1].squeeze(0))


class RNNLM(nn.Module):
    """Language model: 2 layers of 2048, the next word at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = Embedded(10_000, 2048)
        self.layers = nn.ModuleList(Unrolled(2048, 2048) for _ in range(2))
        self.words = nn.Linear(2048, 10_000)

    def forward(self, words: torch.Tensor) -> list[torch.Tensor]:
        steps = self.embedded(words)
        for layer in self.layers:
            steps, _ = layer(steps)
        return [self.words(x.squeeze(0)) for x in steps]


class NMT(nn.Module):
    """Translation: encoder and decoder of 2 layers of 1024 each, attention over the encoder's steps, a word at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = Embedded(32_000, 1024), Embedded(32_000, 1024)
        self.encoder = nn.ModuleList(Unrolled(1024, 1024) for _ in range(2))
        self.decoder = nn.ModuleList(Unrolled(1024, 1024) for _ in range(2))
        self.combine = nn.Linear(2048, 1024)
        self.words = nn.Linear(1024, 32_000)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        steps, states = self.source(source), []
        for layer in self.encoder:
            steps, state = layer(steps)
            states.append(state)
        memory = torch.cat(steps).transpose(0, 1)  # [n, steps, hidden]
        steps = self.target(target)
        for layer, state in zip(self.decoder, states, strict=True):
            steps, _ = layer(steps, state)
        out = []
        for x in steps:
            query = x.squeeze(0)
            weights = torch.softmax(torch.bmm(memory, query.unsqueeze(2)), 1)
            context = torch.bmm(memory.transpose(1, 2), weights).squeeze(2)
            out.append(self.words(torch.tanh(self.combine(torch.cat([context, query], 1)))))
        return out


def each_word(output: list[torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cross_entropy(x, words[:, t]) for t, x in enumerate(output)]).mean()


def build(name: str, devices: int) -> tuple[nn.Module, tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
    """(module, inputs, loss) on the meta device."""
    rows = BATCH.get(name, 64) * devices
    words = torch.empty(rows, STEPS, dtype=torch.long, device="meta")
    labels = torch.empty(rows, dtype=torch.long, device="meta")
    with torch.device("meta"):
        if name == "rnntc":
            return RNNTC(), (words, labels), F.cross_entropy
        if name == "rnnlm":
            return RNNLM(), (words, words), each_word
        if name == "nmt":
            return NMT(), (words, words, words), each_word
        model = tv.inception_v3(aux_logits=False, init_weights=False) if name == "inception_v3" else tv.get_model(name)
    size = 299 if name == "inception_v3" else 224
    return model, (torch.empty(rows, 3, size, size, device="meta"), labels), F.cross_entropy
