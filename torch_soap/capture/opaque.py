"""Operators that capture can't look into: a custom autograd.Function, an untraceable child module, a whole module.

In a trace such a call is one call of an operator that is defined for it alone; in the graph it is a node with target
"opaque" whose `fn` runs the user's code under autograd, so the gradient is the user's own.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import CheckpointFunction

from torch_soap.capture.structure import flatten
from torch_soap.random_ops import GENERATOR

OPAQUE_NAMESPACE = "torch_soap_opaque"
Shape = tuple[int, ...]


def split_leaves(leaves: list[Any]) -> tuple[list[Any], list[int]]:
    """Leaves without their tensors, and where these were."""
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    return [None if i in slots else leaf for i, leaf in enumerate(leaves)], slots


def fill(constants: list[Any], slots: list[int], tensors: Any) -> list[Any]:
    leaves = list(constants)
    for slot, tensor in zip(slots, tensors, strict=True):
        leaves[slot] = tensor
    return leaves


PLAIN = (bool, int, float, complex, str, type(None))


def changed_constant(before: list[Any], now: list[Any]) -> str:
    """The first plain value among a result's leaves that isn't what it was, in words; "" if there is none."""
    if len(before) != len(now):
        return f"{len(now)} values, not {len(before)}"
    for a, b in zip(before, now, strict=True):
        if isinstance(a, PLAIN) and isinstance(b, PLAIN) and (type(a) is not type(b) or (a != b and (a == a or b == b))):
            return f"{b!r}, not {a!r}"
    return ""


def one_or_list(results: list[torch.Tensor]) -> Any:
    """As ATen's operators give them."""
    return results[0] if len(results) == 1 else results


class FunctionCall:
    """One call of a custom autograd.Function: tensors in, tensors out; the other arguments are as traced. Taken not to
    draw random numbers."""

    num_random = 0
    random = False

    def __init__(self, cls: type, args: Any, apply: Callable[..., Any]) -> None:
        self.__name__ = f"opaque_{cls.__name__}"  # what fx asks of anything that it calls
        leaves, self.spec = pytree.tree_flatten(args)
        self.constants, self.slots = split_leaves(leaves)
        self.apply = apply  # torch's own, called with the class first
        self.cls = cls
        self.out_spec: pytree.TreeSpec | None = None
        self.out_constants: list[Any] = []
        self.out_slots: list[int] = []

    def __call__(self, *tensors: torch.Tensor) -> Any:
        return one_or_list(self.compute(list(tensors)))

    def compute(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        args = pytree.tree_unflatten(fill(self.constants, self.slots, tensors), self.spec)
        leaves, self.out_spec = pytree.tree_flatten(self.apply(self.cls, *args))
        self.out_constants, self.out_slots = split_leaves(leaves)
        return [leaves[i] for i in self.out_slots]

    def fake(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.empty_like(t) for t in self.compute(tensors)]

    def unflatten(self, tensors: list[torch.Tensor]) -> Any:
        if self.out_spec is None:
            raise RuntimeError("[capture] results of a call that wasn't made")
        return pytree.tree_unflatten(fill(self.out_constants, self.out_slots, tensors), self.out_spec)


@dataclass
class Recording:
    """Shapes at one call of a module: of its tensor inputs, and of its tensor results."""

    inputs: list[Shape]
    outputs: list[Shape]
    dtypes: list[torch.dtype]
    requires_grad: list[bool]
    out_constants: list[Any]
    out_slots: list[int]
    out_spec: pytree.TreeSpec
    written: list[str] = field(default_factory=list)  # buffers
    num_random: int = 0  # operators that took a number of counter_rng's
    random: bool = False  # it draws: from torch, Python or NumPy


class ModuleCall:
    """One call of a module: (inputs, parameters, buffers) -> (outputs, new values of the buffers that it writes).

    Result sizes at other input sizes are extrapolated from two recorded calls: the real sizes depend on code that only
    real tensors can run.
    """

    lock = GENERATOR  # ranks in one process have one module, and one state of the generators

    def __init__(self, module: nn.Module, args: Any, train: bool, recordings: list[Recording]) -> None:
        self.__name__ = f"opaque_{type(module).__name__}"
        leaves, self.spec = flatten(args)
        self.constants, self.slots = split_leaves(leaves)
        self.module = module
        self.train = train
        self.recordings = recordings
        self.params = [n for n, _ in module.named_parameters()]
        self.buffers = [n for n, _ in module.named_buffers()]

    @property
    def num_random(self) -> int:
        return self.recording.num_random

    @property
    def random(self) -> bool:
        return self.recording.random

    @property
    def recording(self) -> Recording:
        return self.recordings[0]

    def stored(self) -> list[torch.Tensor]:
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        return [tensors[n] for n in (*self.params, *self.buffers)]

    def sizes(self, inputs: list[Shape]) -> list[list[Any]]:
        """Result shapes at these input shapes (which may be symbolic)."""
        first, last = self.recordings[0], self.recordings[-1]
        moved = next(((i, d) for i, shape in enumerate(first.inputs) for d, s in enumerate(shape) if s != last.inputs[i][d]), None)
        if moved is None:
            return [list(s) for s in first.outputs]
        i, d = moved
        a, b, now = first.inputs[i][d], last.inputs[i][d], inputs[i][d]
        pairs = zip(first.outputs, last.outputs, strict=True)
        return [[x if x == y else x + (y - x) * (now - a) // (b - a) for x, y in zip(s, t, strict=True)] for s, t in pairs]

    def sample_dims(self) -> tuple[list[int], list[int]] | None:
        """Of each operand (parameters and buffers last) and result the dim that grew with the example's rows, -1 for none; None where
        rows can't be computed apart: a result without them, buffers written, random numbers, only one recorded size."""
        first, last = self.recordings[0], self.recordings[-1]
        if first.written or first.random or last.random:
            return None

        def grown(before: list[Shape], after: list[Shape]) -> list[int]:
            return [next((d for d, (a, b) in enumerate(zip(s, t, strict=True)) if a != b), -1) for s, t in zip(before, after, strict=True)]

        inputs, outputs = grown(first.inputs, last.inputs), grown(first.outputs, last.outputs)
        sizes = {s[d] for shapes, dims in ((first.inputs, inputs), (first.outputs, outputs)) for s, d in zip(shapes, dims, strict=True) if d >= 0}
        if -1 in outputs or len(sizes) != 1 or max(inputs, default=-1) < 0:
            return None
        return inputs + [-1] * (len(self.params) + len(self.buffers)), outputs

    def in_two_parts(self, *tensors: torch.Tensor) -> Any:
        """The first row, and the others, apart."""
        dims = self.sample_dims()
        rows = max((t.shape[d] for t, d in zip(tensors, dims[0], strict=True) if d >= 0), default=0) if dims is not None else 0
        if dims is None or rows < 2:
            return self(*tensors)
        parts = [
            self.compute([t if d < 0 else t.narrow(d, begin, length) for t, d in zip(tensors, dims[0], strict=True)])
            for begin, length in ((0, 1), (1, rows - 1))
        ]
        return one_or_list([torch.cat(pair, d) for pair, d in zip(zip(*parts, strict=True), dims[1], strict=True)])

    def fake(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        n = len(self.slots)
        like = tensors[0]
        sizes = self.sizes([tuple(t.shape) for t in tensors[:n]])
        out = [like.new_empty(s, dtype=t) for s, t in zip(sizes, self.recording.dtypes, strict=True)]
        buffers = dict(zip(self.buffers, tensors[n + len(self.params) :], strict=True))
        return out + [torch.empty_like(buffers[name]) for name in self.recording.written]

    def __call__(self, *tensors: torch.Tensor) -> Any:
        return one_or_list(self.compute(list(tensors)))

    def compute(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        if any(isinstance(t, FakeTensor) for t in tensors):
            out = self.fake(tensors)
            grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            for t, wanted in zip(out, self.recording.requires_grad, strict=False):
                t.requires_grad_(grad and wanted)
            return out
        n = len(self.slots)
        args, kwargs = pytree.tree_unflatten(fill(self.constants, self.slots, tensors[:n]), self.spec)
        stored = dict(zip((*self.params, *self.buffers), tensors[n:], strict=True))
        stored |= {name: stored[name].clone() for name in self.buffers}
        with self.lock, mode_of(self.module, self.train):
            result = torch.func.functional_call(self.module, stored, args, kwargs)
        leaves, _ = flatten(result)
        changed = changed_constant(self.recording.out_constants, split_leaves(leaves)[0])
        if changed:  # what follows has the recorded value baked in
            raise RuntimeError(f"[torch_soap] {type(self.module).__name__} is opaque and returned {changed} as on the batch that it was captured with")
        return [t for t in leaves if isinstance(t, torch.Tensor)] + [stored[name] for name in self.recording.written]

    def unflatten(self, tensors: list[torch.Tensor]) -> Any:
        r = self.recording
        return pytree.tree_unflatten(fill(r.out_constants, r.out_slots, tensors[: len(r.out_slots)]), r.out_spec)


@contextlib.contextmanager
def seeded(text: str) -> Iterator[None]:
    """Torch, Python and NumPy draw what they draw after this seed; afterwards they go on where they were."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng():
        random.seed(text)
        seed = random.getrandbits(32)
        torch.manual_seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def mode_of(module: nn.Module, train: bool) -> Iterator[None]:
    """The module in train or eval mode; afterwards every submodule is as it was."""
    modes = [(m, m.training) for m in module.modules()]
    if module.training != train:
        module.train(train)
    try:
        yield
    finally:
        for m, t in modes:
            m.training = t


@contextlib.contextmanager
def transparent_checkpoints() -> Iterator[None]:
    """The reentrant checkpoint only works in `.backward()`: here what it would recompute is kept."""
    original = CheckpointFunction.__dict__.get("apply")
    CheckpointFunction.apply = classmethod(lambda _cls, run, _preserve, *args: run(*args))  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        if original is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = original  # type: ignore[method-assign]


class OpaqueOps:
    """Operators defined for one trace: each stands for one opaque call."""

    def __init__(self) -> None:
        self.library = torch.library.Library(OPAQUE_NAMESPACE, "FRAGMENT")
        self.calls: dict[str, FunctionCall | ModuleCall] = {}
        self.inside = False

    def define(self, call: FunctionCall | ModuleCall) -> Callable[..., Any]:
        name = f"call_{id(self):x}_{len(self.calls)}"
        self.calls[name] = call
        self.library.define(f"{name}(Tensor[] tensors) -> Tensor[]")
        torch.library.register_fake(f"{OPAQUE_NAMESPACE}::{name}", lambda tensors: self._fake(call, tensors), lib=self.library)
        op: Callable[..., Any] = getattr(getattr(torch.ops, OPAQUE_NAMESPACE), name).default
        return op

    def _fake(self, call: FunctionCall | ModuleCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        before, self.inside = self.inside, True
        try:
            return call.fake(tensors)
        finally:
            self.inside = before

    @contextlib.contextmanager
    def functions(self) -> Iterator[None]:
        """While tracing: a custom autograd.Function would be traced through and lose its backward; it becomes one operator.
        The reentrant checkpoint is a Function too: what it recomputes is simply computed."""
        original = torch.autograd.Function.__dict__["apply"]

        def torch_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            return original.__get__(None, cls)(*args, **kwargs)

        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if cls is CheckpointFunction:
                return args[0](*args[2:])
            tensors = [a for a in pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
            if self.inside or kwargs or not tensors or cls.__module__.split(".")[0] == "torch":
                return torch_apply(cls, *args, **kwargs)
            call = FunctionCall(cls, args, torch_apply)
            return call.unflatten(self.define(call)(tensors))

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]

    @contextlib.contextmanager
    def modules(self, root: nn.Module, recordings: dict[str, list[list[Recording]]], train: bool) -> Iterator[None]:
        """While tracing: the modules at these paths are one operator for each call. `recordings`: of each path and call."""
        replaced: list[tuple[nn.Module, Any]] = []

        def stub(module: nn.Module, calls: list[list[Recording]]) -> Callable[..., Any]:
            index = iter(range(len(calls)))

            def forward(*args: Any, **kwargs: Any) -> Any:
                call = ModuleCall(module, (args, kwargs), train, calls[next(index)])
                leaves, _ = flatten((args, kwargs))
                results = self.define(call)([*(leaves[i] for i in call.slots), *call.stored()])
                buffers = dict(module.named_buffers())
                for name, value in zip(call.recording.written, results[len(call.recording.out_slots) :], strict=True):
                    buffers[name].copy_(value)
                return call.unflatten(results)

            return forward

        try:
            for path, calls in recordings.items():
                module = root.get_submodule(path)
                replaced.append((module, module.__dict__.get("forward")))
                module.forward = stub(module, calls)  # type: ignore[method-assign]
            yield
        finally:
            for module, own in replaced:
                if own is None:
                    del module.forward
                else:
                    module.forward = own  # type: ignore[method-assign]
