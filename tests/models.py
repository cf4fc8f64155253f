"""The models that tests train: each a small module with a global batch and, when it has one, a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT, next_byte_loss
from tests.architectures import DLRM, Bert, LSTMLanguageModel, MoE, T5, Translator, UNet


@dataclass
class Example:
    """`inputs` is the global batch; with a loss its last ones are the targets."""

    module: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[..., Any] | None = None


@dataclass
class Case:
    """A model and hybrid plans for 2 devices that together reach what is special about it."""

    name: str
    make: Callable[[], Example]
    plans: list[str] = field(default_factory=list)

    def example(self, seed: int = 0) -> Example:
        """The same for the same seed, on every rank."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make()


def image_example(module: nn.Module, size: int, rows: int = 4, classes: int = 10, channels: int = 3) -> Example:
    return Example(module, (torch.randn(rows, channels, size, size), torch.randint(classes, (rows,))), F.cross_entropy)


def by_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def by_pixel(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets)


def alexnet() -> Example:
    model = tv.AlexNet(num_classes=10)
    # Widths of the fully connected layers cut down: 55 million double parameters say no more than these.
    model.classifier[1], model.classifier[4], model.classifier[6] = nn.Linear(9216, 48), nn.Linear(48, 40), nn.Linear(40, 10)
    return image_example(model, 64)


def vgg11() -> Example:
    model = tv.vgg11(num_classes=10)
    model.classifier[0], model.classifier[3], model.classifier[6] = nn.Linear(25088, 16), nn.Linear(16, 24), nn.Linear(24, 10)
    return image_example(model, 32)


def resnet18() -> Example:
    return image_example(tv.ResNet(tv.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10), 48)


def inception() -> Example:
    return image_example(tv.Inception3(num_classes=10, aux_logits=False, init_weights=False), 75)


def mobilenet() -> Example:
    return image_example(tv.mobilenet_v3_small(num_classes=10), 48)


def vit() -> Example:
    model = tv.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=10)
    nn.init.normal_(model.heads[0].weight, std=0.1)  # torchvision starts the head at zero
    return image_example(model, 32)


def unet() -> Example:
    return Example(UNet(), (torch.randn(4, 1, 20, 16), torch.randint(3, (4, 20, 16))), by_pixel)


def tiny_gpt() -> GPT:
    return GPT(vocabulary=32, layers=2, hidden=16, heads=4, context=16)


def gpt_inside() -> Example:
    return Example(tiny_gpt(), (torch.randint(32, (4, 12)), torch.randint(32, (4, 12))))


def gpt_loss() -> Example:
    return Example(tiny_gpt(), (torch.randint(32, (4, 12)), torch.randint(32, (4, 12))), next_byte_loss)


def gpt_outside() -> Example:
    return Example(tiny_gpt(), (torch.randint(32, (4, 12)),))


def bert() -> Example:
    tokens = torch.randint(1, 40, (4, 10))
    tokens[1, 7:] = 0
    tokens[3, 4:] = 0
    return Example(Bert(), (tokens, torch.randint(2, (4, 10)), torch.randint(40, (4, 10))), by_token)


def t5() -> Example:
    return Example(T5(), (torch.randint(30, (4, 10)), torch.randint(30, (4, 7)), torch.randint(30, (4, 7))), by_token)


def lstm() -> Example:
    return Example(LSTMLanguageModel(), (torch.randint(30, (4, 6)), torch.randint(30, (4, 6))), by_token)


def nmt() -> Example:
    return Example(Translator(), (torch.randint(30, (4, 6)), torch.randint(30, (4, 5)), torch.randint(30, (4, 5))), by_token)


def dlrm() -> Example:
    bags = [torch.randint(n, (6, b)) for n, b in ((50, 3), (30, 2), (20, 1))]
    return Example(DLRM(), (torch.randn(6, 5), *bags, torch.rand(6)), F.binary_cross_entropy)


def moe() -> Example:
    return Example(MoE(), (torch.randn(4, 5, 8), torch.randint(3, (4, 5))), by_token)


CASES = [
    Case("alexnet", alexnet),
    Case("vgg11", vgg11),
    Case("resnet18", resnet18),
    Case("inception", inception),
    Case("mobilenet", mobilenet),
    Case("vit", vit),
    Case("unet", unet),
    Case("gpt_inside", gpt_inside),
    Case("gpt_loss", gpt_loss),
    Case("gpt_outside", gpt_outside),
    Case("bert", bert),
    Case("t5", t5),
    Case("lstm", lstm),
    Case("nmt", nmt),
    Case("dlrm", dlrm),
    Case("moe", moe),
]


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)
