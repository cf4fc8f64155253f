"""The models whose training steps are timed: those of benchmarks/fidelity_models.py and of the tests, at their papers' sizes where 24 GB hold every contender.

Dropout is off everywhere: contenders draw other random numbers, and then their losses could not be compared with one process'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.fidelity_models import DLRM, Batch, Case, LstmLanguageModel, UNet, images
from examples.gpt import GPT, next_byte_loss
from tests.architectures import Bert, MoE, Translator
from tests.models import by_token


@dataclass
class Timed:
    """A model as it is timed. Every call of `make` gives the same parameters; the batch is that of `make_batch`."""

    build: Callable[[], Case]
    optimizer: str = "SGD"  # or AdamW
    hybrid: str = ""  # what a person would write by hand (benchmarks/hybrids.py)
    tensor_parallel: str = ""  # how DTensor cuts it (benchmarks/tensor_parallel.py)
    sparse: bool = False  # gradients of tables: neither FSDP2 nor buckets know them
    rate: float = 0.1  # SGD's, of the steps whose losses are compared: so large that a wrong gradient shows

    def make(self) -> Case:
        torch.manual_seed(0)
        case = self.build()
        for layer in case.module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            if isinstance(layer, nn.MultiheadAttention | nn.LSTM):
                layer.dropout = 0.0
        return case

    def optimizer_of(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4) if self.optimizer == "AdamW" else torch.optim.SGD(parameters, lr=self.rate)


def make_batch(case: Case, world: int) -> Batch:
    """Of all processes."""
    torch.manual_seed(1)
    return case.batch(case.rows * world)


def texts(module: nn.Module, vocabulary: int, rows: int, length: int, loss: Callable[..., torch.Tensor] = next_byte_loss) -> Case:
    def batch(total: int) -> Batch:
        tokens = torch.randint(vocabulary, (total, length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return Case(module, loss, rows, batch)


def alexnet(rows: int) -> Case:
    import torchvision

    return images(torchvision.models.alexnet(), 224, rows)


def vgg16() -> Case:
    import torchvision

    return images(torchvision.models.vgg16(), 64, 8)


def resnet50() -> Case:
    import torchvision

    return images(torchvision.models.resnet50(), 224, 2)


def inception_v3() -> Case:
    import torchvision

    return images(torchvision.models.inception_v3(aux_logits=False, init_weights=False), 299, 2)


def unet() -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 3, 256, 256), torch.randint(4, (total, 256, 256))

    return Case(UNet(width=32, levels=5), F.cross_entropy, 1, batch)


def vit() -> Case:
    import torchvision

    module = torchvision.models.VisionTransformer(image_size=224, patch_size=16, num_layers=6, num_heads=12, hidden_dim=768, mlp_dim=3072)
    nn.init.normal_(module.heads[0].weight, std=0.02)  # torchvision starts the head at zero
    return images(module, 224, 2)


def gpt() -> Case:
    return texts(GPT(vocabulary=50304, layers=4, hidden=768, heads=12, context=256), 50304, 1, 256)


def bert() -> Case:
    def batch(total: int) -> Batch:
        tokens = torch.randint(1, 30720, (total, 128))
        tokens[:, 120:] = 0  # padding
        return tokens, torch.randint(2, (total, 128)), torch.randint(30720, (total, 128))

    return Case(Bert(vocabulary=30720, hidden=768, layers=4, heads=12, context=128), by_token, 2, batch)


def lstm() -> Case:
    return texts(LstmLanguageModel(vocabulary=33280, hidden=1024, layers=2), 33280, 8, 20)


def nmt() -> Case:
    def batch(total: int) -> Batch:
        return torch.randint(16384, (total, 20)), torch.randint(16384, (total, 20)), torch.randint(16384, (total, 20))

    return Case(Translator(vocabulary=16384, hidden=512, layers=2), by_token, 8, batch)


def dlrm(categories: int, sparse: bool) -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 13), torch.randint(categories, (total, 8, 4)), torch.rand(total).round()

    return Case(DLRM(categories=categories, width=64, sparse=sparse), F.binary_cross_entropy_with_logits, 512, batch)


def mlp() -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 4096), torch.randint(4096, (total,))

    layers = [layer for _ in range(8) for layer in (nn.Linear(4096, 4096), nn.ReLU())]
    return Case(nn.Sequential(*layers[:-1]), F.cross_entropy, 16, batch)


def moe() -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 64, 512), torch.randint(3, (total, 64))

    return Case(MoE(hidden=512, experts=8), by_token, 4, batch)


MODELS: dict[str, Timed] = {
    "alexnet b8": Timed(lambda: alexnet(8), hybrid="one weird trick"),
    "alexnet b32": Timed(lambda: alexnet(32), hybrid="one weird trick"),
    "vgg16": Timed(vgg16, hybrid="one weird trick"),
    "resnet50": Timed(resnet50),
    "inception_v3": Timed(inception_v3),
    "unet": Timed(unet),
    "vit": Timed(vit, "AdamW", tensor_parallel="encoder"),
    "gpt": Timed(gpt, "AdamW", hybrid="megatron", tensor_parallel="gpt"),
    "bert": Timed(bert, "AdamW", tensor_parallel="encoder"),
    "lstm": Timed(lstm, hybrid="vocabulary", rate=10.0),
    "nmt": Timed(nmt),
    "dlrm": Timed(lambda: dlrm(250_000, sparse=False), hybrid="tables", rate=0.01),
    "dlrm sparse": Timed(lambda: dlrm(1_000_000, sparse=True), hybrid="tables", sparse=True, rate=0.01),
    "mlp": Timed(mlp, hybrid="tensor parallel", tensor_parallel="mlp"),
    "moe": Timed(moe),
}
