"""Small modules that together reach every line of docs/exactness.md. Each case is built from a seed; its inputs too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Built:
    module: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[..., Any] | None = None
    train: bool = True
    sample_dims: list[int | None] | None = None


CASES: dict[str, Callable[[], Built]] = {}
ROWS = 5


def case(fn: Callable[[], Built]) -> Callable[[], Built]:
    CASES[fn.__name__] = fn
    return fn


def build(name: str, seed: int = 0) -> Built:
    """The case in float64, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = CASES[name]()
    built.module.double().train(built.train)
    built.inputs = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in built.inputs)
    return built


class Fn(nn.Module):
    """A forward written as a function of the module and its inputs; children and parameters by name."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.body = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.5)


# -- dense -------------------------------------------------------------------------------------------------------------
@case
def mlp() -> Built:
    return Built(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)), (torch.randn(ROWS, 6),))


@case
def mlp_loss() -> Built:
    """One scalar: 1F1B is legal."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return Built(model, (torch.randn(6, 6), torch.randint(4, (6,))), F.cross_entropy)


@case
def products() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        a = torch.addmm(m.bias, x, m.w, beta=0.5, alpha=2.0)
        b = torch.baddbmm(m.stack, a.view(-1, 2, 3).unsqueeze(1).expand(-1, 4, 2, 3).reshape(-1, 8, 3)[:, :2].transpose(1, 2), m.right.expand(x.shape[0], 2, 5))
        return (b @ m.v, torch.matmul(a, m.v6), a.t() @ a)

    return Built(Fn(forward, bias=weights(6), w=weights(4, 6), stack=weights(3, 5), right=weights(2, 5), v=weights(5), v6=weights(6)), (torch.randn(ROWS, 4),))


@case
def frozen_and_unused() -> Built:
    """A frozen weight, one that no path reads, one used under no_grad, a buffer that is read."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = m.a.weight.abs().mean()
        return m.c(torch.relu(m.b(m.a(x)))) * scale + m.shift

    module = Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3), never=nn.Linear(3, 3))
    module.b.weight.requires_grad_(False)
    module.register_buffer("shift", torch.randn(3))
    return Built(module, (torch.randn(ROWS, 4),))


@case
def tied() -> Built:
    """One weight as embedding and as head, and one layer called twice."""

    def forward(m: Any, ids: torch.Tensor) -> torch.Tensor:
        x = m.table(ids)
        x = m.mix(torch.tanh(m.mix(x)))
        return F.linear(x, m.table.weight)

    return Built(Fn(forward, table=nn.Embedding(11, 6, padding_idx=2), mix=nn.Linear(6, 6)), (torch.randint(11, (ROWS, 7)),))


# -- windows -----------------------------------------------------------------------------------------------------------
@case
def conv_bn() -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4, momentum=None), nn.MaxPool2d(2),
    )  # fmt: skip
    return Built(model, (torch.randn(4, 3, 11, 9),))


@case
def conv_bn_eval() -> Built:
    built = conv_bn()
    built.train = False
    built.module[1].running_var.uniform_(0.5, 2)
    return built


@case
def conv1d() -> Built:
    model = nn.Sequential(nn.Conv1d(4, 6, 5, dilation=2, padding=4), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=3, padding="same"), nn.Conv1d(6, 4, 2, stride=3))
    return Built(model, (torch.randn(ROWS, 4, 13),))


@case
def depthwise() -> Built:
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 5), groups=4, padding=(1, 2)), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8, stride=(2, 1)), nn.Conv2d(8, 4, 1))
    return Built(model, (torch.randn(3, 4, 10, 7),))


@case
def conv3d() -> Built:
    return Built(
        nn.Sequential(nn.Conv3d(2, 4, (2, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.AvgPool3d(2, padding=1), nn.ConvTranspose3d(4, 2, 2, stride=2)),
        (torch.randn(3, 2, 5, 6, 5),),
    )


@case
def strides() -> Built:
    """Stride above the kernel: rows that nobody reads; several tiles below a halo."""
    return Built(nn.Sequential(nn.Conv2d(2, 3, 2, stride=3), nn.Tanh(), nn.Conv2d(3, 3, 5, padding=4, dilation=2)), (torch.randn(3, 2, 14, 11),))


@case
def transposed() -> Built:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 4, stride=3, groups=2, dilation=(1, 2)), nn.ConvTranspose2d(6, 2, 1, stride=2),
    )  # fmt: skip
    return Built(model, (torch.randn(3, 3, 4, 3),))


@case
def transposed1d() -> Built:
    return Built(
        nn.Sequential(nn.ConvTranspose1d(3, 4, 5, stride=2, padding=2), nn.ReLU(), nn.ConvTranspose1d(4, 2, 2, stride=4, output_padding=1)),
        (torch.randn(ROWS, 3, 6),),
    )


@case
def pools() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        a = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        b = F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        c = F.avg_pool2d(x, (2, 3), stride=2, padding=1, count_include_pad=False, ceil_mode=True)
        d = F.max_pool2d(x, 2, dilation=2, stride=1)
        e = F.avg_pool2d(x, 2, divisor_override=3)
        return (m.conv(a), b, c, d, e)

    return Built(Fn(forward, conv=nn.Conv2d(2, 2, 1)), (torch.randn(3, 2, 10, 9, requires_grad=True),))


@case
def pools1d() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return F.max_pool1d(y, 3, stride=2, padding=1, ceil_mode=True), F.avg_pool1d(y, 4, padding=2), F.adaptive_avg_pool1d(y, 3), F.adaptive_max_pool1d(y, 4)

    return Built(Fn(forward, conv=nn.Conv1d(3, 4, 2)), (torch.randn(ROWS, 3, 12),))


@case
def adaptive() -> Built:
    """Windows of one size, windows of varying sizes, and to 1x1."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return F.adaptive_avg_pool2d(y, (4, 3)), F.adaptive_avg_pool2d(y, (5, 4)), F.adaptive_max_pool2d(y, (3, 4)), F.adaptive_avg_pool2d(y, 1).flatten(1)

    return Built(Fn(forward, conv=nn.Conv2d(2, 3, 3, padding=1)), (torch.randn(4, 2, 8, 9),))


@case
def unet() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(m.down1(x))
        b = torch.relu(m.down2(F.max_pool2d(a, 2)))
        up = F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)
        return m.out(torch.cat([a, up, x], 1))

    return Built(Fn(forward, down1=nn.Conv2d(2, 3, 3, padding=1), down2=nn.Conv2d(3, 5, 3, padding=1), out=nn.Conv2d(10, 2, 1)), (torch.randn(3, 2, 9, 7),))


@case
def interpolate() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return (
            F.interpolate(y, scale_factor=1.7, mode="nearest"),
            F.interpolate(y, scale_factor=(2.0, 1.5), mode="bilinear", align_corners=False),
            F.interpolate(y, size=(9, 4), mode="bilinear", align_corners=True),
            F.interpolate(y, scale_factor=0.6, mode="bilinear", recompute_scale_factor=True),
            F.interpolate(y, size=(7, 10), mode="bicubic"),
            F.interpolate(y, size=(4, 3), mode="nearest-exact"),
            F.interpolate(y, size=(3, 4), mode="area"),
        )

    return Built(Fn(forward, conv=nn.Conv2d(2, 3, 3, padding=1)), (torch.randn(3, 2, 7, 6),))


@case
def interpolate1d3d() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        return F.interpolate(y, scale_factor=1.5, mode="linear"), F.interpolate(y.unsqueeze(2).unsqueeze(2), size=(2, 3, 5), mode="trilinear")

    return Built(Fn(forward, lin=nn.Linear(6, 6)), (torch.randn(ROWS, 3, 6),))


@case
def pads() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(F.pad(x, (2, 1, 0, 2), value=0.5))
        z = F.pad(y, (1, 2, 2, 1), mode="reflect") + F.pad(y, (1, 2, 2, 1), mode="replicate") + F.pad(y, (1, 2, 2, 1), mode="circular")
        return z, F.pad(y, (-1, 1, 0, -2)), torch.roll(y, (2, -1), (2, 3)), torch.flip(y, (0, 3)), torch.diff(y, dim=2), F.unfold(y, 2, padding=1)

    return Built(Fn(forward, conv=nn.Conv2d(2, 2, 2)), (torch.randn(3, 2, 6, 5),))


# -- sums, statistics, scans -------------------------------------------------------------------------------------------
@case
def norms() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.ln(x)
        z = m.gn(y.transpose(1, 2)) + m.plain(y.transpose(1, 2))
        return m.rms(y), z, F.layer_norm(x, (7, 6)), F.normalize(x, dim=-1), F.rms_norm(x, (7, 6))

    return Built(
        Fn(forward, ln=nn.LayerNorm(6), gn=nn.GroupNorm(3, 6), plain=nn.GroupNorm(2, 6, affine=False), rms=nn.RMSNorm(6, eps=1e-6)), (torch.randn(4, 7, 6),)
    )


@case
def batch_norms() -> Built:
    """1-D, with 3 dims, without running statistics, without affine."""

    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        return m.a(m.lin(x)), m.b(y), m.c(y), m.d(y)

    module = Fn(
        forward,
        lin=nn.Linear(4, 6),
        a=nn.BatchNorm1d(6),
        b=nn.BatchNorm1d(3),
        c=nn.BatchNorm1d(3, track_running_stats=False),
        d=nn.BatchNorm1d(3, affine=False, momentum=0.3),
    )
    return Built(module, (torch.randn(6, 4), torch.randn(6, 3, 5)))


@case
def softmaxes() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        return F.softmax(y, -1), F.log_softmax(y, 1), torch.logsumexp(y, -1), F.softmax(y, 0)

    return Built(Fn(forward, lin=nn.Linear(5, 7)), (torch.randn(4, 3, 5),))


@case
def reductions() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        return (
            y.sum(1), y.mean((1, 2)), y.mean(), y.amax(-1), y.amin(1, keepdim=True), y.max(-1).values, y.var(-1), y.std(1), y.norm(dim=-1), y.norm(),
            y.prod(-1), y.sum(0), torch.linalg.vector_norm(y, 3, dim=(1, 2)), y.median(-1).values,
        )  # fmt: skip

    return Built(Fn(forward, lin=nn.Linear(5, 6)), (torch.randn(4, 3, 5),))


@case
def ties() -> Built:
    """Maxima that many indices share: torch's rule."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = torch.round(x) * m.scale
        return y.amax(-1), y.max(-1).values, y.argmax(-1), F.max_pool1d(y, 3, stride=1), torch.maximum(y, y.flip(-1)), y.amin((1, 2))

    return Built(Fn(forward, scale=weights(1)), (torch.randn(4, 3, 8),))


@case
def scans() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        values, _ = torch.topk(y, 3, dim=-1)
        order, index = torch.sort(y, dim=1)
        return (
            torch.cumsum(y, 1),
            torch.cumprod(torch.sigmoid(y), -1),
            values,
            order,
            torch.gather(x, 1, index),
            torch.logcumsumexp(y, 1),
            torch.fft.rfft(y, dim=1).abs(),
        )

    return Built(Fn(forward, lin=nn.Linear(5, 5)), (torch.randn(4, 6, 5),))


# -- losses ------------------------------------------------------------------------------------------------------------
def token_loss(**options: Any) -> Callable[..., torch.Tensor]:
    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), **options)

    return loss


def language_model() -> nn.Module:
    def forward(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(m.mix(m.table(ids))), m.table.weight)

    return Fn(forward, table=nn.Embedding(13, 6), mix=nn.Linear(6, 6))


def targets(rows: int, tokens: int, classes: int) -> torch.Tensor:
    t = torch.randint(classes, (rows, tokens))
    return torch.where(torch.rand(rows, tokens) < 0.3, -100, t)


@case
def cross_entropy() -> Built:
    """ignore_index: the mean divides by the global count."""
    return Built(language_model(), (torch.randint(13, (ROWS, 6)), targets(ROWS, 6, 13)), token_loss())


@case
def cross_entropy_smooth() -> Built:
    return Built(language_model(), (torch.randint(13, (ROWS, 6)), targets(ROWS, 6, 13)), token_loss(label_smoothing=0.1))


@case
def cross_entropy_weighted() -> Built:
    return Built(
        language_model(), (torch.randint(13, (ROWS, 6)), targets(ROWS, 6, 13)), token_loss(weight=torch.linspace(0.1, 2, 13).double(), label_smoothing=0.05)
    )


@case
def cross_entropy_pixels() -> Built:
    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, target, reduction="sum")

    return Built(nn.Conv2d(2, 4, 3, padding=1), (torch.randn(3, 2, 5, 6), torch.randint(4, (3, 5, 6))), loss)


@case
def losses() -> Built:
    def loss(y: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        total = F.mse_loss(y, t) + F.l1_loss(y, t, reduction="sum") + F.smooth_l1_loss(y, t) + F.huber_loss(y, t)
        total = total + F.binary_cross_entropy_with_logits(y, torch.sigmoid(t)) + F.kl_div(F.log_softmax(y, -1), F.softmax(t, -1), reduction="batchmean")
        masked = (y - t).pow(2) * (t > 0)
        return total + F.nll_loss(F.log_softmax(y, -1), c) + masked.sum() / (t > 0).sum()

    return Built(nn.Linear(4, 6), (torch.randn(ROWS, 4), torch.randn(ROWS, 6), torch.randint(6, (ROWS,))), loss)


# -- attention ---------------------------------------------------------------------------------------------------------
@case
def causal() -> Built:
    """Fused qkv, heads folded into the hidden dim, views; residuals and pre-norm."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        q, k, v = m.qkv(m.ln1(x)).view(b, s, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + m.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, d))
        return x + m.down(F.gelu(m.up(m.ln2(x))))

    return Built(
        Fn(forward, ln1=nn.LayerNorm(6), ln2=nn.LayerNorm(6), qkv=nn.Linear(6, 18), proj=nn.Linear(6, 6), up=nn.Linear(6, 10), down=nn.Linear(10, 6)),
        (torch.randn(3, 7, 6),),
    )


@case
def chunked_qkv() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        q, k, v = (t.reshape(b, s, 4, d // 4).transpose(1, 2) for t in m.qkv(x).split(d, 2))
        return m.proj(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))

    return Built(Fn(forward, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8)), (torch.randn(3, 5, 8),))


@case
def gqa() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = m.q(x).view(b, s, 6, 2).transpose(1, 2)
        k, v = m.kv(x).view(b, s, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return m.o(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))

    return Built(Fn(forward, q=nn.Linear(5, 12), kv=nn.Linear(5, 8), o=nn.Linear(12, 5)), (torch.randn(3, 6, 5),))


@case
def cross_attention() -> Built:
    """Keys of another length (upper-left aligned causal mask), a float bias by head, a boolean mask with one row all masked."""

    def forward(m: Any, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> Any:
        def heads(t: torch.Tensor) -> torch.Tensor:
            return t.unflatten(-1, (2, 3)).transpose(1, 2)

        q, k, v = heads(m.q(x)), heads(m.k(memory)), heads(m.v(memory))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        b = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias)
        c = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return m.o((a + b + c).transpose(1, 2).flatten(2))

    mask = torch.rand(3, 5, 8) < 0.6
    mask[..., 0] = True
    module = Fn(forward, q=nn.Linear(6, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 6), o=nn.Linear(6, 6), bias=weights(2, 5, 8))
    return Built(module, (torch.randn(3, 5, 6), torch.randn(3, 8, 4), mask))


@case
def hand_written_attention() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        s = x.shape[1]
        q, k, v = m.q(x), m.k(x), m.v(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(6)
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
        return torch.bmm(F.softmax(scores, -1), v) + torch.arange(s, dtype=x.dtype)[None, :, None] * 0.1

    return Built(Fn(forward, q=nn.Linear(4, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 5)), (torch.randn(3, 6, 4),))


@case
def multihead() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.attention(x, x, x, need_weights=False)[0]

    return Built(Fn(forward, attention=nn.MultiheadAttention(6, 2, batch_first=True)), (torch.randn(3, 5, 6),))


@case
def encoder_layer() -> Built:
    return Built(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True), (torch.randn(3, 5, 6),))


# -- indexing and layout -----------------------------------------------------------------------------------------------
@case
def views() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        b = x.shape[0]
        y = m.lin(x)  # b 6 8
        a = y.view(b, 3, 2, 8).permute(0, 2, 1, 3).reshape(b, 2, 24)
        c = y.reshape(b, 8, 6) * 2  # awkward: 6x8 -> 8x6
        d = y.reshape(b * 6, 8)[::2]
        e = torch.cat([y[:, 1:3], y[:, -2:] * 3, y.flip(1)[:, :1]], 1)
        f, g, h = torch.split(y, [1, 4, 3], -1)
        i = torch.stack([f.expand(b, 6, 3), h], 1)
        return a, c, d, e, g.unsqueeze(1).squeeze(1), i, y.unfold(1, 3, 2), y.movedim(0, 1), y.select(1, 2), y.repeat(1, 2, 1), y.repeat_interleave(2, 2)

    return Built(Fn(forward, lin=nn.Linear(4, 8)), (torch.randn(4, 6, 4),))


@case
def created() -> Built:
    """arange, zeros, full, eye, tril made inside the graph."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        b, s, d = x.shape
        positions = m.position(torch.arange(s))
        y = x + positions
        z = torch.zeros(b, s, d, dtype=x.dtype) + torch.full((s, 1), 2.0, dtype=x.dtype)
        mask = torch.tril(torch.ones(s, s, dtype=x.dtype))
        return y * z, mask @ y, y.new_ones(b, s, 1) * y.mean(-1, keepdim=True), torch.linspace(0, 1, d, dtype=x.dtype) * y

    return Built(Fn(forward, position=nn.Embedding(9, 4)), (torch.randn(3, 6, 4),))


@case
def broadcasts() -> Built:
    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        z = x.unsqueeze(2) * y.unsqueeze(1) + m.a
        return torch.where(z > 0, z, m.b.expand_as(z)), torch.clamp(z, -0.5, 0.5), z.lerp(m.b, 0.3), torch.addcmul(z, m.a, m.b)

    return Built(Fn(forward, a=weights(4, 1, 3), b=weights(5, 3)), (torch.randn(3, 4, 3), torch.randn(3, 5, 3)))


@case
def einsums() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        return torch.einsum("bsd,hde->bhse", x, m.w), torch.einsum("bsd,btd->bst", x, x), torch.tensordot(x, m.v, 1)

    return Built(Fn(forward, w=weights(2, 4, 3), v=weights(4, 5)), (torch.randn(3, 5, 4),))


@case
def embeddings() -> Built:
    def forward(m: Any, ids: torch.Tensor) -> Any:
        return m.plain(ids), m.padded(ids), m.frequency(ids).sum(1)

    return Built(
        Fn(forward, plain=nn.Embedding(10, 4), padded=nn.Embedding(10, 3, padding_idx=0), frequency=nn.Embedding(10, 4, scale_grad_by_freq=True)),
        (torch.randint(10, (ROWS, 6)),),
    )


@case
def embedding_bags() -> Built:
    def forward(m: Any, ids: torch.Tensor, scales: torch.Tensor) -> Any:
        return m.total(ids, per_sample_weights=scales), m.mean(ids), m.top(ids)

    module = Fn(forward, total=nn.EmbeddingBag(10, 4, mode="sum"), mean=nn.EmbeddingBag(10, 3), top=nn.EmbeddingBag(10, 4, mode="max"))
    return Built(module, (torch.randint(10, (ROWS, 4)), torch.rand(ROWS, 4)))


@case
def indexing() -> Built:
    def forward(m: Any, x: torch.Tensor, index: torch.Tensor) -> Any:
        y = m.lin(x)  # b 6 5
        picked = torch.gather(y, 1, index[:, :, None].expand(-1, -1, 5))
        rows = y.index_select(1, torch.tensor([3, 0, 0, 5]))
        spread = torch.zeros_like(y).scatter_add(1, index[:, :, None].expand(-1, -1, 5), y[:, :4])
        added = y.index_add(1, torch.tensor([1, 1, 4]), rows[:, :3])
        set_where = y.index_put((x[:, :, 0] > 0,), m.table[0, 0])
        return picked, rows, spread, added, set_where, y[:, torch.tensor([1, 2])], m.table[index], y[torch.arange(y.shape[0])[:, None], index]

    return Built(Fn(forward, lin=nn.Linear(4, 5), table=weights(6, 3)), (torch.randn(ROWS, 6, 4), torch.randint(6, (ROWS, 4))))


@case
def mixture() -> Built:
    """Experts on the tokens that choose them, by dense masks and index ops."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        gates = F.softmax(m.gate(x), -1)
        top, chosen = gates.topk(2, -1)
        mixed = torch.zeros_like(gates).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        return torch.stack([e(x) for e in m.experts], -1).mul(mixed.unsqueeze(-2)).sum(-1)

    return Built(
        Fn(forward, gate=nn.Linear(4, 3), experts=nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(3)])),
        (torch.randn(ROWS, 4),),
    )


@case
def branches() -> Built:
    """Paths that may run side by side, and several outputs, one of them unused by others."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        stem = torch.relu(m.stem(x))
        a, b, c = m.a(stem), m.b(stem), m.c(F.max_pool2d(stem, 3, 1, 1))
        joined = torch.cat([a, b, c], 1)
        return {"joined": joined, "pooled": joined.mean((2, 3)), "stem": (stem, 3)}

    module = Fn(
        forward,
        stem=nn.Conv2d(2, 4, 3, padding=1),
        a=nn.Conv2d(4, 2, 1),
        b=nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)),
        c=nn.Conv2d(4, 2, 1),
    )
    return Built(module, (torch.randn(3, 2, 6, 5),))


@case
def inplace() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        y[:, 1:3] = y[:, 1:3] * 2
        y += 1
        y[..., 0].mul_(0.5)
        F.relu_(y)
        m.steps += 1
        return m.b(y) / m.steps

    module = Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    module.register_buffer("steps", torch.zeros(()))
    return Built(module, (torch.randn(ROWS, 4),))


# -- randomness --------------------------------------------------------------------------------------------------------
@case
def dropouts() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = F.dropout(torch.relu(m.a(x)), 0.4)
        z = m.spatial(y.unsqueeze(-1).expand(-1, -1, 3).unsqueeze(-1)).mean((2, 3))
        return (
            m.b(F.dropout(y, 0.3)),
            z,
            torch.bernoulli(torch.sigmoid(y.detach())) * y,
            y + torch.rand_like(y),
            y * torch.randn(y.shape[1], dtype=y.dtype),
            F.alpha_dropout(y, 0.2),
        )

    return Built(Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3), spatial=nn.Dropout2d(0.5)), (torch.randn(ROWS, 4),))


@case
def attention_dropout() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)

    return Built(Fn(forward, qkv=nn.Linear(4, 18)), (torch.randn(3, 6, 4),))


# -- recurrent ---------------------------------------------------------------------------------------------------------
def recurrent(kind: type, layers: int, bidirectional: bool, batch_first: bool, dropout: float = 0.0, bias: bool = True) -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y, state = m.rnn(x)
        return m.head(y), state

    rnn = kind(4, 5, layers, bias=bias, batch_first=batch_first, dropout=dropout, bidirectional=bidirectional)
    shape = (3, 6, 4) if batch_first else (6, 3, 4)
    return Built(Fn(forward, rnn=rnn, head=nn.Linear(10 if bidirectional else 5, 3)), (torch.randn(*shape),), sample_dims=[0 if batch_first else 1])


@case
def lstm() -> Built:
    return recurrent(nn.LSTM, 2, False, True, dropout=0.3)


@case
def lstm_bidirectional() -> Built:
    return recurrent(nn.LSTM, 1, True, False)


@case
def gru() -> Built:
    return recurrent(nn.GRU, 2, True, True, bias=False)


@case
def rnn() -> Built:
    return recurrent(nn.RNN, 1, False, False)


@case
def lstm_state() -> Built:
    """A state given: [layers, rows, hidden], the sample dim is 1."""

    def forward(m: Any, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        y, (hn, cn) = m.rnn(x, (h, c))
        return y, hn, cn

    return Built(Fn(forward, rnn=nn.LSTM(4, 5, 2, batch_first=True)), (torch.randn(3, 5, 4), torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)))


@case
def lstm_cells() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h, c = x.new_zeros(x.shape[0], 5), x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            h, c = m.cell(x[:, t], (h, c))
        return h

    return Built(Fn(forward, cell=nn.LSTMCell(4, 5)), (torch.randn(ROWS, 3, 4),))
