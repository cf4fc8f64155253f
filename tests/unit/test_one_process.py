"""With one process parallelize adds nothing but `plan` and `no_sync`, for loops that ask for them: no class, forward or hook of ours, on the
module or in torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import torch_soap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def in_torch() -> list[object]:
    return [
        dict(torch_optimizer._global_optimizer_pre_hooks),
        dict(torch_optimizer._global_optimizer_post_hooks),
        torch.nn.utils.clip_grad._get_total_norm,
        torch.amp.GradScaler._unscale_grads_,
        nn.init._calculate_fan_in_and_fan_out,
    ]


def hooks_of(module: nn.Module) -> list[object]:
    return [hooks for m in module.modules() for name, hooks in vars(m).items() if "hooks" in name and hooks]


def test_nothing_of_ours() -> None:
    net, before = Net(), in_torch()
    attributes = {id(m): list(vars(m)) for m in net.modules()}
    assert torch_soap.parallelize(net, torch.randn(4, 3)) is net
    assert type(net) is Net and net.forward.__func__ is Net.forward
    attributes[id(net)] += ["plan", "no_sync"]
    assert attributes == {id(m): list(vars(m)) for m in net.modules()}
    assert hooks_of(net) == [] and all(not p._backward_hooks for p in net.parameters())
    assert in_torch() == before


def test_loss_is_called_after_the_forward() -> None:
    net = Net()
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    wanted = nn.functional.mse_loss(net(x), y)
    assert torch.equal(torch_soap.parallelize(net, loss=nn.functional.mse_loss)(x, y), wanted)
    assert hooks_of(net) == []
