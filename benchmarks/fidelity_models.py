"""The models whose step times are predicted and measured: name -> module, loss, rows of each process and a batch, seeded.

Sizes are such that a step on two processes of one thread takes a few hundred milliseconds: images of 64 to 128 pixels, classifiers narrower than
the papers'. Every operator of the original is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT, next_byte_loss

Batch = tuple[torch.Tensor, ...]


@dataclass
class Case:
    """`batch(rows)`: inputs and, last, the targets."""

    module: nn.Module
    loss: Callable[..., torch.Tensor]
    rows: int  # of each process
    batch: Callable[[int], Batch]


def images(module: nn.Module, size: int, rows: int) -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 3, size, size), torch.randint(10, (total,))

    return Case(module, F.cross_entropy, rows, batch)


def alexnet() -> Case:
    import torchvision

    module = torchvision.models.alexnet(num_classes=10)
    module.classifier[1], module.classifier[4], module.classifier[6] = nn.Linear(9216, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 10)
    return images(module, 128, 8)


def vgg16() -> Case:
    import torchvision

    module = torchvision.models.vgg16(num_classes=10)
    module.avgpool = nn.AdaptiveAvgPool2d(2)
    module.classifier[0], module.classifier[3], module.classifier[6] = nn.Linear(2048, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 10)
    return images(module, 64, 4)


def resnet50() -> Case:
    import torchvision

    return images(torchvision.models.resnet50(num_classes=10), 64, 4)


def inception_v3() -> Case:
    import torchvision

    return images(torchvision.models.inception_v3(num_classes=10, aux_logits=False, init_weights=False), 96, 4)


def gpt() -> Case:
    def batch(total: int) -> Batch:
        tokens = torch.randint(256, (total, 129))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Case(GPT(layers=4, hidden=256, context=128), next_byte_loss, 4, batch)


class LstmLanguageModel(nn.Module):
    """Zaremba, Sutskever & Vinyals 2014, without dropout."""

    def __init__(self, vocabulary: int = 2000, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def lstm() -> Case:
    def batch(total: int) -> Batch:
        tokens = torch.randint(2000, (total, 36))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Case(LstmLanguageModel(), next_byte_loss, 8, batch)


class DLRM(nn.Module):
    """Naumov et al. 2019: bags of categories and dense features meet in pairwise products."""

    def __init__(self, tables: int = 8, categories: int = 10_000, width: int = 32, dense: int = 13, sparse: bool = False) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(categories, width, mode="sum", sparse=sparse) for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(dense, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
        rows, columns = torch.tril_indices(tables + 1, tables + 1, -1).unbind()
        self.register_buffer("pairs", rows * (tables + 1) + columns)

    def forward(self, dense: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        return self.meet(self.bottom(dense), [table(categories[:, i]) for i, table in enumerate(self.tables)])

    def meet(self, low: torch.Tensor, bags: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = torch.stack([low, *bags], 1)
        products = torch.bmm(rows, rows.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        return self.top(torch.cat([low, products], 1)).squeeze(1)


def dlrm() -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 13), torch.randint(10_000, (total, 8, 4)), torch.rand(total).round()

    return Case(DLRM(), F.binary_cross_entropy_with_logits, 256, batch)


class UNet(nn.Module):
    """Ronneberger, Fischer & Brox 2015, padded, with batch norm."""

    def __init__(self, width: int = 16, levels: int = 4, classes: int = 4) -> None:
        super().__init__()
        widths = [width << i for i in range(levels)]
        self.down = nn.ModuleList(self.block(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True))
        self.merge = nn.ModuleList(self.block(2 * a, a) for a in widths[-2::-1])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        layers = []
        for a in (before, after):
            layers += [nn.Conv2d(a, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        return self.head(x)


def unet() -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 3, 64, 64), torch.randint(4, (total, 64, 64))

    return Case(UNet(), F.cross_entropy, 4, batch)


MODELS: dict[str, Callable[[], Case]] = {
    "alexnet": alexnet, "vgg16": vgg16, "resnet50": resnet50, "inception_v3": inception_v3, "gpt": gpt, "lstm": lstm, "dlrm": dlrm, "unet": unet,
}  # fmt: skip
