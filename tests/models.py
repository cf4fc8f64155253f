"""The models that tests train: each a small module with a global batch and, when it has one, a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision.models as tv
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT, next_byte_loss
from tests.architectures import DLRM, T5, Bert, LSTMLanguageModel, MoE, Translator, UNet


@dataclass
class Example:
    """`inputs` is the global batch; with a loss its last one is the target.

    `outside` is a loss that each process computes itself, of its own rows: outside(output, *inputs).
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[..., Any] | None = None
    outside: Callable[..., Any] | None = None


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
    widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]  # an eighth of configuration A
    model = tv.VGG(tv.vgg.make_layers(widths), num_classes=10)
    model.classifier[0], model.classifier[3], model.classifier[6] = nn.Linear(64 * 49, 16), nn.Linear(16, 24), nn.Linear(24, 10)
    return image_example(model, 64)


def resnet18() -> Example:
    return image_example(tv.ResNet(tv.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10), 64)


class SlimConv(tv.inception.BasicConv2d):
    """Inception's unit with an eighth of the channels."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__(in_channels // 8 if in_channels > 3 else in_channels, out_channels // 8, **kwargs)


def inception() -> Example:
    names = ["InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"]
    blocks = [functools.partial(getattr(tv.inception, n), conv_block=SlimConv) for n in names]
    model = tv.Inception3(num_classes=10, aux_logits=False, init_weights=False, inception_blocks=[SlimConv, *blocks, tv.inception.InceptionAux])
    model.fc = nn.Linear(256, 10)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.1  # with 1e-3, 94 layers of fresh weights amplify rounding: one process with permuted rows moves by 3e-9
    return image_example(model, 107)


def mobilenet() -> Example:
    return image_example(tv.mobilenet_v3_small(num_classes=10, width_mult=0.25), 64)


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
    return Example(tiny_gpt(), (torch.randint(32, (4, 12)),), outside=lambda logits, tokens: next_byte_loss(logits[:, :-1], tokens[:, 1:]))


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


# One hybrid plan for 2 devices each, which reaches what is special about the model.
ALEXNET = """
features.0    n=2
features.3    h=2
features.6    h=[0,1,3]
features.8    k=2 store=k
classifier.1  o=2 store=o
classifier.4  i=2 store=i
classifier.6  n=2x2t @ [1,0]
*             n=fed
"""
VGG = """
features.0    h=2
features.3    w=2
features.6    h=[0,5,16]
features.8    k=2 store=k
features.11   c=2
features.16   n=2 @ [1,0]
classifier.0  i=2 store=i
classifier.3  o=2 store=o
*             n=fed
"""
RESNET = """
conv1             h=2
maxpool           h=2
bn1               c=2
layer1.0.conv1    k=2 store=k
layer1.0.bn1      n=2
layer2.0.conv1    n=2 store=shard
layer3.0.downsample.0  @ [1]
layer3.0.conv1    @ [0]
layer4.1.bn2      h=2
fc                o=2 store=o
*                 n=fed
"""
INCEPTION = """
Conv2d_1a_3x3.conv     h=2
Mixed_5b.branch1x1*    @ [0]
Mixed_5b.branch5x5*    @ [1]
Mixed_5b.branch3x3*    @ [0]
Mixed_5b.branch_pool*  @ [1]
Mixed_6c.branch7x7_*   w=2
Mixed_7b.branch3x3*    k=2
fc                     i=2
*                      n=fed
"""
MOBILENET = """
features.0.0           h=2
features.1.block.0.0   g=2 store=g
features.2.block.1.0   w=2
features.4.block.1.1   c=2
features.4.block.2.*   @ [1]
classifier.0           o=2 store=o
classifier.3           i=2 store=i
*                      n=fed
"""
VIT = """
conv_proj                                          k=2 store=k
encoder.layers.encoder_layer_0.ln_1                d=2
encoder.layers.encoder_layer_0*scaled_dot_product* h=2
encoder.layers.encoder_layer_1*scaled_dot_product* s=2
encoder.layers.encoder_layer_0.mlp.0               o=2 store=o
encoder.layers.encoder_layer_0.mlp.3               i=2 store=i
encoder.layers.encoder_layer_1.mlp.0               n=2x2t @ [1,0]
*                                                  n=fed
"""
UNET = """
down1.0   h=2
down1.1   h=2
down2.3   w=[0,3,8]
up2       h=2
/cat      d1=2
join2.0   c=2
up1       k=2 store=k
join1.0   n=2 @ [1,0]
out       h=[0,13,20]
*         n=fed
"""
GPT_MEGATRON = """
tokens         v=2 store=v
blocks.0.qkv   o=2 store=o
blocks.0/scaled_dot_product_attention  h=2
blocks.0.proj  i=2 store=i
blocks.0.up    o=2 store=o
blocks.0.down  i=2 store=i
blocks.1/scaled_dot_product_attention  s=[0,5,12]
blocks.1.up    s=2
head           o=2
*              n=fed
"""
GPT_KEYS = """
tokens         d=2
blocks.0/scaled_dot_product_attention  t=2
blocks.0.norm2 d=2
blocks.0.up    n=2x2t store=shard
blocks.1/scaled_dot_product_attention  s=2z
blocks.1*      @ [1]
/ce_rows       n=2
*              n=fed
"""
BERT = """
words                           v=2 store=v
layers.0*scaled_dot_product*    s=2
layers.1*scaled_dot_product*    t=2
layers.0.norm1                  d=2
layers.0.linear1                o=2 store=o
layers.0.linear2                i=2 store=i
layers.1.linear1                s=2
layers.1.linear2                n=2 @ [1,0]
*                               n=fed
"""
T5_PLAN = """
shared/embedding           v=2 store=v
shared/embedding.1         d=2
encoder.0.attention.q      o=2 store=o
encoder.0.attention.o      i=2 store=i
encoder.1*                 @ [1]
decoder.0.cross/softmax    d3=2
decoder.0.cross/matmul     o=2
decoder.1.attention/matmul.1  i=2
decoder.1.up               n=2x2t
*                          n=fed
"""
LSTM_PLAN = """
words              d=2
lstm/lstm_layer    t=2
lstm/lstm_layer.1  o=2 store=shard
head               o=2 store=o
*                  n=fed
"""
NMT = """
source                v=2
encoder/lstm_layer    @ [0]
encoder/lstm_layer.1  t=3 @ [1,0,1]
decoder/lstm_layer    t=2 @ [1,0]
decoder/lstm_layer.1  n=2
/softmax              d2=2
head                  o=2 store=o
*                     n=fed
"""
DLRM_PLAN = """
bags.0   v=2 store=v
bags.1   d=2 store=d
bags.2   @ [1] store=whole
bottom.0 o=2 store=o
bottom.2 i=2 store=i
top.0    n=[0,2,6] @ [1,0]
*        n=fed
"""
MOE_PLAN = """
experts.0.*  @ [0]
experts.1.*  @ [1]
experts.2.*  n=2x2t
experts.3.0  o=2 store=o
experts.3.2  i=2 store=i
gate         i=2
*            n=fed
"""

CASES = [
    Case("alexnet", alexnet, [ALEXNET]),
    Case("vgg11", vgg11, [VGG]),
    Case("resnet18", resnet18, [RESNET]),
    Case("inception", inception, [INCEPTION]),
    Case("mobilenet", mobilenet, [MOBILENET]),
    Case("vit", vit, [VIT]),
    Case("unet", unet, [UNET]),
    Case("gpt_inside", gpt_inside, [GPT_MEGATRON]),
    Case("gpt_loss", gpt_loss, [GPT_KEYS]),
    Case("gpt_outside", gpt_outside, [GPT_MEGATRON]),
    Case("bert", bert, [BERT]),
    Case("t5", t5, [T5_PLAN]),
    Case("lstm", lstm, [LSTM_PLAN]),
    Case("nmt", nmt, [NMT]),
    Case("dlrm", dlrm, [DLRM_PLAN]),
    Case("moe", moe, [MOE_PLAN]),
]


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)
