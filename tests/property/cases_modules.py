"""Cases of tables, parametrizations and recurrent layers with all that they can be told."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from tests.property.cases import ROWS, Built, Fn, case, weights


@case
def max_norm() -> Built:
    """The lookup scales long rows of its table down, in place."""

    def forward(m: Any, ids: torch.Tensor) -> Any:
        return m.head(m.table(ids)), m.table(ids[:, :2])

    table = nn.Embedding(10, 4, max_norm=1.0, padding_idx=3)
    return Built(Fn(forward, table=table, head=nn.Linear(4, 3)), (torch.randint(10, (ROWS, 6)),))


@case
def clamped() -> Built:
    """Weights written in forward: past autograd, and under no_grad."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        m.a.weight.detach().clamp_(-0.3, 0.3)
        with torch.no_grad():
            m.b.weight[0].mul_(0.5)
        return m.b(torch.tanh(m.a(x)))

    return Built(Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3)), (torch.randn(ROWS, 4),))


@case
def sparse_tables() -> Built:
    def forward(m: Any, ids: torch.Tensor) -> Any:
        return m.head(m.table(ids)), m.bags(ids)

    module = Fn(forward, table=nn.Embedding(10, 4, sparse=True, padding_idx=3), bags=nn.EmbeddingBag(10, 3, mode="sum", sparse=True), head=nn.Linear(4, 3))
    return Built(module, (torch.randint(10, (ROWS, 6)),))


@case
def ragged_bags() -> Built:
    """Offsets given: the global batch only, over processes they are refused."""

    def forward(m: Any, ids: torch.Tensor, offsets: torch.Tensor) -> Any:
        return m.head(m.mean(ids, offsets)), m.total(ids, offsets)

    module = Fn(forward, mean=nn.EmbeddingBag(10, 4), total=nn.EmbeddingBag(10, 3, mode="sum", padding_idx=2), head=nn.Linear(4, 3))
    return Built(module, (torch.randint(10, (13,)), torch.tensor([0, 3, 3, 7, 12])), sample_dims=[None, 0])


@case
def padded_bags() -> Built:
    """What ragged bags are over processes."""

    def forward(m: Any, ids: torch.Tensor) -> Any:
        return m.head(m.mean(ids)), m.total(ids)

    module = Fn(forward, mean=nn.EmbeddingBag(10, 4, padding_idx=0), total=nn.EmbeddingBag(10, 3, mode="sum", padding_idx=2), head=nn.Linear(4, 3))
    return Built(module, (torch.randint(10, (ROWS, 4)),))


@case
def weight_norms() -> Built:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 5), dim=None), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(5, 4), dim=1),
    )  # fmt: skip
    return Built(model, (torch.randn(ROWS, 4),))


@case
def spectral_norms() -> Built:
    """The power iteration writes buffers in train mode."""
    head = parametrizations.spectral_norm(nn.Linear(48, 3), n_power_iterations=2)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 4, 3, padding=1)), nn.ReLU(), nn.Flatten(), head)
    return Built(model, (torch.randn(ROWS, 2, 4, 3),))


@case
def spectral_norms_eval() -> Built:
    built = spectral_norms()
    built.train = False
    return built


@case
def orthogonals() -> Built:
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(4, 6), orthogonal_map="householder"), nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(6, 3), orthogonal_map="cayley"),
    )  # fmt: skip
    return Built(model, (torch.randn(ROWS, 4),))


class LowRank(nn.Module):
    def __init__(self, rows: int, columns: int, rank: int = 2) -> None:
        super().__init__()
        self.a, self.b = weights(rank, columns), weights(rows, rank)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w + self.b @ self.a * 0.5


@case
def low_rank() -> Built:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))
    return Built(model, (torch.randn(ROWS, 4),))


# -- recurrent ---------------------------------------------------------------------------------------------------------
def stateful(rnn: nn.Module, hidden: int, layers: int, out: int, batch_first: bool, cell: int = 0) -> Built:
    """A state given, its gradient asked for."""

    def forward(m: Any, x: torch.Tensor, *state: torch.Tensor) -> Any:
        y, last = m.rnn(x, state if len(state) == 2 else state[0])
        return m.head(y), last

    shape = (3, 5, 4) if batch_first else (5, 3, 4)
    states = [torch.randn(layers, 3, hidden, requires_grad=True)] + ([torch.randn(layers, 3, cell)] if cell else [])
    return Built(Fn(forward, rnn=rnn, head=nn.Linear(out, 3)), (torch.randn(*shape), *states), sample_dims=[0 if batch_first else 1] + [1] * len(states))


@case
def lstm_projected() -> Built:
    rnn = nn.LSTM(4, 5, 2, proj_size=3, dropout=0.3, bidirectional=True, batch_first=True)
    return stateful(rnn, 3, 4, 6, True, cell=5)


@case
def lstm_projected_plain() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y, (h, c) = m.rnn(x)
        return y, h, c

    return Built(Fn(forward, rnn=nn.LSTM(4, 5, proj_size=2, bias=False)), (torch.randn(6, 3, 4),), sample_dims=[1])


@case
def gru_state() -> Built:
    return stateful(nn.GRU(4, 5, 2, dropout=0.3, bidirectional=True), 5, 4, 10, False)


@case
def rnn_relu() -> Built:
    return stateful(nn.RNN(4, 5, 2, nonlinearity="relu", dropout=0.3, bidirectional=True, batch_first=True), 5, 4, 10, True)


@case
def cells() -> Built:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h, g = x.new_zeros(x.shape[0], 5), x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            h = m.gru(x[:, t], h)
            g = m.rnn(x[:, t] * h[:, :4], g)
        return h + g

    return Built(Fn(forward, gru=nn.GRUCell(4, 5), rnn=nn.RNNCell(4, 5, nonlinearity="relu")), (torch.randn(ROWS, 3, 4),))


@case
def drawn_whole() -> Built:
    """Random operators without a rule run whole, with the same numbers everywhere; torch's in-place fills."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        fixed = y.detach()
        chances = torch.sigmoid(fixed.nan_to_num(0.0, 0.0, 0.0)).clamp(0.1, 0.9)
        return (
            F.rrelu(y, training=True),
            y * torch.empty_like(y).exponential_(2.0),
            torch.normal(fixed, 1.5) * y,
            y * torch.empty_like(y).normal_(1, 2) + torch.empty_like(y).uniform_(-1, 1),
            y * torch.empty_like(y).bernoulli_(chances[:1]),
            torch.native_dropout(y, 0.5, True)[0],
            y * torch.multinomial(chances, 2).sum(-1, keepdim=True),
            y[torch.randperm(y.shape[0])],
            y * torch.poisson(chances),
        )

    return Built(Fn(forward, lin=nn.Linear(4, 5)), (torch.randn(ROWS, 4),))


# -- arguments that change what a rule computes ------------------------------------------------------------------------
@case
def resampled() -> Built:
    """align_corners, scale given against size given, antialias."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return (
            F.interpolate(y, scale_factor=1.7, mode="bicubic", align_corners=True),
            F.interpolate(y, scale_factor=(0.6, 1.3), mode="bicubic"),
            F.interpolate(y, size=(3, 4), mode="bilinear", antialias=True),
            F.interpolate(y, scale_factor=0.5, mode="bicubic", antialias=True),
            F.interpolate(y, scale_factor=1.3, mode="nearest-exact"),
            F.interpolate(y, scale_factor=1.3, mode="bilinear", align_corners=True, recompute_scale_factor=True),
        )

    return Built(Fn(forward, conv=nn.Conv2d(2, 3, 3, padding=1)), (torch.randn(3, 2, 7, 6),))


@case
def masks() -> Built:
    """Boolean and float masks that broadcast, with grouped heads; dropout with a mask."""

    def forward(m: Any, x: torch.Tensor, keep: torch.Tensor) -> Any:
        b, s, _ = x.shape
        q = m.q(x).view(b, s, 4, 3).transpose(1, 2)
        k, v = m.kv(x).view(b, s, 2, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return (
            F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], enable_gqa=True),
            F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias, enable_gqa=True),
            F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=m.bias[0], dropout_p=0.3, scale=0.5),
            F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], attn_mask=torch.ones(s, s, dtype=torch.bool).tril()),
        )

    keep = torch.rand(3, 6) < 0.7
    keep[:, 0] = True
    return Built(Fn(forward, q=nn.Linear(5, 12), kv=nn.Linear(5, 12), bias=weights(1, 1, 6)), (torch.randn(3, 6, 5), keep))


@case
def more_losses() -> Built:
    """Probabilities as targets, smoothing with ignored rows and class weights, targets in 2-D, and others by rows."""

    def loss(y: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        share = torch.linspace(0.5, 2, 6, dtype=y.dtype)
        flat, pixels = y.mean(1), y.transpose(1, 2)  # b 6; b 6 7
        classes = torch.where(c == 0, -100, c)
        total = F.cross_entropy(flat, t.softmax(-1), weight=share, label_smoothing=0.1) + F.cross_entropy(flat, t.softmax(-1))
        total = total + F.cross_entropy(pixels, classes, weight=share, label_smoothing=0.2) + F.nll_loss(pixels.log_softmax(1), classes, weight=share)
        total = total + F.binary_cross_entropy_with_logits(flat, t.sigmoid(), pos_weight=share, weight=share.flip(0))
        total = total + F.poisson_nll_loss(flat, t.exp()) + F.soft_margin_loss(flat, t.sign()) + F.multi_margin_loss(flat, c[:, 0])
        return total + F.cosine_embedding_loss(flat, t, torch.where(c[:, 0] > 2, 1, -1)) + F.triplet_margin_loss(flat, t, t.flip(-1))

    return Built(nn.Linear(4, 6), (torch.randn(ROWS, 7, 4), torch.randn(ROWS, 6), torch.randint(6, (ROWS, 7))), loss)


@case
def ctc() -> Built:
    """Opaque: what it makes hangs on the lengths' values."""

    def loss(y: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(y.transpose(0, 1).log_softmax(-1), c, torch.full((y.shape[0],), 7), torch.full((y.shape[0],), 3))

    return Built(nn.Linear(4, 6), (torch.randn(ROWS, 7, 4), torch.randint(1, 6, (ROWS, 3))), loss)


@case
def running_norms() -> Built:
    """Instance norm with running statistics, batch norm cumulative over calls, group norm of images."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return m.instance(y), m.cumulative(y), m.group(y), m.sync(y)

    norms = {"instance": nn.InstanceNorm1d(4, affine=True, track_running_stats=True), "cumulative": nn.BatchNorm1d(4, momentum=None)}
    return Built(
        Fn(forward, conv=nn.Conv1d(2, 4, 3, padding=1), group=nn.GroupNorm(2, 4), sync=nn.BatchNorm1d(4, eps=0.1), **norms), (torch.randn(ROWS, 2, 6),)
    )
