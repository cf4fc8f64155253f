"""The capture ladder: torch.export, checked against eager; what can't be traced becomes an opaque operator."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_soap.capture.graph import Graph
from torch_soap.capture.importer import CaptureError, Importer, clean_path, fake_like
from torch_soap.capture.interpret import run_graph
from torch_soap.random import CounterState
from torch_soap.random_ops import counter_rng

Shape = tuple[int, ...]
Signature = tuple[tuple[Shape, torch.dtype], ...]


class Objective(nn.Module):
    """The module with its loss: forward(*model_args, *targets) -> loss(model(*model_args), *targets)."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.num_targets = num_targets(loss)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.loss is None:
            return self.model(*args, **kwargs)
        split = len(args) - self.num_targets
        return self.loss(self.model(*args[:split], **kwargs), *args[split:])


def num_targets(loss: Callable[..., Any] | None) -> int:
    """Positional arguments of the loss without default, less the model's output."""
    if loss is None:
        return 0
    required = [
        p
        for p in inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(required) - 1


class Captured:
    """One module in one mode (train or eval), for any number of rows.

    Attributes:
        dynamic: one trace serves every batch size; else each input signature is traced by itself.
        reasons: why a rung of the ladder was left, one line each.
        batch_dims: for each input leaf the dim that moves with the batch, None for none.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool, loss: Callable[..., Any] | None) -> None:
        self.module = module
        self.objective = Objective(module, loss)
        self.train = train
        self.reasons: list[str] = []
        self.leaves, self.in_spec = pytree.tree_flatten((args, kwargs))
        self.tensor_slots = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        self.out_spec: pytree.TreeSpec | None = None
        self.out_leaves: list[Any] = []  # constants of the output; tensors are None
        self.batch_dims = batch_dims([self.leaves[i] for i in self.tensor_slots])
        self.graphs: dict[Any, Graph] = {}
        self.programs: dict[Any, torch.export.ExportedProgram] = {}
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.buffers = dict(module.named_buffers(remove_duplicate=False))
        self.dynamic = self._trace_dynamic()

    # -- inputs and outputs --------------------------------------------------------------------------------------------
    def flatten_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Tensor leaves of a call; the other leaves must be those that the trace was made with."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise ValueError(f"[capture] the call has the structure {spec}, the captured one {self.in_spec}")
        for i, (leaf, known) in enumerate(zip(leaves, self.leaves, strict=True)):
            if i not in self.tensor_slots and leaf != known:
                raise ValueError(f"[capture] argument leaf {i} is {leaf!r}, captured with {known!r}")
        return [leaves[i] for i in self.tensor_slots]

    def unflatten_outputs(self, tensors: list[torch.Tensor]) -> Any:
        if self.out_spec is None:
            raise RuntimeError("[capture] outputs before a trace")
        feed = iter(tensors)
        return pytree.tree_unflatten([next(feed) if leaf is None else leaf for leaf in self.out_leaves], self.out_spec)

    def input_names(self) -> list[str]:
        return [f"in:{i}" for i in range(len(self.tensor_slots))]

    # -- tracing -------------------------------------------------------------------------------------------------------
    def _example(self, signature: Signature | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self.leaves)
        if signature is not None:
            for slot, (shape, dtype) in zip(self.tensor_slots, signature, strict=True):
                leaves[slot] = torch.zeros(shape, dtype=dtype, device=self.leaves[slot].device)
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        return args, kwargs

    def _export(self, signature: Signature | None, dynamic: bool) -> torch.export.ExportedProgram:
        args, kwargs = self._example(signature)
        shapes = None
        if dynamic:
            dims = iter(self.batch_dims)
            spec = []
            for i, _ in enumerate(self.leaves):
                dim = next(dims) if i in self.tensor_slots else None
                spec.append({dim: torch.export.Dim.AUTO} if dim is not None else None)
            arg_shapes, kwarg_shapes = pytree.tree_unflatten(spec, self.in_spec)
            # Objective.forward takes *args, **kwargs: export wants them as one tuple and by name.
            shapes = {"args": tuple(arg_shapes), "kwargs": dict(kwarg_shapes)} if kwarg_shapes else {"args": tuple(arg_shapes)}
        with self._mode(), forbid_custom_functions():
            return torch.export.export(self.objective, args, kwargs, strict=False, dynamic_shapes=shapes)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        modes = {m: m.training for m in self.module.modules()}
        if any(t != self.train for t in modes.values()) and self.module.training != self.train:
            self.module.train(self.train)
        self.objective.training = self.train
        try:
            yield
        finally:
            for m, t in modes.items():
                m.training = t

    def _trace_dynamic(self) -> bool:
        if any(d is not None for d in self.batch_dims):
            try:
                self.programs[None] = self._export(self._at_least_two(), dynamic=True)
                base = self._signature_of([self.leaves[i] for i in self.tensor_slots])
                self.instantiate(scaled(base, self.batch_dims, 3))
                self.instantiate(scaled(base, self.batch_dims, 5))
                return True
            except CaptureError:
                raise
            except Exception as error:  # torch.export documents no exception type for untraceable code
                self.reasons.append(f"dynamic batch: {first_line(error)}")
                self.programs.clear()
                self.graphs.clear()
        return False

    def _at_least_two(self) -> Signature:
        """Export specialises sizes 0 and 1: trace with more rows."""
        signature = self._signature_of([self.leaves[i] for i in self.tensor_slots])
        rows = [shape[d] for (shape, _), d in zip(signature, self.batch_dims, strict=True) if d is not None]
        return scaled(signature, self.batch_dims, 1) if min(rows) > 1 else scaled(signature, self.batch_dims, 4 if min(rows) else 4)

    def _signature_of(self, tensors: list[torch.Tensor]) -> Signature:
        return tuple((tuple(t.shape), t.dtype) for t in tensors)

    def instantiate(self, signature: Signature) -> Graph:
        """The graph at these global input shapes. Cached."""
        key = (signature, torch.is_autocast_enabled("cpu"), tuple(p.requires_grad for p in self.parameters.values()))
        if key not in self.graphs:
            self.graphs[key] = self._build(signature)
        return self.graphs[key]

    def _program(self, signature: Signature) -> torch.export.ExportedProgram:
        if None in self.programs:
            return self.programs[None]
        if signature not in self.programs:
            self.programs[signature] = self._export(signature, dynamic=False)
        return self.programs[signature]

    def _build(self, signature: Signature) -> Graph:
        graph = self._import(self._program(signature), signature)
        other = scaled(signature, self.batch_dims, 1, add=1)
        if other == signature:
            return graph
        # The dims of returns that move with the batch: those that differ at another batch size.
        moved = self._import(self._program(other), other)
        sizes = {n.name: moved.values[n.inputs[0]].shape for n in moved.of_kind("return")}
        for node in graph.of_kind("return"):
            shape = graph.values[node.inputs[0]].shape
            changed = [d for d, (a, b) in enumerate(zip(shape, sizes[node.name], strict=True)) if a != b]
            node.sample_dim = changed[0] if changed else None
        return graph

    def _import(self, program: torch.export.ExportedProgram, signature: Signature) -> Graph:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        importer = Importer(mode)
        importer.replaced = {}
        spec = program.graph_signature
        inputs: list[Any] = []
        shared: dict[int, Any] = {}
        buffers: dict[str, torch.Tensor] = {}
        feeds = iter(zip(signature, self.batch_dims, strict=True))
        feed_index = 0
        slots = iter(range(len(self.leaves)))
        for item in spec.input_specs:
            kind = item.kind.name
            if kind == "USER_INPUT":
                slot = next(slots)
                if slot not in self.tensor_slots:
                    inputs.append(self.leaves[slot])
                    continue
                (shape, dtype), dim = next(feeds)
                tensor = fake_like(mode, shape, dtype, bool(self.leaves[slot].requires_grad))
                importer.source_node("feed", f"in:{feed_index}", tensor, str(feed_index), sample_dim=dim)
                feed_index += 1
                inputs.append(tensor)
                continue
            actual, group = self._stored(program, item, kind)
            if id(actual) in shared:
                inputs.append(shared[id(actual)])
                continue
            name = clean_path(item.target)
            tensor = fake_like(mode, tuple(actual.shape), actual.dtype, actual.requires_grad)
            importer.source_node(group, f"{group}:{name}", tensor, name)
            shared[id(actual)] = tensor
            if group == "buffer":
                buffers[name] = tensor
            inputs.append(tensor)
        outputs = importer.run(program.graph_module, inputs)
        user_outputs = [o for o, s in zip(outputs, spec.output_specs, strict=True) if s.kind.name in ("USER_OUTPUT", "LOSS_OUTPUT")]
        for o, s in zip(outputs, spec.output_specs, strict=True):
            if s.kind.name == "BUFFER_MUTATION":
                importer.replaced[id(buffers[clean_path(s.target)])] = o
        index = 0
        self.out_leaves = []
        for output in user_outputs:
            if isinstance(output, torch.Tensor):
                importer.return_node(f"out:{index}", output, str(index))
                index += 1
                self.out_leaves.append(None)
            else:
                self.out_leaves.append(output)
        for name, tensor in buffers.items():
            new = importer.current(tensor)
            if new is not tensor:
                importer.return_node(f"write:{name}", new, name, target="buffer_write")
        self.out_spec = program.call_spec.out_spec
        return importer.finish()

    def _stored(self, program: torch.export.ExportedProgram, item: Any, kind: str) -> tuple[torch.Tensor, str]:
        name = clean_path(item.target)
        if kind == "PARAMETER":
            return self.parameters[name], "param"
        if kind == "BUFFER":
            return self.buffers[name], "buffer"
        if kind == "CONSTANT_TENSOR":
            return program.constants[item.target], "const"
        raise CaptureError(f"[capture] input of kind {kind}")

    def stored_tensor(self, kind: str, qualname: str) -> torch.Tensor:
        """The user's own Parameter or buffer, or a constant of the trace."""
        if kind == "param":
            return self.parameters[qualname]
        if kind == "buffer":
            return self.buffers[qualname]
        for program in self.programs.values():
            for name, tensor in program.constants.items():
                if clean_path(name) == qualname:
                    return tensor
        raise KeyError(qualname)

    def stored_tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        return {n.name: self.stored_tensor(n.kind, n.qualname) for n in graph.nodes if n.kind in ("param", "buffer", "const")}


def batch_dims(tensors: list[torch.Tensor]) -> list[int | None]:
    """The dim of each input that moves with the batch: the batch size is dim 0 of the first input that has dims."""
    rows = next((t.shape[0] for t in tensors if t.dim() > 0), None)
    out: list[int | None] = []
    for t in tensors:
        fitting = [d for d, size in enumerate(t.shape) if size == rows]
        out.append(fitting[0] if fitting else None)
    return out


def scaled(signature: Signature, dims: list[int | None], factor: int, add: int = 0) -> Signature:
    """The signature with `rows * factor + add` rows."""
    out = []
    for (shape, dtype), dim in zip(signature, dims, strict=True):
        new = list(shape)
        if dim is not None:
            new[dim] = max(new[dim], 1) * factor + add if factor > 1 else new[dim] + add
        out.append((tuple(new), dtype))
    return tuple(out)


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


@contextlib.contextmanager
def forbid_custom_functions() -> Iterator[None]:
    """A custom autograd.Function is traced through and loses its backward: stop instead."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch."):
            return original.__func__(cls, *args, **kwargs)
        raise CaptureError(f"custom autograd.Function {cls.__qualname__}: its backward can't be traced")

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def capture(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, train: bool | None = None, loss: Callable[..., Any] | None = None, check: bool = True
) -> Captured:
    """Captures `module` (with `loss`, when given) and checks the capture once against eager.

    Args:
        args, kwargs: an example call of the module, followed by the loss' targets when `loss` is given.
        train: the mode to capture; default: the module's own.
        check: compare outputs and gradients with eager on the example (skipped on the meta device).

    Raises:
        CaptureError: the module can't be traced, or the trace doesn't compute what the module does.
    """
    captured = Captured(module, args, kwargs or {}, train=module.training if train is None else train, loss=loss)
    on_meta = any(p.is_meta for p in module.parameters()) or any(t.is_meta for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor))
    if on_meta:
        captured.reasons.append("not checked against eager: on the meta device")
    elif check:
        check_against_eager(captured)
    return captured


def check_against_eager(captured: Captured) -> None:
    """Outputs and gradients of the trace against the module on the example; buffers and random state are put back."""
    args, kwargs = captured._example(None)
    tensors = [captured.leaves[i] for i in captured.tensor_slots]
    graph = captured.instantiate(captured._signature_of(tensors))
    parameters = [p for p in captured.module.parameters() if p.requires_grad]
    buffers = {n: b.clone() for n, b in captured.buffers.items()}
    state = CounterState(0)
    state.next_call()
    with captured._mode(), torch.enable_grad(), counter_rng(captured.objective, seed=0):
        leaves = pytree.tree_leaves(captured.objective(*args, **kwargs))
        eager = [t for t in leaves if isinstance(t, torch.Tensor)]
        eager_grads = gradients(eager, parameters)
    written = {n: b.clone() for n, b in captured.buffers.items()}
    with torch.no_grad():
        for name, saved in buffers.items():
            captured.buffers[name].copy_(saved)
    feeds = dict(zip(captured.input_names(), tensors, strict=True))
    with torch.enable_grad():
        traced, writes = run_graph(graph, captured.stored_tensors(graph) | feeds, state)
        traced_grads = gradients(traced, parameters)
    compare("output", list(enumerate(eager)), list(enumerate(traced)))
    names = [n for n, p in captured.module.named_parameters() if p.requires_grad]
    compare("gradient of", list(zip(names, eager_grads, strict=True)), list(zip(names, traced_grads, strict=True)))
    compare("buffer", list(written.items()), [(n, writes.get(n, buffers[n])) for n in written])


def gradients(outputs: list[torch.Tensor], parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    wanted = [o for o in outputs if o.requires_grad]
    if not wanted or not parameters:
        return [None] * len(parameters)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in wanted]
    return list(torch.autograd.grad(wanted, parameters, cotangents, allow_unused=True))


def compare(what: str, expected: list[tuple[Any, torch.Tensor | None]], got: list[tuple[Any, torch.Tensor | None]]) -> None:
    for (name, a), (_, b) in zip(expected, got, strict=True):
        if a is None or b is None:
            if (a is None) != (b is None):
                raise CaptureError(f"the trace differs from the module: {what} {name} is {'None' if b is None else 'there'} in the trace")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CaptureError(f"the trace differs from the module: {what} {name} is {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}")
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-5 * (float(a.detach().abs().max()) if a.numel() and a.dtype != torch.bool else 1.0) + 1e-12, equal_nan=True):
            raise CaptureError(f"the trace differs from the module: {what} {name}")


__all__ = ["CaptureError", "Captured", "capture"]
