"""Copies of a parallelized module: plain ones with whole parameters, and parallelized ones on the same plan."""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch_soap.runtime.parallel import Parallel

# What the root has of us, and compiled calls, which would call the original.
OURS = ("_soap", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_compiled_call_impl")


def plain_copy(parallel: Parallel, memo: dict[int, Any], for_capture: bool = False) -> nn.Module:
    """A copy of the module that knows nothing of us, with whole parameters. Collective where anything is cut.

    for_capture: without the module's own hooks, which run around the parallel forward.
    """
    with parallel.whole_parameters():
        twin = bare_copy(parallel, memo)
    return without_hooks(twin) if for_capture else twin


def parallel_copy(parallel: Parallel, memo: dict[int, Any]) -> Parallel:
    """Behind a copy of the module with the same parts on the same plan, also where that is still to be made."""
    other = type(parallel)(bare_copy(parallel, memo), parallel.comm, loss=parallel.loss, planner=parallel.planner)
    other.label = f"copy {len(parallel.family)} of {parallel.label}"
    parallel.family.append(weakref.ref(other))
    other.family, other.sample_dims, other.refresh, other.random = parallel.family, parallel.sample_dims, parallel.refresh, copy.copy(parallel.random)
    if parallel.storage:
        other.plan, other.planned, other.storage = parallel.plan, parallel.planned, dict(parallel.storage)
        other.shapes, other.boxes, other.owners = dict(parallel.shapes), dict(parallel.boxes), dict(parallel.owners)
        other.known.start(other.parameters())
        other.gradients.attach(dict(other.parameters()))
    return other


def bare_copy(parallel: Parallel, memo: dict[int, Any]) -> nn.Module:
    """A copy that knows nothing of us, with the parameters as they are."""
    module = parallel.module
    if "_soap" not in module.__dict__:
        return copy.deepcopy(module, memo)
    plain: type[nn.Module] = type(module).__mro__[2]
    twin = plain.__new__(plain)
    memo[id(module)] = twin
    twin.__dict__.update(copy.deepcopy({k: v for k, v in module.__dict__.items() if k not in OURS}, memo))
    fresh = nn.Module()
    twin.__dict__.update({k: fresh.__dict__[k] for k in OURS if k in fresh.__dict__})
    if parallel.own_forward is not None:
        twin.__dict__["forward"] = copy.deepcopy(parallel.own_forward, memo)
    for child in twin.modules():
        for hooks in (child._forward_pre_hooks, child._state_dict_pre_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "torch_soap", False)]:
                del hooks[key]
    return twin


def without_hooks(module: nn.Module) -> nn.Module:
    """The module's own hooks (not its children's) run around the parallel forward, not in it."""
    fresh = nn.Module()
    for name in fresh.__dict__:
        if name.endswith("_hooks") or "_hooks_" in name:
            module.__dict__[name] = copy.copy(fresh.__dict__[name])
    return module


def with_memory(module: nn.Module) -> None:
    """Parameters and buffers of the meta device get (untouched) memory on the CPU; tied ones stay tied."""
    first: dict[int, str] = {}
    ties = [(n, first.setdefault(id(p), n)) for n, p in module.named_parameters(remove_duplicate=False)]
    module.to_empty(device="cpu")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, canonical in ties:
        if name != canonical:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = parameters[canonical]
