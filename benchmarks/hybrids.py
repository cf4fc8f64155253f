"""What experts write by hand for models of many parameters and small batches: hybrids of data and model parallelism, in plain torch.distributed.

Processes feed their own rows, as with DDP. A hybrid has regions of two kinds: in those *by rows* each process has its rows and whole parameters, and gradients
are of its own loss, averaged afterwards; in those *by parts* each process has all rows and a part of the parameters, and gradients are of the mean of all
losses. `enter` and `leave` go from the first kind to the second and back, and bring gradients to their region's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.fidelity_models import DLRM, Case, LstmLanguageModel
from examples.gpt import GPT, Block


def through_all_to_all() -> bool:
    """gloo's own all-gather and reduce-scatter take two to four times as long as an all-to-all of the same bytes."""
    return dist.get_backend() == "gloo"


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """All processes' rows."""
    world = dist.get_world_size()
    out = x.new_empty((world * x.shape[0], *x.shape[1:]))
    if through_all_to_all():
        dist.all_to_all_single(out, x.repeat(world, *[1] * (x.dim() - 1)))
    else:
        dist.all_gather_into_tensor(out, x.contiguous())
    return out


def reduce_scatter(x: torch.Tensor) -> torch.Tensor:
    """The sum's rows of this process."""
    world = dist.get_world_size()
    if through_all_to_all():
        parts = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts, x.contiguous())
        return parts.unflatten(0, (world, -1)).sum(0)
    out = x.new_empty((x.shape[0] // world, *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous())
    return out


class Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return reduce_scatter(grad).mul_(dist.get_world_size())


class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return all_gather(grad / dist.get_world_size())


class ScatterSum(torch.autograd.Function):
    """Within a region by parts: [processes * n, ...] summed over processes, n of them for each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return all_gather(grad)


class SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


class ForAll(torch.autograd.Function):
    """What all processes have alike goes into products by parts: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


class Bags(torch.autograd.Function):
    """[processes * rows, own tables, width] -> [rows, all tables, width]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous())
        return out.unflatten(0, (dist.get_world_size(), -1)).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        world = dist.get_world_size()
        sent = (grad / world).unflatten(1, (world, -1)).transpose(0, 1).flatten(0, 1)
        out = torch.empty_like(sent)
        dist.all_to_all_single(out, sent)
        return out


class CrossEntropyByWords(torch.autograd.Function):
    """The mean over positions, of logits [positions, this process' words]; Megatron's."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        words = logits.shape[1]
        high = logits.amax(1)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        exponentials = (logits - high[:, None]).exp_()
        local = targets - words * dist.get_rank()
        mine = (local >= 0) & (local < words)
        local = local.clamp(0, words - 1)
        sums = torch.stack([exponentials.sum(1), torch.where(mine, logits.gather(1, local[:, None])[:, 0] - high, 0.0)])
        dist.all_reduce(sums)
        exponentials.div_(sums[0][:, None])
        ctx.save_for_backward(exponentials, local, mine)
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        softmax, local, mine = ctx.saved_tensors
        softmax.scatter_add_(1, local[:, None], -mine[:, None].to(softmax.dtype))
        return softmax.mul_(grad / len(softmax)), None


enter: Callable[[torch.Tensor], torch.Tensor] = Enter.apply
leave: Callable[[torch.Tensor], torch.Tensor] = Leave.apply


def part(x: torch.Tensor, dim: int = 0) -> nn.Parameter:
    """This process' part of a parameter."""
    return nn.Parameter(x.detach().chunk(dist.get_world_size(), dim)[dist.get_rank()].clone(memory_format=torch.contiguous_format))


class Hybrid(nn.Module):
    """`by_rows`: parameters of regions by rows that no DDP inside takes care of."""

    def __init__(self) -> None:
        super().__init__()
        self.by_rows: list[nn.Parameter] = []

    def average(self) -> None:
        """Gradients of `by_rows`, as one tensor."""
        grads = [p.grad for p in self.by_rows if p.grad is not None]
        if not grads:
            return
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


class OneWeirdTrick(Hybrid):
    """Krizhevsky 2014: convolutions by rows, fully connected layers by channel."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        module: Any = case.module
        self.loss = case.loss
        self.features = DistributedDataParallel(nn.Sequential(module.features, module.avgpool, nn.Flatten()), static_graph=True, gradient_as_bucket_view=True)
        first, second, third = (m for m in module.classifier if isinstance(m, nn.Linear))
        self.w1, self.b1 = part(first.weight), part(first.bias)
        self.w2, self.b2 = part(second.weight, 1), part(second.bias)
        self.w3, self.b3 = part(third.weight, 1), nn.Parameter(third.bias.detach().clone())
        self.by_rows = [self.b3]

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.linear(enter(self.features(images)), self.w1, self.b1))
        partial = F.linear(x, self.w2)
        by_channel = torch.cat(partial.chunk(dist.get_world_size(), 1))
        x = F.relu(ScatterSum.apply(by_channel) + self.b2)
        return self.loss(leave(F.linear(x, self.w3)) + self.b3, targets)


class Tables(Hybrid):
    """DLRM with its tables over processes: bags go to their rows by all-to-all."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        assert isinstance(case.module, DLRM)
        world, rank = dist.get_world_size(), dist.get_rank()
        self.share = len(case.module.tables) // world
        self.module, self.loss = case.module, case.loss
        self.module.tables = self.module.tables[self.share * rank : self.share * (rank + 1)]
        self.by_rows = [p for n, p in self.module.named_parameters() if not n.startswith("tables.")]

    def forward(self, dense: torch.Tensor, categories: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        world = dist.get_world_size()
        sent = categories.unflatten(1, (world, -1)).transpose(0, 1).contiguous()  # [process, row, table, bag]
        asked = torch.empty_like(sent)
        dist.all_to_all_single(asked, sent)
        asked = asked.flatten(0, 1)
        found = torch.stack([table(asked[:, i]) for i, table in enumerate(self.module.tables)], 1)
        bags = Bags.apply(found).unbind(1)
        return self.loss(self.module.meet(self.module.bottom(dense), bags), targets)


class Vocabulary(nn.Module):
    """An embedding and a loss head by words; tied or not."""

    def __init__(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        super().__init__()
        self.words = part(embedding.weight)
        self.head = self.words if head.weight is embedding.weight else part(head.weight)
        self.bias = None if head.bias is None else part(head.bias)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of this process' rows."""
        local = all_gather(tokens) - len(self.words) * dist.get_rank()
        mine = (local >= 0) & (local < len(self.words))
        found = F.embedding(local.clamp(0, len(self.words) - 1), self.words)
        return leave(found * mine[..., None])

    def cross_entropy(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(enter(x).flatten(0, 1), self.head, self.bias)
        return CrossEntropyByWords.apply(logits, all_gather(targets).flatten())  # type: ignore[no-any-return]


class LanguageModelByVocabulary(Hybrid):
    """The LSTM by rows, its vocabulary by words."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        assert isinstance(case.module, LstmLanguageModel)
        self.vocabulary = Vocabulary(case.module.embedding, case.module.head)
        self.lstm = DistributedDataParallel(case.module.lstm, static_graph=True, gradient_as_bucket_view=True)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.cross_entropy(self.lstm(self.vocabulary.embed(tokens))[0], targets)


class MegatronBlock(nn.Module):
    """Shoeybi et al. 2019, with norms and sums by rows between reduce-scatters and all-gathers (Korthikanti et al. 2022)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.width = block.proj.out_features // block.heads
        self.qkv = part(block.qkv.weight.unflatten(0, (3, -1)), 1)
        self.qkv_bias = part(block.qkv.bias.unflatten(0, (3, -1)), 1)
        self.proj, self.proj_bias = part(block.proj.weight, 1), block.proj.bias
        self.up, self.up_bias = part(block.up.weight), part(block.up.bias)
        self.down, self.down_bias = part(block.down.weight, 1), block.down.bias

    def by_rows(self) -> list[nn.Parameter]:
        return [*self.norm1.parameters(), *self.norm2.parameters(), self.proj_bias, self.down_bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(enter(self.norm1(x)), self.qkv.flatten(0, 1), self.qkv_bias.flatten())
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in y.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + leave(F.linear(y, self.proj)) + self.proj_bias
        y = F.gelu(F.linear(enter(self.norm2(x)), self.up, self.up_bias))
        return x + leave(F.linear(y, self.down)) + self.down_bias


class Megatron(Hybrid):
    def __init__(self, case: Case) -> None:
        super().__init__()
        assert isinstance(case.module, GPT)
        self.positions, self.norm = case.module.positions, case.module.norm
        self.vocabulary = Vocabulary(case.module.tokens, case.module.head)
        self.blocks = nn.ModuleList(MegatronBlock(b) for b in case.module.blocks if isinstance(b, Block))
        self.by_rows = [*self.positions.parameters(), *self.norm.parameters()]
        for block in self.blocks:
            self.by_rows += block.by_rows()  # type: ignore[operator]

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.vocabulary.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.vocabulary.cross_entropy(self.norm(x), targets)


class Pairs(Hybrid):
    """An MLP of layers by output and by input channel in turns; all rows on every process."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.loss = case.loss
        layers = [m for m in case.module.modules() if isinstance(m, nn.Linear)]
        self.first = nn.ParameterList(p for m in layers[::2] for p in (part(m.weight), part(m.bias)))
        self.second = nn.ParameterList(p for m in layers[1::2] for p in (part(m.weight, 1), nn.Parameter(m.bias.detach().clone())))

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = all_gather(x)
        for i in range(0, len(self.first), 2):
            if i:
                x = F.relu(x)
            y = F.relu(F.linear(ForAll.apply(x), self.first[i], self.first[i + 1]))
            x = SumOverProcesses.apply(F.linear(y, self.second[i])) + self.second[i + 1]
        return self.loss(x, all_gather(targets))


KINDS: dict[str, Callable[[Case], Hybrid]] = {
    "one weird trick": OneWeirdTrick, "tables": Tables, "vocabulary": LanguageModelByVocabulary, "megatron": Megatron, "tensor parallel": Pairs,
}  # fmt: skip
