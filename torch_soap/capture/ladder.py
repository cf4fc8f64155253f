"""The capture ladder: torch.export with a dynamic batch; one export for each signature; untraceable children as opaque
operators; the whole module as one. A rung is left with a reason, and each capture is checked against eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from torch_soap.capture import check as eager_check
from torch_soap.capture.capture import Captured
from torch_soap.capture.importer import CaptureError
from torch_soap.capture.interpret import run_graph
from torch_soap.capture.opaque import ModuleCall, Recording, changed_constant, split_leaves, transparent_checkpoints
from torch_soap.capture.signature import batch_dim_choices, scaled, signature_of
from torch_soap.capture.structure import flatten
from torch_soap.capture.watch import first_line
from torch_soap.random_ops import counter_rng

MAX_OPAQUE = 16  # children given up on before the whole module is


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    train: bool | None = None,
    loss: Callable[..., Any] | None = None,
    sample_dims: Sequence[int | None] | None = None,
    check: bool = True,
    fold: bool = True,
) -> Captured:
    """Captures `module` (with `loss`, when given) and checks the capture once against eager.

    Args:
        args, kwargs: an example call of the module, followed by the loss' targets when `loss` is given.
        train: the mode to capture; default: the module's own.
        sample_dims: of each input tensor the dim that holds the rows; default: found by size and replay.
        check: compare outputs and gradients with eager on the example (never on the meta device).
        fold: trace repeated modules once, where that can't be told from the result.

    Returns:
        Never fails for a module that runs: what can't be traced is opaque, at worst all of it (`opaque`, `reasons`).
    """
    captured = Captured(module, args, kwargs or {}, train=module.training if train is None else train, loss=loss, fold="alike" if fold else "none")
    on_meta = any(t.is_meta for t in (*module.parameters(), *captured.inputs))
    choices = [list(sample_dims)] if sample_dims is not None else batch_dim_choices(signature_of(captured.inputs))
    if on_meta:
        captured.reasons.append("not checked against eager: on the meta device")
    checked = check and not on_meta
    settled = on_meta
    while True:
        try:
            trace(captured, choices, checked)
            captured.checked = checked
            if checked and captured.opaque:
                try_rows_apart(captured)
            break
        except CaptureError as error:
            if captured.opaque == [""]:  # what can't be repeated can't be compared
                captured.reasons.append(f"not equal to eager, though eager itself: {error}")
                break
            if not settled:
                settled = True
                if settle_buffers(captured):
                    continue
            captured.reasons.append(f"{f'module {error.path}' if error.path else type(module).__name__} is opaque: {error}")
            path = error.path
            known = path is None or any(path == p or path.startswith(p + ".") for p in captured.opaque)
            add_opaque(captured, "" if path is None or known else path)
            record_opaque(captured, choices)
    for path, calls in captured.recordings.items():
        if any(r.random for call in calls for r in call):
            captured.reasons.append(
                f"not exact: {path or type(module).__name__} is opaque and draws random numbers, the same on all ranks but not those of one process"
            )
    return captured


def settle_buffers(captured: Captured) -> bool:
    """Buffers to which the first forward gives another shape (tables of positions) keep it, as in one process; whether there are any."""
    owned = [(m, n, b) for m in captured.objective.modules() for n, b in m._buffers.items() if b is not None]
    with eager_check.preserved(captured.objective, captured.parameters.values()), torch.no_grad():
        captured.call([t.detach().clone() for t in captured.inputs])
        made = [(m, n, m._buffers[n]) for m, n, b in owned if isinstance(m._buffers.get(n), torch.Tensor) and m._buffers[n].shape != b.shape]  # type: ignore[union-attr]
    for owner, name, tensor in made:
        owner._buffers[name] = tensor
    captured.names_of |= {id(b): n for n, b in captured.buffers.items()}
    return bool(made)


def add_opaque(captured: Captured, path: str) -> None:
    """The module at `path` is one operator; those in it no longer are."""
    inside = [p for p in captured.opaque if p.startswith(path + ".")]
    if not path or len(captured.opaque) - len(inside) >= MAX_OPAQUE:
        captured.opaque = [""]
    else:
        captured.opaque = [p for p in captured.opaque if p not in inside] + [path]


def trace(captured: Captured, choices: list[list[int | None]], checked: bool) -> None:
    """The first two rungs: a dynamic batch, else the example's signature. Raises CaptureError when neither is possible."""
    base = signature_of(captured.inputs)
    known = list(captured.reasons)  # what an attempt that is given up noted doesn't matter

    def start(dims: list[int | None], dynamic: bool) -> None:
        captured.traces.clear()
        captured.graphs.clear()
        captured.reasons[:] = known
        captured.return_dims = None
        captured.batch_dims, captured.dynamic = list(dims), dynamic

    if captured.opaque == [""]:
        first, *_, last = (*captured.recordings[""][0], captured.recordings[""][0][-1])
        start(choices[0], first.inputs != last.inputs)
        if checked:
            check_against_eager(captured, captured.inputs)
        return
    reasons = []
    for dims in choices:
        if all(d is None for d in dims):
            continue
        start(dims, dynamic=True)
        # One row is too few for a batch norm, though the ranks together have more.
        single = any(d is not None and t.shape[d] == 1 for t, d in zip(captured.inputs, dims, strict=True))
        inputs = doubled(captured.inputs, dims) if single else captured.inputs
        try:
            captured.instantiate(signature_of(inputs))
            captured.instantiate(scaled(base, dims, 3))
            if checked:
                check_against_eager(captured, doubled(inputs, dims), grad=False)
                check_against_eager(captured, inputs)
                check_next_call(captured)
            return
        except CaptureError as error:
            reasons.append(f"dynamic batch {dims}: {error}")
    start(choices[0], dynamic=False)
    captured.instantiate(base)
    if checked:
        check_against_eager(captured, captured.inputs)
        check_next_call(captured)
    captured.reasons += reasons


def try_rows_apart(captured: Captured) -> None:
    """Opaque modules may be split on the sample dim where whole and split runs agree on the example: outputs, gradients and buffers."""
    nodes = captured.instantiate(signature_of(captured.inputs)).nodes
    if not any(isinstance(n.fn, ModuleCall) and n.fn.sample_dims() is not None for n in nodes):
        return
    try:
        check_against_eager(captured, captured.inputs, split_opaque=True)
    except CaptureError as error:
        captured.reasons.append(f"opaque modules run whole, their rows in two parts give something else: {error}")
        return
    captured.rows_apart = True
    captured.reasons.append("opaque modules may be split by rows: on the first batch whole and split runs agreed, which is no proof")
    captured.graphs.clear()


def check_next_call(captured: Captured) -> None:
    """Where the forward changes Python attributes, the call after the one that was compared may be another one."""
    for name in captured._last().changed:
        try:
            check_against_eager(captured, captured.inputs, grad=False)
        except CaptureError as error:
            path, _, attribute = name.removeprefix("model").removeprefix(".").rpartition(".")
            raise CaptureError(f"its attribute {attribute} changes with each call: {error}", path) from error


def record_opaque(captured: Captured, choices: list[list[int | None]]) -> None:
    """Runs the module on the example and on the example twice over, noting the shapes at the opaque modules."""
    runs: list[dict[str, list[Recording]]] = []
    for tensors in (captured.inputs, doubled(captured.inputs, choices[0])):
        try:
            runs.append(record_run(captured, tensors))
        except Exception as error:
            if not runs:
                raise
            captured.reasons.append(f"twice the example's rows don't run, so only the captured sizes do: {first_line(error)}")
    captured.recordings = {}
    for path in captured.opaque:
        counts = {len(r[path]) for r in runs}
        captured.recordings[path] = [list(call) for call in zip(*(r[path] for r in runs[: 1 if len(counts) > 1 else 2]), strict=True)]
    for path, calls in captured.recordings.items():
        changed = next(filter(None, (changed_constant(call[0].out_constants, r.out_constants) for call in calls for r in call)), "")
        if path and (changed or not calls):  # its caller works with values that a trace would bake, or calls other methods than forward
            parent = path.rpartition(".")[0]
            why = f"{path} in it returned {changed} as on the example" if calls else f"it calls {path} by other methods than forward"
            captured.reasons.append(f"module {parent or type(captured.module).__name__} is opaque: {why}")
            add_opaque(captured, parent)
            return record_opaque(captured, choices)


def record_run(captured: Captured, tensors: list[torch.Tensor]) -> dict[str, list[Recording]]:
    module = captured.objective if captured.opaque == [""] else captured.module
    parameters = [(f"{path}.{n}", p, p.detach().clone()) for path in captured.opaque for n, p in module.get_submodule(path).named_parameters() if not p.is_meta]

    def record(drawn: Callable[[], tuple[int, int]]) -> dict[str, list[Recording]]:
        with eager_check.preserved(captured.objective), eager_check.recorded(module, captured.opaque, drawn) as calls, torch.enable_grad():
            captured.call([t.detach().clone().requires_grad_(t.requires_grad) for t in tensors])
        for name, p, before in parameters:
            if not torch.equal(p.detach().nan_to_num(), before.nan_to_num()):
                with torch.no_grad():
                    p.copy_(before)
                raise ValueError(
                    f"[capture] forward writes the parameter {name.removeprefix('.')}, in code that can't be traced ({captured.reasons[-1]}): "
                    "write it by p.detach() or under torch.no_grad(), or after the step"
                )
        return calls

    try:
        with counter_rng(seed=0) as rng:
            rng.next_call()
            return record(lambda: (rng.op_index, rng.num_draws))
    except NotImplementedError:  # an operator without a counter-based form: torch's generator will move
        return record(lambda: (0, 0))


def doubled(tensors: Sequence[torch.Tensor], dims: Sequence[int | None]) -> list[torch.Tensor]:
    return [t if d is None else torch.cat([t, t], d).detach().requires_grad_(t.requires_grad) for t, d in zip(tensors, dims, strict=True)]


def check_against_eager(captured: Captured, inputs: Sequence[torch.Tensor], grad: bool = True, split_opaque: bool = False) -> None:
    """Raises CaptureError where the graph on these inputs (with the rows of opaque modules apart) isn't what the module computes."""
    objective, module = captured.objective, captured.module

    def eager(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        leaves, _ = flatten(captured.call(tensors))
        constants, slots = split_leaves(leaves)
        known = captured._last().out_constants
        if len(constants) != len(known) or any(type(a) is not type(b) or (a is not None and a != b) for a, b in zip(constants, known, strict=True)):
            raise CaptureError(f"the module returned the constants {constants}, the trace {known}")
        return [leaves[i] for i in slots], captured.buffers | written

    def traced(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        graph = captured.instantiate(signature_of(tensors))
        try:
            outputs, writes = run_graph(
                graph, captured.stored_tensors(graph) | dict(zip(captured.input_names(), tensors, strict=True)), split_opaque=split_opaque
            )
        except Exception as error:
            raise CaptureError(f"the trace doesn't run: {first_line(error)}") from error
        return outputs, {n: writes.get(n, b) for n, b in (captured.buffers | written).items()}

    graph = captured.instantiate(signature_of(list(inputs)))
    written: dict[str, torch.Tensor] = {n: captured.parameters[n] for n, _ in graph.buffer_writes if n in captured.parameters}
    with eager_check.preserved(objective, written.values()), transparent_checkpoints():
        try:
            expected = eager_check.run(module, eager, inputs, grad)
        except CaptureError:
            raise
        except Exception as error:
            if inputs is captured.inputs or grad:
                raise
            raise CaptureError(f"the module doesn't run on {signature_of(list(inputs))}: {first_line(error)}") from error
    with eager_check.preserved(objective):
        got = eager_check.run(module, traced, inputs, grad)
    eager_check.compare(expected, got, {v.dtype for v in graph.values})
