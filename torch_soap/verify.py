"""verify: all ranks of a plan in this one process against the unsharded module."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from torch_soap import _C
from torch_soap.capture import Captured, capture
from torch_soap.plan import Plan, as_plan, lower
from torch_soap.random import CounterState
from torch_soap.random_ops import counter_rng
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.rewrite.substitution import Checker
from torch_soap.runtime import Engine, ThreadComm
from torch_soap.runtime.comm import ThreadWorld
from torch_soap.runtime.copies import plain_copy
from torch_soap.runtime.movement import LOW, bytes_of, take
from torch_soap.runtime.storage import assemble, cut, stored_boxes

BOUND = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Difference:
    """The largest difference of one tensor: max|a-b| / max(max|b|, scale)."""

    kind: str  # "output", "gradient", "input gradient", "buffer", "parameter"
    name: str
    step: int
    error: float

    def __str__(self) -> str:
        return f"{self.kind} {self.name} (step {self.step}): {self.error:.2e}"


@dataclass
class Report:
    """Result of `verify`.

    Attributes:
        ok: no difference above `bound`, replicas bitwise equal, nothing that isn't finite on one side only.
        worst: the largest difference by name.
        differences: all, largest first.
    """

    bound: float
    differences: list[Difference] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    operations: dict[str, int] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def worst(self) -> Difference | None:
        return self.differences[0] if self.differences else None

    @property
    def ok(self) -> bool:
        return not self.failures and (self.worst is None or self.worst.error <= self.bound)

    def __str__(self) -> str:
        lines = [f"{'ok' if self.ok else 'DIFFERS'}: worst {self.worst} (bound {self.bound:.0e}, {len(self.differences)} tensors)"]
        lines += self.failures
        lines += [str(d) for d in self.differences if d.error > self.bound]
        return "\n".join(lines)


def even_rows(total: int, world_size: int) -> list[int]:
    return [total // world_size + (r < total % world_size) for r in range(world_size)]


@dataclass
class Trace:
    """What one run gave: per step outputs, gradients, buffers and parameters by name, all whole."""

    outputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    grads: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    input_grads: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    buffers: list[dict[str, torch.Tensor]] = field(default_factory=list)
    parameters: list[dict[str, torch.Tensor]] = field(default_factory=list)


def cotangents(outputs: Sequence[torch.Tensor], step: int) -> list[torch.Tensor]:
    """Seeded random gradients of the outputs; 1 for a scalar, which is taken for a loss."""
    generator = torch.Generator().manual_seed(step)
    return [torch.ones_like(o) if o.dim() == 0 else torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def run_reference(captured: Captured, inputs: list[torch.Tensor], steps: int, seed: int) -> Trace:
    """The module itself, one process, the whole batch."""
    trace = Trace()
    module = captured.module
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=0.1, momentum=0.9) if named else None
    with counter_rng(captured.objective, seed=seed):
        for step in range(steps):
            leaves = list(captured.leaves)
            for slot, tensor in zip(captured.tensor_slots, inputs, strict=True):
                leaves[slot] = tensor.detach().requires_grad_(tensor.requires_grad)
            args, kwargs = pytree.tree_unflatten(leaves, captured.in_spec)
            with captured._mode():
                result = captured.objective(*args, **kwargs)
            outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            trace.outputs.append({n: o.detach().clone() for n, o in zip(captured.output_names(), outputs, strict=True)})
            for p in named.values():
                p.grad = None
            seeds = cotangents(outputs, step)
            wanted = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
            if wanted:
                torch.autograd.backward([o for o, _ in wanted], [s for _, s in wanted])
            trace.grads.append({n: None if p.grad is None else p.grad.to_dense().clone() for n, p in named.items()})
            trace.input_grads.append({n: leaves[s].grad for n, s in zip(captured.input_names(), captured.tensor_slots, strict=True) if leaves[s].requires_grad})
            if optimizer is not None:
                optimizer.step()
            trace.buffers.append({n: b.clone() for n, b in captured.buffers.items()})
            trace.parameters.append({n: p.detach().clone() for n, p in named.items()})
    return trace


@dataclass
class RankResult:
    """One rank's part of a trace."""

    outputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    grads: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    input_grads: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    buffers: list[dict[str, torch.Tensor]] = field(default_factory=list)
    parameters: list[dict[str, torch.Tensor]] = field(default_factory=list)
    boxes: dict[str, list[_C.IndexSet] | None] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)


def run_rank(captured: Captured, program: _C.Program, graph: Any, inputs: list[torch.Tensor], steps: int, seed: int, comm: ThreadComm) -> RankResult:
    """One rank: forward, backward and SGD on the parts that it stores."""
    torch.set_num_threads(1)
    result = RankResult()
    engine = Engine(program, graph, comm.rank, comm)
    world = program.world_size
    feeds = {n.name: n for n in graph.nodes if n.kind == "feed"}
    rows = list(program.rows)
    local = {}
    for (name, node), tensor in zip(feeds.items(), inputs, strict=True):
        part = rank_rows(tensor, node.sample_dim, rows, comm.rank)
        local[name] = part.detach().clone()
    result.boxes = stored_boxes(program, comm.rank)
    stores = captured.stored_tensors(graph)
    stored: dict[str, torch.Tensor] = {n: cut(t.detach(), result.boxes[n]).clone() for n, t in stores.items()}
    params = {n.name: nn.Parameter(stored[n.name]) for n in graph.nodes if n.kind == "param" and stores[n.name].requires_grad}
    for name, p in params.items():
        stored[name] = p
    optimizer = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9) if params else None
    random = CounterState(seed)
    nodes = {n.name: n.id for n in program.graph.nodes}
    returns = {n.name: n for n in graph.nodes if n.kind == "return" and n.target != "buffer_write"}
    for step in range(steps):
        whole = [torch.empty(graph.values[n.inputs[0]].shape, dtype=graph.values[n.inputs[0]].dtype) for n in returns.values()]
        seeds = {}
        for (name, node), seed_tensor in zip(returns.items(), cotangents(whole, step), strict=True):
            part = rank_rows(seed_tensor, node.sample_dim, rows, comm.rank)
            seeds[name] = part / (1 if node.sample_dim is not None else world)
        random.next_call()
        state = engine.forward(local, stored, grad=True, random=random, seeds=seeds if program.interleaved else None)
        result.outputs.append({n: engine.output(state, nodes[n]).clone() for n in returns})
        engine.write(state, stored)  # before backward, as in training
        if not program.interleaved:
            engine.backward(state, seeds)
        grads: dict[str, torch.Tensor | None] = {}
        for name, p in params.items():
            p.grad = engine.gradient(state, nodes[name])
            grads[name] = None if p.grad is None else p.grad.clone()
        result.grads.append(grads)
        result.input_grads.append({n: engine.gradient(state, nodes[n]) for n in feeds})
        if optimizer is not None:
            optimizer.step()
        result.buffers.append({n: t.clone() for n, t in stored.items() if n.startswith("buffer:")})
        result.parameters.append({n: p.detach().clone() for n, p in params.items()})
    result.operations = dict(comm.traffic.operations)
    result.num_bytes = dict(comm.traffic.num_bytes)
    return result


def rank_rows(tensor: torch.Tensor, dim: int | None, rows: Sequence[int], rank: int) -> torch.Tensor:
    """What a process feeds of a whole input: its rows, or all of it."""
    if dim is None:
        return tensor
    ratio = tensor.shape[dim] // max(sum(rows), 1)
    begin = sum(rows[:rank]) * ratio
    return take(tensor, [(dim, [(begin, begin + rows[rank] * ratio)])])


def verify(
    module: nn.Module,
    example_inputs: Any,
    plan: Plan | str,
    *,
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
    loss: Callable[..., Any] | None = None,
    world_size: int | None = None,
    rows: Sequence[int] | None = None,
    seed: int = 0,
) -> Report:
    """Runs all ranks of a plan in this one process and compares with the unsharded module.

    Compares outputs, gradients of every parameter and input, buffers, and parameters after each of `steps` steps of SGD
    (momentum 0.9, lr 0.1), measured as docs/exactness.md says. The module given is not changed.

    Args:
        example_inputs: the global batch: a tensor, or a tuple of positional arguments (a dict as its last element: keywords).
        plan: a Plan, the path of one, or its text (then world_size says for how many devices).
        rows: rows that each process feeds; default: as even as possible.
        loss: called as loss(output, *targets); targets are the last of example_inputs.
    """
    args, kwargs = as_arguments(example_inputs)
    parallel = getattr(module, "_soap", None)
    module = (copy.deepcopy(module) if parallel is None else plain_copy(parallel, {})).to(dtype)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    cast = [
        leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in leaves
    ]
    args, kwargs = pytree.tree_unflatten(cast, spec)
    captured = capture(module, args, kwargs, loss=loss)
    return verify_captured(captured, plan, steps=steps, dtype=dtype, world_size=world_size, rows=rows, seed=seed)


def verify_captured(
    captured: Captured, plan: Plan | str, *, steps: int, dtype: torch.dtype, world_size: int | None = None, rows: Sequence[int] | None = None, seed: int = 0
) -> Report:
    """`verify` of a module that is captured already (its parameters move and are put back)."""
    inputs = [captured.leaves[i] for i in captured.tensor_slots]
    graph = captured.instantiate(captured._signature_of(inputs))
    op_graph = to_op_graph(graph)
    plan = as_plan(plan, op_graph, world_size)
    Checker(graph).check(op_graph, plan.strategy.rewrites)
    dims = [d for d in captured.batch_dims if d is not None]
    total = next((t.shape[d] for t, d in zip(inputs, captured.batch_dims, strict=True) if d is not None), 0)
    parts = list(rows) if rows is not None else even_rows(total if dims else plan.world_size, plan.world_size)
    program = lower(op_graph, plan, parts)
    saved = {n: t.detach().clone() for n, t in itertools.chain(captured.module.named_parameters(), captured.module.named_buffers())}
    world = ThreadWorld(plan.world_size)
    ranks: list[RankResult] = world.run(lambda comm: run_rank(captured, program, graph, inputs, steps, seed, comm))
    reference = run_reference(captured, inputs, steps, seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(captured.module.named_parameters(), captured.module.named_buffers()):
            tensor.copy_(saved[name])
    # A value of few digits on the way (autocast) bounds everything behind it.
    bound = max(BOUND.get(d, 1e-2) for d in {dtype, *(v.dtype for v in graph.values if v.dtype in LOW)})
    return compare(program, graph, reference, ranks, parts, bound, steps)


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, list | tuple):
        return (example_inputs,), {}
    args = tuple(example_inputs)
    if args and isinstance(args[-1], dict):
        return args[:-1], args[-1]
    return args, {}


def compare(program: _C.Program, graph: Any, reference: Trace, ranks: list[RankResult], rows: Sequence[int], bound: float, steps: int) -> Report:
    report = Report(bound=bound)
    for r in ranks:
        for kind, n in r.operations.items():
            report.operations[kind] = report.operations.get(kind, 0) + n
        for kind, n in r.num_bytes.items():
            report.num_bytes[kind] = report.num_bytes.get(kind, 0) + n
    samples = {n.name: n.sample_dim for n in graph.nodes if n.kind in ("feed", "return")}

    def gathered(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        dim = samples[name]
        if dim is not None:
            return torch.cat(parts, dim)
        for rank, part in enumerate(parts[1:], 1):
            if not bits_equal(parts[0], part):
                report.failures.append(f"{name} differs between ranks 0 and {rank}")
        return parts[0]

    def check(kind: str, name: str, step: int, got: torch.Tensor | None, wanted: torch.Tensor | None, scale: float) -> None:
        if wanted is None or got is None:
            other = got if wanted is None else wanted
            if other is not None and bool((other != 0).any()):
                report.failures.append(f"{kind} {name} (step {step}) is {'not None' if wanted is None else 'None'}")
            return
        if got.shape != wanted.shape:
            report.failures.append(f"{kind} {name} (step {step}) has shape {list(got.shape)}, not {list(wanted.shape)}")
            return
        report.differences.append(Difference(kind, name, step, error_of(got, wanted, scale)))

    def stored(name: str, step: int, kind: str, tensors: Sequence[Mapping[str, torch.Tensor | None]], shape: Sequence[int]) -> torch.Tensor | None:
        holders = [(r, rank.boxes[name], tensors[r].get(name)) for r, rank in enumerate(ranks) if rank.boxes[name] is not None]
        if all(t is None for _, _, t in holders):
            return None
        first: dict[str, torch.Tensor] = {}
        parts = []
        for r, box, tensor in holders:
            if tensor is None:
                report.failures.append(f"{kind} of {name} (step {step}) is None on rank {r} only")
                return None
            known = first.setdefault(str(box), tensor)
            if not bits_equal(known, tensor):
                report.failures.append(f"{kind} of {name} (step {step}): replicas differ (rank {r})")
            parts.append((box, tensor))
        return assemble(shape, parts)

    for step in range(steps):
        wanted = reference.outputs[step]
        scale = 1e-3 * largest(wanted.values())
        for name in wanted:
            check("output", name, step, gathered(name, [r.outputs[step][name] for r in ranks]), wanted[name], scale)
        grads = reference.grads[step]
        scale = 1e-2 * largest(g for g in grads.values() if g is not None)
        for name, grad in grads.items():
            shape = reference.parameters[step][name].shape
            key = f"param:{name}"
            got = stored(key, step, "gradient", [r.grads[step] for r in ranks], shape) if key in ranks[0].boxes else None
            check("gradient", name, step, got, grad, scale)
        for name, grad in reference.input_grads[step].items():
            parts = [p for r in ranks if (p := r.input_grads[step].get(name)) is not None]
            got = None if len(parts) < len(ranks) else torch.cat(parts, samples[name]) if samples[name] is not None else parts[0]
            check("input gradient", name, step, got, grad, scale)
        scale = 1e-3 * largest(reference.buffers[step].values())
        for name, buffer in reference.buffers[step].items():
            key = f"buffer:{name}"
            if key in ranks[0].boxes:
                check("buffer", name, step, stored(key, step, "buffer", [r.buffers[step] for r in ranks], buffer.shape), buffer, scale)
        for name, parameter in reference.parameters[step].items():
            key = f"param:{name}"
            if key in ranks[0].boxes:
                got = stored(key, step, "parameter", [r.parameters[step] for r in ranks], parameter.shape)
                check("parameter", name, step, got, parameter, 0.1 * (step + 1))
    report.differences.sort(key=lambda d: -d.error)
    return report


def largest(tensors: Any) -> float:
    """The largest finite magnitude."""
    finite = (t.detach()[torch.isfinite(t.detach())].abs() for t in tensors if t.dtype != torch.bool)
    return max((float(t.double().max()) for t in finite if t.numel()), default=0.0)


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bytes_of(a), bytes_of(b))


def error_of(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    """max|a-b| / max(max|b|, scale); infinite where only one side is finite or the non-finite values differ."""
    if a.numel() == 0:
        return 0.0
    if a.dtype == torch.bool or not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else math.inf
    x, y = (t.double() if not t.is_complex() else t for t in (a, b))
    finite = torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), finite) or not torch.equal(torch.nan_to_num(x)[~finite], torch.nan_to_num(y)[~finite]):
        return math.inf
    difference = float((x - y)[finite].abs().max()) if bool(finite.any()) else 0.0
    top = float(y[finite].abs().max()) if bool(finite.any()) else 0.0
    return difference / max(top, scale, 1e-300) if difference else 0.0
