"""Cases of the operators that capture writes as others, and of reading and writing at given places."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.property.cases import ROWS, Built, Fn, case, weights


@case
def einsum_forms() -> Built:
    """Implicit output, ellipsis, a dim of size 1 that broadcasts, three operands, a letter summed in one operand alone, a diagonal."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        scores = torch.einsum("...sd,...td", x, x * m.one)
        return (
            scores,
            torch.einsum("bsd,de,ef->bfs", x, m.w, m.v),
            torch.einsum("bsd,e->eb", x, m.one.new_ones(3) * m.v[0, 0]),
            torch.einsum("bsd,xsd->bs", x, m.one[:, None].expand(1, 5, 4)),
            torch.einsum("bss->bs", scores),
        )

    return Built(Fn(forward, w=weights(4, 3), v=weights(3, 2), one=weights(1, 4)), (torch.randn(3, 5, 4),))


@case
def distances() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        return (
            torch.cdist(y, m.centres),
            torch.cdist(y, m.many),
            torch.outer(y[:, 0, 0], m.centres[0]),
            F.cosine_similarity(y, m.centres[:1], dim=-1),
            F.cosine_similarity(y, x, 1),
        )

    return Built(Fn(forward, lin=nn.Linear(4, 4), centres=weights(6, 4), many=weights(30, 4)), (torch.randn(ROWS, 3, 4),))


@case
def rearranged() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)  # b 8 6 4
        return (
            torch.roll(y, 5),
            torch.roll(y, (1, -2), (1, 3)),
            y.repeat(1, 2, 1, 3).mean(0),
            torch.tile(y, (2, 1)),
            y.repeat_interleave(3, 2),
            F.pixel_shuffle(y, 2),
            F.pixel_unshuffle(y, 2),
            F.channel_shuffle(y, 4),
            y.unfold(2, 3, 2),
        )

    return Built(Fn(forward, conv=nn.Conv2d(2, 8, 3, padding=1)), (torch.randn(3, 2, 6, 4),))


@case
def windows() -> Built:
    """unfold and fold of images: padding, stride, dilation."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        columns = F.unfold(y, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
        return columns, F.fold(F.unfold(y, 3, padding=1), (6, 7), 3, padding=1) * y, torch.diff(y, n=2, dim=-1), torch.diff(y, dim=1, prepend=y[:, :1])

    return Built(Fn(forward, conv=nn.Conv2d(2, 3, 1)), (torch.randn(3, 2, 6, 7),))


@case
def index_forms() -> Built:
    """Negative places, several index tensors that broadcast, side by side or not, one after a slice."""

    def forward(m: Any, x: torch.Tensor, index: torch.Tensor) -> Any:
        y = m.lin(x)  # b 6 5
        return (
            y[:, torch.tensor([-1, 0, -1])],
            y[:, torch.tensor([[0], [2]]), torch.tensor([1, 4, 4])],
            y[torch.tensor([0, 0]), :, torch.tensor([1, 3])],
            m.table[index, :, index % 3],
            m.table[index[:, 0]],
        )

    return Built(Fn(forward, lin=nn.Linear(4, 5), table=weights(6, 2, 3)), (torch.randn(ROWS, 6, 4), torch.randint(6, (ROWS, 3))), sample_dims=[0, 0])


@case
def written() -> Built:
    """index_put with and without accumulation (the same place twice), scatter, index_add, masked writes."""

    def forward(m: Any, x: torch.Tensor, index: torch.Tensor) -> Any:
        y = m.lin(x)  # b 6 5
        places = (torch.tensor([1, 4]), torch.tensor([0, 2]))
        put = y.clone()
        put[:, torch.tensor([0, 3])] = m.row
        added = y.index_put((torch.arange(y.shape[0])[:, None], index), m.row, accumulate=True)
        once = torch.zeros_like(y).index_put((torch.arange(y.shape[0]), index[:, 0]), y[:, 1])
        spread = y.permute(1, 2, 0).index_put(places, y[:, 0, :2].t(), accumulate=True)
        return put, added, once, spread, y.scatter(1, index[:, :, None].expand(-1, -1, 5) * 0 + 2, 1.5), torch.where(y > 0, y, m.row)

    return Built(Fn(forward, lin=nn.Linear(4, 5), row=weights(5)), (torch.randn(ROWS, 6, 4), torch.randint(6, (ROWS, 3))))


@case
def extremes() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        top, place = y.max(1)
        return top, place, y.min(-1, keepdim=True)[0], y.max(), y.topk(2, 1)[0], y.sort(1)[0], y.kthvalue(2, -1)[0], y.cummax(1)[0], y.amin((0, 2)) + y.min()

    return Built(Fn(forward, lin=nn.Linear(4, 5)), (torch.randn(ROWS, 6, 4),))


@case
def gates() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        z = m.prelu(y) + m.one(F.glu(y, 1).repeat(1, 2, 1))
        return z, F.instance_norm(y), m.norm(y), F.glu(y, -1)

    members = {"conv": nn.Conv1d(2, 4, 3, padding=1), "prelu": nn.PReLU(4), "one": nn.PReLU(), "norm": nn.InstanceNorm1d(4, affine=True)}
    return Built(Fn(forward, **members), (torch.randn(ROWS, 2, 6),))


@case
def divergences() -> Built:
    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        p, q = m.lin(x).log_softmax(-1), m.lin(y).log_softmax(-1)
        return (
            F.kl_div(p, q, log_target=True, reduction="batchmean"),
            F.kl_div(p, q.exp()),
            F.mse_loss(p, q, reduction="sum"),
            F.kl_div(p, q.exp(), reduction="none"),
        )

    return Built(Fn(forward, lin=nn.Linear(4, 5)), (torch.randn(ROWS, 4), torch.randn(ROWS, 4)))


@case
def counted() -> Built:
    """Bins and places of values: nothing here has a gradient but what they scale."""

    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)  # b 6 5
        bins = torch.linspace(-1, 1, 4, dtype=x.dtype)
        kinds = torch.bucketize(y.detach(), bins)
        return (
            torch.histc(y.detach(), 4, -1, 1) * m.lin.bias[:4],
            F.one_hot(kinds, 5).to(x.dtype) * y[..., None],
            torch.searchsorted(bins, y.detach(), right=True) * y,
            torch.tril(y, -1),
            torch.triu(y @ y.mT, 1),
            torch.tril(m.square) @ y,
        )

    return Built(Fn(forward, lin=nn.Linear(4, 5), square=weights(6, 6)), (torch.randn(ROWS, 6, 4),))


@case
def made() -> Built:
    def forward(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)  # b 6 5
        rows, columns = torch.meshgrid(torch.arange(6, dtype=x.dtype), torch.arange(0.5, 3, 0.5, dtype=x.dtype), indexing="ij")
        across, down = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="xy")
        grid = rows * columns + (across - down)
        a, b = torch.broadcast_tensors(y, m.lin.bias)
        return (
            y * grid,
            y @ torch.eye(5, dtype=x.dtype),
            torch.ones_like(y) * a + torch.zeros_like(b),
            torch.full_like(y, 2.0) * y,
            torch.eye(6, 5, dtype=x.dtype) * y,
        )

    return Built(Fn(forward, lin=nn.Linear(4, 5)), (torch.randn(3, 6, 4),))
