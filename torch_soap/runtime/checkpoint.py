"""state_dict of a parallelized module and of its optimizers: full names and full shapes, whatever the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torch_soap.runtime.parallel import Parallel
from torch_soap.runtime.storage import cut

RANDOM_KEY = "torch_soap_random"  # in a state_dict's _metadata, which plain modules ignore


def install_state_dict(parallel: Parallel) -> None:
    """Hooks on the module: `state_dict()` gathers (collective), `load_state_dict()` cuts."""

    def gather(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        inside[0] = False
        names = aliases(module)
        local_metadata[RANDOM_KEY] = parallel.random.state_dict()
        if any(parallel.is_cut(canonical) for canonical, _ in names):
            parallel.comm.gather_ints([], "state_dict")
        for canonical, name in names:
            key = prefix + name
            if key in state and parallel.is_cut(canonical):
                state[key] = parallel.gather(canonical, state[key]).to(state[key].dtype)

    def scatter(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
        if RANDOM_KEY in local_metadata:
            parallel.random.load_state_dict(local_metadata[RANDOM_KEY])
        for canonical, name in aliases(module):
            key = prefix + name
            if key in state and parallel.is_cut(canonical):
                whole = state[key]
                if tuple(whole.shape) != parallel.shapes[canonical]:
                    raise ValueError(f"[load_state_dict] {key} has shape {list(whole.shape)}, the whole parameter {list(parallel.shapes[canonical])}")
                state[key] = cut(whole, parallel.boxes[canonical])

    inside = [False]  # the root's state_dict calls its children's

    def enter(*_: Any) -> None:
        inside[0] = True

    def guard(child: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not inside[0] and any(parallel.is_cut(n) for n, p in parallel.parameters() if any(p is q for q in child.parameters())):
            raise RuntimeError(f"[torch_soap] state_dict() of the submodule {type(child).__name__} would be this rank's parts: call the whole model's")

    guard.torch_soap = True  # type: ignore[attr-defined]
    parallel.module.register_state_dict_pre_hook(enter)
    for child in parallel.module.modules():
        if child is not parallel.module:
            child.register_state_dict_pre_hook(guard)
    parallel.module._register_state_dict_hook(gather)
    parallel.module._register_load_state_dict_pre_hook(scatter, with_module=True)


def aliases(module: nn.Module) -> list[tuple[str, str]]:
    """(canonical name, name) of every parameter, tied ones under each of their names."""
    first: dict[int, str] = {}
    out = []
    for name, p in module.named_parameters(remove_duplicate=False):
        out.append((first.setdefault(id(p), name), name))
    return out


def cut_states(parallel: Parallel, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[Any, str, nn.Parameter]]:
    """(key, name, parameter) of the states in an optimizer's state_dict that belong to cut parameters. Keys are what its groups list: numbers,
    or names (torch.distributed.checkpoint's)."""
    names = {id(p): n for n, p in parallel.parameters()}
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        for key, p in zip(saved["params"], group["params"], strict=False):
            name = names.get(id(p))
            if name is not None and parallel.is_cut(name) and key in state_dict["state"]:
                yield key, name, p


def gather_optimizer_state(parallel: Parallel, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state_dict with whole tensors. Collective."""
    parallel.comm.gather_ints([], "state_dict of an optimizer")
    state = dict(state_dict["state"])
    for key, name, p in cut_states(parallel, optimizer, state_dict):
        state[key] = {
            k: parallel.gather(name, v).to(v.dtype) if isinstance(v, torch.Tensor) and v.shape == p.shape and v.dim() > 0 else v for k, v in state[key].items()
        }
    return {**state_dict, "state": state}


def cut_optimizer_state(parallel: Parallel, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A whole optimizer state_dict with this rank's parts."""
    state = dict(state_dict["state"])
    for key, name, _ in cut_states(parallel, optimizer, state_dict):
        shape = parallel.shapes[name]
        state[key] = {
            k: cut(v, parallel.boxes[name]).clone() if isinstance(v, torch.Tensor) and tuple(v.shape) == shape and v.dim() > 0 else v
            for k, v in state[key].items()
        }
    return {**state_dict, "state": state}
