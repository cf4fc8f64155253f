"""The lists of a module's parts are made anew when, and only when, the module has changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torch_soap.runtime.tree import ModuleTree
from torch_soap.runtime.watch import AttributeWatch


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3)))


def rename(m: nn.Module) -> None:
    child = m._modules.pop("2")
    m.add_module("last", child)


def swap(m: nn.Module) -> None:
    m[0], m[2][0] = m[2][0], m[0]


def tie(m: nn.Module) -> None:
    m[2][0].weight = m[0].weight


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "parameter replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(3, 3))),
    "parameter replaced in the dict": lambda m: m[0]._parameters.update(weight=nn.Parameter(torch.zeros(3, 3))),
    "parameter tied": tie,
    "parameter gone": lambda m: setattr(m[0], "bias", None),
    "submodule added": lambda m: m[2].append(nn.ReLU()),
    "submodule renamed": rename,
    "submodules swapped": swap,
    "buffer added": lambda m: m[0].register_buffer("more", torch.zeros(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    m = model()
    tree = ModuleTree(m)
    before = tree.now()
    CHANGES[change](m)
    after = tree.now()
    assert after is not before
    assert after.named.keys() == dict(m.named_parameters()).keys()
    assert all(after.named[n] is p for n, p in m.named_parameters())
    assert after.every_name.keys() == dict(m.named_parameters(remove_duplicate=False)).keys()
    assert after.buffers.keys() == dict(m.named_buffers()).keys()


def test_what_steps_do_changes_nothing() -> None:
    m = model()
    tree = ModuleTree(m)
    before = tree.now()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    m(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    m.load_state_dict(model().state_dict())
    m[1].running_mean = torch.ones(3)  # read from its module at each call
    assert m.eval().train() is m and tree.now() is before


def test_modes_and_frozen_parameters_have_numbers() -> None:
    m = model()
    watch = AttributeWatch(ModuleTree(m))
    training = watch.look(), watch.mode
    m[1].eval()
    mixed = watch.look(), watch.mode
    assert mixed[0] != training[0] and mixed[1] != training[1]
    m.train()
    assert (watch.look(), watch.mode) == training
    m[0].weight.requires_grad_(False)
    assert watch.look() != training[0] and watch.mode == training[1] and watch.frozen[0] is False
    m[0].weight.requires_grad_(True)
    m.double()
    assert watch.look() != training[0] and watch.mode not in (training[1], mixed[1])
