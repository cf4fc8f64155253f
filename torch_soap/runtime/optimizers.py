"""Stock optimizers on cut parameters: elementwise ones step on the parts, others on gathered wholes; global gradient norms."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_soap.runtime.checkpoint import cut_optimizer_state, gather_optimizer_state
from torch_soap.runtime.deferred import DeferredGradient
from torch_soap.runtime.movement import sums_in
from torch_soap.runtime.parallel import Parallel
from torch_soap.runtime.storage import cut

# Each element's update reads that element's parameter, gradient and state only. Others are taken not to be.
ELEMENTWISE = {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"}


# Of torch.nn.init.
ELEMENTWISE_INIT = {"zeros_", "ones_", "constant_"}
DRAWING = {"_calculate_fan_in_and_fan_out", "_no_grad_uniform_", "_no_grad_normal_", "_no_grad_trunc_normal_"}  # what imported ones call


class Registry:
    """Which parameters belong to which parallelized module, and the process-wide hooks that need to know. Made at first use."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Parallel]] = []
        self.numbers = itertools.count(1)  # of calls of parallelize
        self.known: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.wholes: dict[int, list[tuple[Parallel, str, torch.nn.Parameter, torch.Tensor]]] = {}
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)
        self.local_norm = clip_grad._get_total_norm
        clip_grad._get_total_norm = self.total_norm
        torch.nn.utils.get_total_norm = self.total_norm
        self.local_unscale = torch.amp.GradScaler._unscale_grads_
        torch.amp.GradScaler._unscale_grads_ = functools.partialmethod(Registry.unscale_of, self)  # type: ignore[assignment,arg-type]

        for name in dir(nn.init):
            public = name.endswith("_") and not name.startswith("_")
            if (public and name not in ELEMENTWISE_INIT) or name in DRAWING:
                setattr(nn.init, name, self.refuse_parts(getattr(nn.init, name)))

    def refuse_parts(self, init: Callable[..., Any]) -> Callable[..., Any]:
        """torch.nn.init's function, which refuses cut parameters: it would see a part's fans, and draw the part's numbers."""

        @functools.wraps(init)
        def of_wholes(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for parallel in self.parallels:
                for name, p in parallel.parameters():
                    if parallel.is_cut(name) and (p is tensor or (p.numel() and p.data_ptr() == tensor.data_ptr())):
                        raise RuntimeError(
                            f"[torch_soap] torch.nn.init on {name}, of which this rank has a part: initialise before the plan is made, or load_state_dict"
                        )
            return init(tensor, *args, **kwargs)

        return of_wholes

    def number(self) -> int:
        return next(self.numbers)

    def add(self, parallel: Parallel) -> None:
        self.made = [r for r in self.made if r() is not None] + [weakref.ref(parallel)]

    @property
    def parallels(self) -> list[Parallel]:
        """Those that are left, in the order in which they were made: alike on all ranks, since what follows from it is collective."""
        return [p for r in self.made if (p := r()) is not None]

    def flush(self, parameters: Iterable[torch.Tensor]) -> None:
        """Reduces what no_sync has left of the gradients of these parameters' modules. Collective where something is left."""
        asked = {id(p) for p in parameters}
        for parallel in self.parallels:
            if parallel.deferred.waiting and any(id(p) in asked for _, p in parallel.parameters()):
                parallel.comm.gather_ints([], "deferred gradient")
                parallel.deferred.flush()

    # -- gradient scaling ----------------------------------------------------------------------------------------------
    @staticmethod
    def unscale_of(scaler: torch.amp.GradScaler, registry: Registry, optimizer: torch.optim.Optimizer, *args: Any) -> dict[torch.device, torch.Tensor]:
        """GradScaler's own unscaling, then found_inf of all ranks: a part that overflows on one rank skips the step on all. Collective."""
        registry.flush(p for group in optimizer.param_groups for p in group["params"])
        found = registry.local_unscale(scaler, optimizer, *args)
        ours = registry.cut_parameters(optimizer)
        if ours:
            comm = ours[0][0].comm
            mine = torch.stack([t.detach().cpu().float().reshape(()) for t in found.values()]).amax() if found else torch.zeros(())
            total = comm.all_reduce(mine.reshape(1), list(range(comm.world_size)), True)[0]
            for t in found.values():
                t.fill_(total)
        return found

    # -- steps ---------------------------------------------------------------------------------------------------------
    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closure sees the parts, and may be what plans the model; the step after it sees what the optimizer needs. What it returns is
        this process' loss: the optimizer, which may decide by it, gets the mean of the processes'."""
        if isinstance(optimizer, torch.optim.SparseAdam) and self.parallel_of(optimizer) is not None:
            raise RuntimeError(
                "[torch_soap] SparseAdam steps only on the rows that a sparse gradient names, but over ranks gradients are dense "
                "(also those of Embedding(sparse=True), with the same values): use Adam or SGD"
            )
        self.enter(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None

        def on_parts() -> Any:
            self.leave(optimizer)
            result = self.mean_loss(optimizer, closure())
            self.enter(optimizer)
            return result

        return (args[0], on_parts, *args[2:]) if len(args) > 1 else args, {**kwargs, "closure": on_parts} if "closure" in kwargs else kwargs

    def parallel_of(self, optimizer: torch.optim.Optimizer) -> Parallel | None:
        """The first parallelized module of which the optimizer has a parameter."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return next((x for x in self.parallels if any(id(p) in owned for _, p in x.parameters())), None)

    def mean_loss(self, optimizer: torch.optim.Optimizer, loss: Any) -> Any:
        parallel = self.parallel_of(optimizer)
        if parallel is None or not isinstance(loss, torch.Tensor | float):
            return loss
        own = torch.as_tensor(loss).detach().double().reshape(1)
        mean = parallel.comm.all_reduce(own.clone(), list(range(parallel.comm.world_size)), False)[0] / parallel.comm.world_size
        return mean.to(loss.dtype).reshape(loss.shape) if isinstance(loss, torch.Tensor) else float(mean)

    def enter(self, optimizer: torch.optim.Optimizer) -> None:
        self.flush(p for group in optimizer.param_groups for p in group["params"])
        self.leave(optimizer)  # a step that failed before
        ours = self.cut_parameters(optimizer)
        if not ours:
            return
        if optimizer not in self.known:
            self.known.add(optimizer)
            self.first_step(optimizer, ours)
        if is_elementwise(optimizer):
            return
        ours[0][0].comm.gather_ints([], "step")
        kept = []
        for parallel, name, p in ours:
            part, grad = p.data, p.grad
            whole_grad = None if grad is None else parallel.gather(name, grad)
            p.grad = None
            p.data = parallel.gather(name, part)
            p.grad = whole_grad
            kept.append((parallel, name, p, part))
        self.wholes[id(optimizer)] = kept

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.leave(optimizer)

    def leave(self, optimizer: torch.optim.Optimizer) -> None:
        for parallel, name, p, part in self.wholes.pop(id(optimizer), []):
            whole, grad = p.data, p.grad
            p.grad = None
            p.data = part.copy_(cut(whole, parallel.boxes[name]))
            p.grad = None if grad is None else cut(grad, parallel.boxes[name]).clone()

    def first_step(self, optimizer: torch.optim.Optimizer, ours: list[tuple[Parallel, str, torch.nn.Parameter]]) -> None:
        """State that was made before the parameters were cut is cut too; checkpoints of the optimizer become whole."""
        if not is_elementwise(optimizer):
            return
        for parallel, name, p in ours:
            state = optimizer.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0 and tuple(value.shape) == parallel.shapes[name] and value.shape != p.shape:
                    state[key] = cut(value, parallel.boxes[name]).clone()
        for parallel in {id(x): x for x, _, _ in ours}.values():
            optimizer.register_state_dict_post_hook(lambda o, sd, x=parallel: gather_optimizer_state(x, o, sd))  # type: ignore[misc]
            optimizer.register_load_state_dict_pre_hook(lambda o, sd, x=parallel: cut_optimizer_state(x, o, sd))  # type: ignore[misc]

    def cut_parameters(self, optimizer: torch.optim.Optimizer) -> list[tuple[Parallel, str, torch.nn.Parameter]]:
        out = []
        for parallel in self.parallels:
            if not any(parallel.is_cut(n) for n in parallel.boxes):
                continue
            names = {id(p): n for n, p in parallel.parameters()}
            for group in optimizer.param_groups:
                out += [(parallel, names[id(p)], p) for p in group["params"] if id(p) in names and parallel.is_cut(names[id(p)])]
        return out

    # -- norms ---------------------------------------------------------------------------------------------------------
    def total_norm(
        self, tensors: Iterable[torch.Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        """torch's _get_total_norm, with the global norm for gradients of ours: every element counts once. Collective then."""
        tensors = list(tensors)
        waiting = {id(p.grad): p for x in self.parallels for _, p in x.parameters() if isinstance(p.grad, DeferredGradient)}
        asked = [waiting.get(id(t)) for t in tensors]
        self.flush(p for p in asked if p is not None)
        tensors = [t if p is None or p.grad is None else p.grad for t, p in zip(tensors, asked, strict=True)]
        ours: dict[int, tuple[Parallel, str]] = {}
        for parallel in self.parallels:
            if parallel.plan is not None:
                ours |= {id(p.grad): (parallel, n) for n, p in parallel.parameters() if p.grad is not None}
        mine = [t for t in tensors if id(t) in ours]
        if not mine:
            return self.local_norm(tensors, norm_type, error_if_nonfinite, foreach)
        parallel = ours[id(mine[0])][0]
        parallel.comm.gather_ints([], "gradient norm")
        counted = [t for t in mine if ours[id(t)][0].owners.get(ours[id(t)][1], parallel.comm.rank == 0) and t.numel()]
        maximum = norm_type == float("inf")
        if not maximum and not 0 < norm_type < float("inf"):
            raise ValueError(f"[grad_norm] a norm over ranks of order {norm_type}: orders are positive or inf")
        norms = [torch.linalg.vector_norm(t.detach(), norm_type, dtype=sums_in(t.dtype)).double() for t in counted]
        share = torch.stack(norms) if norms else torch.zeros(1, dtype=torch.float64)
        share = share.amax() if maximum else (share**norm_type).sum()
        total = parallel.comm.all_reduce(share.reshape(1), list(range(parallel.comm.world_size)), maximum)[0]
        others = [t for t in tensors if id(t) not in ours]
        if others:
            rest = self.local_norm(others, norm_type, False, foreach).double()
            total = torch.maximum(total, rest) if maximum else total + rest**norm_type
        total = (total if maximum else total ** (1.0 / norm_type)).to(mine[0].dtype)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped.")
        return total


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim") and type(optimizer).__name__ in ELEMENTWISE
