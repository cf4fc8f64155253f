"""The public functions: parallelize, plan, grad_norm."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torch_soap import _C
from torch_soap.backend import init_string
from torch_soap.capture.graph import Graph
from torch_soap.constraints import Forbid, Pin
from torch_soap.plan import OneProcess, Plan, as_plan, text_of
from torch_soap.planner import graph_for, search_plan
from torch_soap.runtime.checkpoint import install_state_dict
from torch_soap.runtime.comm import TorchComm
from torch_soap.runtime.copies import parallel_copy, plain_copy
from torch_soap.runtime.header import agree
from torch_soap.runtime.heap import keep_freed_memory
from torch_soap.runtime.optimizers import Registry
from torch_soap.runtime.parallel import Parallel
from torch_soap.trial import steps_wanted, tried
from torch_soap.verify import as_arguments


@functools.cache
def registry() -> Registry:
    """The process' optimizer and norm hooks, installed by the first parallelize."""
    return Registry()


class ParallelModule(nn.Module):
    """What `parallelize` turns a module's class into: the same module, whose forward runs the plan on all ranks together."""

    _soap: Parallel

    @property
    def plan(self) -> Plan | None:
        """The plan; None before the first forward when there were no example_inputs."""
        return self._soap.plan

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._soap.call(args, kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards of forwards called inside leave the reduction of gradients to the next backward outside, or to what reads them (a step, a
        norm, a scaler). Reading `p.grad` before is an error. All ranks together."""
        before, self._soap.deferred.on = self._soap.deferred.on, True
        try:
            yield
        finally:
            self._soap.deferred.on = before

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Parallelized too, with the same parts on the same plan: updates by name go from one to the other. On all ranks."""
        other = parallel_copy(self._soap, memo)
        attach(other.module, other)
        return other.module

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (plain_copy(self._soap, {}),)


class WithLoss:
    """World size 1 with `loss`: model(*inputs, *targets) is the loss; nothing else changes."""

    def __init__(self, forward: Callable[..., Any], loss: Callable[..., Any], num_targets: int) -> None:
        self.forward, self.loss, self.num_targets = forward, loss, num_targets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        split = len(args) - self.num_targets
        return self.loss(self.forward(*args[:split], **kwargs), *args[split:])


def leave_process_group() -> None:
    """Ends the process group that `parallelize` began, where the program hasn't."""
    if dist.is_initialized():
        dist.destroy_process_group()


def parallelize(
    module: nn.Module,
    example_inputs: Any = None,
    *,
    loss: Callable[..., Any] | None = None,
    plan: Plan | str | Path | None = None,
    machine: Any = None,
    memory_limit: int | None = None,
    sample_dims: Sequence[int | None] | None = None,
    rewrites: bool = True,
    trial_steps: int | None = None,
) -> nn.Module:
    """Trains `module` on all processes of the job with the results of one process on the concatenated batch.

    Each process feeds its own rows, as with DDP; the objective is the mean over processes of the loss each one computes.
    Returns the same object. With one process (WORLD_SIZE 1 or unset) the module's own forward runs, untouched; `plan` says so.

    Args:
        example_inputs: this process' part of a batch (a tensor, a tuple of arguments, a dict of keywords): plan now. Default:
            plan at the first forward.
        loss: called as loss(output, *targets) inside the parallel program; then `model(*inputs, *targets)` returns the loss.
        plan: a Plan, the path of a saved one, or text (docs/plan-format.md); default: searched.
        machine: plan for this Machine (a preset, a file) instead of the measured one.
        memory_limit: bytes per device.
        sample_dims: of each input tensor the dim that holds the rows, None where it has none. Default: found by size and replay, dim 0
            where that fits; name them for inputs whose rows are in another dim (time first).
        rewrites: the search may rewrite the graph (docs/rewrites.md); a plan's own rewrites are used either way.
        trial_steps: steps that each of the best plans found runs on the first batch, on copies, before the fastest of them stays; 0: none. Default: where
            the simulator is known to be less certain than the best plan's lead (docs/search.md).

    Raises:
        ValueError: the plan's text is not legal for this module; nothing has been changed.
        RankMismatchError: ranks have different models, torch versions or plans; names the rank and the first difference.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if not dist.is_initialized() else dist.get_world_size()
    if world == 1:
        if loss is not None:
            from torch_soap.capture.capture import num_targets

            module.forward = WithLoss(module.forward, loss, num_targets(loss))
        for name, value in (("plan", OneProcess()), ("no_sync", contextlib.nullcontext)):  # what loops written for several processes ask for
            if not hasattr(module, name):
                module.__dict__[name] = value
        return module
    if hasattr(module, "_orig_mod"):
        raise ValueError("[parallelize] the module is compiled: parallelize the module itself")
    own_forward = module.__dict__.get("forward")
    if own_forward is not None and getattr(own_forward, "__self__", None) is not module:
        raise ValueError("[parallelize] forward was set on the object as a function that may hold other modules: make it a method of the class")
    if getattr(module, "batch_first", True) is False and sample_dims is None:
        warnings.warn("[parallelize] batch_first=False, but dim 0 of every input is taken as the rows: name the dims, sample_dims=[1, ...]", stacklevel=2)
    if isinstance(module, ParallelModule):
        raise ValueError("[parallelize] the module is parallelized already")
    inside = next((n for n, m in module.named_modules() if isinstance(m, ParallelModule)), None)
    if inside is not None:
        raise ValueError(f"[parallelize] its submodule {inside} is parallelized already: parallelize the whole model only, or its parts")
    if any(getattr(hook, "torch_soap", False) for hook in module._forward_pre_hooks.values()):
        raise ValueError("[parallelize] the module is part of a parallelized one")
    if not dist.is_initialized():
        dist.init_process_group(init_string())
        atexit.register(leave_process_group)  # ours: its threads must not outlive the interpreter
    comm = TorchComm()
    keep_freed_memory()
    if plan is not None and not isinstance(plan, Plan):
        plan = text_of(plan)
    others = {
        "loss": getattr(loss, "__qualname__", type(loss).__name__),
        "sample_dims": sample_dims,
        "memory_limit": memory_limit,
        "rewrites": rewrites,
        "trial_steps": trial_steps,
    }
    same_module(comm, module, plan, {**others, "example_inputs": "none" if example_inputs is None else "given"})
    broadcast_state(comm, module)

    def planner(graph: _C.OpGraph, captured: Graph, rows: list[int]) -> Plan:
        if plan is not None:
            return as_plan(plan, graph, world)
        with torch.random.fork_rng(devices=[]):  # what is measured draws its inputs
            return search_plan(graph, captured, rows, comm=comm, machine=machine, memory_limit=memory_limit, rewrites=rewrites)

    parallel = Parallel(module, comm, loss=loss, planner=planner)
    if plan is None:
        parallel.trial = functools.partial(on_trial, parallel, trial_steps)
    parallel.search = functools.partial(search_plan, comm=comm, memory_limit=memory_limit)
    seeds = comm.gather_objects(parallel.random.seed)
    if any(s != seeds[0] for s in seeds):
        parallel.random.seed, parallel.random.torch_seed = seeds[0], None
    parallel.label = f"model {registry().number()}"
    parallel.sample_dims = sample_dims
    if example_inputs is not None:
        parallel.prepare(*as_arguments(example_inputs))
    parallel.refresh = functools.partial(broadcast_state, comm)
    attach(module, parallel)
    return module


def on_trial(parallel: Parallel, asked: int | None, plan: Plan, graph: Graph, tensors: Sequence[torch.Tensor], stored: dict[str, torch.Tensor]) -> Plan:
    steps = steps_wanted(plan, asked)
    meta = any(t.is_meta for t in stored.values())
    return tried(parallel, plan, graph, tensors, stored, steps) if steps > 0 and not meta else plan


def attach(module: nn.Module, parallel: Parallel) -> None:
    """From here on the module's forward is the parallel one."""
    own = type(module)
    module.__class__ = type(own.__name__, (ParallelModule, own), {"__module__": own.__module__, "__doc__": own.__doc__})
    module.__dict__["_soap"] = parallel
    parallel.own_forward = module.__dict__.pop("forward", None)
    install_state_dict(parallel)
    guard_submodules(module, parallel)
    registry().add(parallel)


def guard_submodules(module: nn.Module, parallel: Parallel) -> None:
    """A submodule with cut parameters, called on its own, would compute on parts: an error instead."""

    def hook(child: nn.Module, _args: Any) -> None:
        if not any(parallel.is_cut(n) for n, p in parallel.parameters() if any(p is q for q in child.parameters())):
            return
        raise RuntimeError(
            f"[torch_soap] {type(child).__name__} was called on its own, but its parameters are cut over ranks; "
            "call the whole model, or load its state_dict() into a plain one"
        )

    hook.torch_soap = True  # type: ignore[attr-defined]
    for child in module.modules():
        if child is not module:
            child.register_forward_pre_hook(hook)


def same_module(comm: TorchComm, module: nn.Module, plan: Any, others: dict[str, Any]) -> None:
    """All ranks have the same torch, model and plan, and other arguments."""
    mine = {
        "torch": torch.__version__,
        "class": type(module).__qualname__,
        **{f"parameter {n}": (tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in module.named_parameters()},
        **{f"buffer {n}": (tuple(b.shape), str(b.dtype)) for n, b in module.named_buffers()},
        "plan": plan.text if isinstance(plan, Plan) else str(plan),
        **others,
    }
    everyone = comm.gather_objects(mine)
    for rank, other in enumerate(everyone):
        for key in [*everyone[0], *(k for k in other if k not in everyone[0])]:
            if other.get(key) != everyone[0].get(key):
                agree(comm, "parallelize", mine.get(key), f"ranks differ in {key}")
                raise RuntimeError(f"[parallelize] rank {rank} and rank 0 differ in {key}")


def broadcast_state(comm: TorchComm, module: nn.Module) -> None:
    """Rank 0's parameters and buffers win, as with DDP; a difference is said."""
    changed = []
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_meta:
                continue
            before = t.detach().clone()
            dist.broadcast(t.data if t.data.is_contiguous() else before, 0, group=comm.world)
            if not t.data.is_contiguous():
                t.data.copy_(before)
            elif not torch.equal(before, t.data):
                changed.append(name)
    if changed:
        warnings.warn(
            f"[parallelize] rank {comm.rank}: {len(changed)} parameters and buffers differed from rank 0's and were replaced, first {changed[0]}", stacklevel=3
        )


def plan(
    module: nn.Module,
    example_inputs: Any,
    *,
    loss: Callable[..., Any] | None = None,
    world_size: int | None = None,
    machine: Any = None,
    memory_limit: int | None = None,
    pin: Pin | None = None,
    forbid: Forbid | None = None,
    rewrites: bool = True,
) -> Plan:
    """Searches a plan without a process group, also for a machine one doesn't have; the module may be on the meta device.

    Args:
        example_inputs: the global batch.
        world_size: devices; default: the machine's, or 1.
        pin: configurations that are fixed, by pattern, as in a plan's text: {"classifier.*": "o=2"}.
        forbid: factors that may not be cut, by pattern: {"features.*": "h"}; or "devices" (no device list of its own), "chunks" (no cuts in time).
        rewrites: the search may rewrite the graph (docs/rewrites.md).
    """
    world = world_size or getattr(machine, "num_devices", None) or 1
    begin = time.perf_counter()
    graph, captured, rows = graph_for(module, example_inputs, loss, world)
    seconds = time.perf_counter() - begin
    found = search_plan(graph, captured, rows, comm=None, machine=machine, memory_limit=memory_limit, pin=pin, forbid=forbid, rewrites=rewrites)
    found.stats["capture_seconds"] = seconds
    return found


def grad_norm(model: nn.Module, norm_type: float = 2.0) -> torch.Tensor:
    """The global norm of the gradients of a model, parallelized or not. Collective."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.clip_grad._get_total_norm(grads, norm_type)
