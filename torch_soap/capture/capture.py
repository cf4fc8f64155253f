"""A captured module: its traces, and the graph at any global batch size. `ladder.py` decides how it is traced."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.export._trace  # else the first export imports it, which takes longer than to trace a small module
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_soap.capture import check as eager_check
from torch_soap.capture.fold import Attributes, Folding, repeated
from torch_soap.capture.graph import Graph, Ref
from torch_soap.capture.importer import CUMULATIVE, CaptureError, Importer, fake_like
from torch_soap.capture.names import clean_path, unique
from torch_soap.capture.objective import FlatCall, Objective
from torch_soap.capture.objective import num_targets as num_targets
from torch_soap.capture.observe import CannotFold
from torch_soap.capture.opaque import ModuleCall, OpaqueOps, Recording, fill, mode_of
from torch_soap.capture.signature import Signature, example_rows, moved_dims, scaled, signature_of, without_rows
from torch_soap.capture.structure import flatten, input_names, leaf_names
from torch_soap.capture.watch import Watch, first_line, user_line


@dataclass
class Trace:
    """One exported program and the opaque calls in it."""

    program: torch.export.ExportedProgram
    ops: OpaqueOps
    out_constants: list[Any] = field(default_factory=list)  # leaves of the output; tensors are None
    out_slots: list[int] = field(default_factory=list)
    out_spec: pytree.TreeSpec | None = None
    out_names: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # Python attributes that the forward changed: the trace has baked them
    assigned: list[str] = field(default_factory=list)  # attributes to which the forward assigned tensors: the trace has dropped them
    folding: Folding | None = None  # of repeated modules
    parameters: list[str] = field(default_factory=list)  # paths of all; the program may lack those of copies


class Captured:
    """One module in one mode (train or eval), for any number of rows.

    Attributes:
        dynamic: one trace serves every batch size; else each input signature is traced by itself.
        reasons: why a rung of the ladder was left, one line each.
        opaque: paths of the modules that are one operator each; [""] where the whole module is.
        rows_apart: they gave the same on the first batch when their rows were computed in two parts: they may be split on the sample dim.
        batch_dims: for each input tensor the dim that moves with the batch, None for none.
        checked: compared with eager (False on the meta device).
        fold: which repeated modules are traced once (`fold.py`): those "alike" but for their place in a list, those "equal" in that too, or "none".
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool, loss: Callable[..., Any] | None, fold: str = "alike"
    ) -> None:
        self.module = module
        self.objective = Objective(module, loss)
        self.train = train
        self.reasons: list[str] = []
        self.opaque: list[str] = []
        self.rows_apart = False
        self.checked = False
        self.dynamic = False
        self.leaves, self.in_spec = flatten((args, kwargs))
        self.tensor_slots = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        self._names = [input_names(args, kwargs)[i] for i in self.tensor_slots]
        self.batch_dims: list[int | None] = [None] * len(self.tensor_slots)
        self.traces: dict[Any, Trace] = {}  # by what they are baked for: everything but the rows, or the whole signature
        self.constants: dict[str, torch.Tensor] = {}
        self.graphs: dict[Any, Graph] = {}
        self.recordings: dict[str, list[list[Recording]]] = {}
        self.return_dims: list[tuple[int | None, int]] | None = None
        self.last: Trace | None = None
        self.fold = fold
        self.folding: Folding | None = None
        self.hides = True  # the parameters of copies, from the export
        self.before: Attributes | None = None
        # Tied tensors have one name, the first.
        self.parameters = dict(itertools.chain(module.named_parameters(), prefixed("loss.", self.objective.loss_parameters())))
        self.names_of = {id(t): n for n, t in itertools.chain(self.parameters.items(), self.buffers.items())}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(itertools.chain(self.module.named_buffers(), prefixed("loss.", self.objective.loss_buffers())))

    @property
    def exact(self) -> bool:
        """False where a plan may not compute what one process does: all of it opaque, something opaque draws random numbers
        of its own, or opaque rows may be computed apart because they could be on the first batch."""
        return self.opaque != [""] and not self.rows_apart and not any(r.random for calls in self.recordings.values() for call in calls for r in call)

    @functools.cached_property
    def ragged(self) -> list[str]:
        """Inputs that say positions in another input: offsets of bags."""
        graph = self.instantiate(self._signature_of(self.inputs))
        offsets = [n.arg_names.get("offsets") for n in graph.nodes if n.target == "embedding_bag"]
        known = {r.value for r in offsets if isinstance(r, Ref)}
        for node in reversed(graph.nodes):
            if known & set(node.outputs):
                known |= set(node.inputs)
        return [n.name for n in graph.of_kind("feed") if n.outputs[0] in known]

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors of the example."""
        return [self.leaves[i] for i in self.tensor_slots]

    # -- inputs and outputs --------------------------------------------------------------------------------------------
    def flatten_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Tensor leaves of a call; the other leaves must be those that the trace was made with."""
        leaves, spec = flatten((args, kwargs))
        if spec != self.in_spec:
            raise ValueError(f"[capture] the call has the structure {spec}, the captured one {self.in_spec}")
        for i, (leaf, known) in enumerate(zip(leaves, self.leaves, strict=True)):
            if isinstance(leaf, torch.Tensor) != (i in self.tensor_slots) or (i not in self.tensor_slots and leaf != known):
                raise ValueError(f"[capture] argument leaf {i} is {leaf!r}, captured with {known!r}")
        return [leaves[i] for i in self.tensor_slots]

    def unflatten_outputs(self, tensors: list[torch.Tensor]) -> Any:
        trace = self._last()
        if trace.out_spec is None:
            raise RuntimeError("[capture] the trace gave no structure")
        return pytree.tree_unflatten(fill(trace.out_constants, trace.out_slots, tensors), trace.out_spec)

    def input_names(self) -> list[str]:
        return [f"in:{n}" for n in self._names]

    def output_names(self) -> list[str]:
        return [f"out:{n}" for n in self._last().out_names]

    def _last(self) -> Trace:
        if self.last is None:
            raise RuntimeError("[capture] outputs before a trace")
        return self.last

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The user's module (and loss) on these tensors, eagerly, in the captured mode."""
        leaves = list(self.leaves)
        for slot, tensor in zip(self.tensor_slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        with self._mode():
            return self.objective(*args, **kwargs)

    def _mode(self) -> Any:
        self.objective.training = self.train
        return mode_of(self.module, self.train)

    # -- tracing -------------------------------------------------------------------------------------------------------
    def export(self, signature: Signature, dims: list[int | None] | None) -> Trace:
        """Exports at this signature; `dims` are dynamic."""
        flat = FlatCall(self.objective, self.leaves, self.tensor_slots, self.in_spec)
        flat.training = self.train
        examples = []
        for (shape, dtype), known in zip(signature, self.inputs, strict=True):
            same = tuple(known.shape) == shape and known.dtype == dtype
            # One tensor given twice (labels=ids) would be one input of the trace: copies.
            example = known.detach().clone() if same else torch.zeros(shape, dtype=dtype, device=known.device)
            examples.append(example.requires_grad_(known.requires_grad))
        shapes = None
        if dims is not None:
            shapes = {"tensors": tuple({d: torch.export.Dim.AUTO} if d is not None else None for d in dims)}
        ops = OpaqueOps()
        watch = Watch(self.module)
        folding = None
        parameters = [n for n, _ in flat.named_parameters(remove_duplicate=False)]
        if self.fold != "none":
            self.before = Attributes(self.module)
        stack = contextlib.ExitStack()
        for context in (uncollected(), self._mode(), eager_check.preserved(self.module), ops.functions(), cumulative_averages(self.module)):
            stack.enter_context(context)
        with stack, ops.modules(self.module, self.recordings, self.train), watch:
            if self.fold != "none" and not self.recordings:
                self.folding = folding = Folding(self.module, watch.running, attributes=self.fold == "equal", hides=self.hides)
                stack.enter_context(folding.concealed(lambda: flat.called))
                stack.enter_context(folding.installed())
            try:
                program = torch.export.export(flat, tuple(examples), strict=False, dynamic_shapes=shapes)
            except Exception as error:  # torch.export documents no exception type for untraceable code
                if folding is not None and folding.leaders:
                    folding.exposed |= bool(folding.hidden) and not folding.failed  # it may be for want of a hidden parameter
                    if folding.exposed:
                        raise CannotFold(folding.failed or "what follows can't be traced") from error
                    self.fold = self.fold if folding.failed else "equal"  # the last that is tried: it may be the code's own fault
                    raise CannotFold(folding.failed or "what follows can't be traced") from error
                reason = f"{user_line(error)}: {first_line(error)}"
                raise CaptureError(reason, watch.running[-1] if watch.running else None) from error
        if folding is not None:
            if folding.failed:
                raise CannotFold(folding.failed)
            folding.check_hidden(program.constants.values())
        if dims is not None:
            values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"][-len(dims) :]
            if any(d is not None and not isinstance(v.shape[d], torch.SymInt) for v, d in zip(values, dims, strict=True)):
                raise CaptureError("the code asks for the number of rows: a trace holds for the example's only")
        if watch.drew:
            raise CaptureError("it draws from Python's or NumPy's random numbers, which a trace would bake", watch.drew[0])
        result = flat.result
        return Trace(program, ops, result.constants, result.slots, result.spec, result.names, result.changed, result.assigned, folding, parameters)

    def instantiate(self, inputs: Any) -> Graph:
        """The graph at the global shapes of these inputs (tensors of any kind in the structure of a call, or a
        signature). Cached."""
        signature = signature_of(inputs)
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        key = (signature, autocast, tuple(p.requires_grad for p in self.parameters.values()))
        if key not in self.graphs:
            graph = self._import(signature)
            for node, (dim, ratio) in zip(user_returns(graph), self._return_dims(signature, graph), strict=True):
                node.sample_dim, node.sample_ratio = dim, ratio
            self.graphs[key] = graph
        return self.graphs[key]

    def _signature_of(self, tensors: Sequence[torch.Tensor]) -> Signature:
        return signature_of(list(tensors))

    def _return_dims(self, signature: Signature, graph: Graph) -> list[tuple[int | None, int]]:
        """Dim of each return that moves with the batch, and by how many rows for each: read off one more row."""
        if self.return_dims is None:
            shapes = [graph.values[n.inputs[0]].shape for n in user_returns(graph)]
            other = scaled(signature, self.batch_dims, 1, add=1)
            try:
                moved = self._import(other) if other != signature and any(shapes) else graph  # a loss has no dims
                others = [moved.values[n.inputs[0]].shape for n in user_returns(moved)]
            except CaptureError as error:
                self.reasons.append(f"sample dims of outputs by size, not by replay: {error}")
                rows = example_rows(signature, self.batch_dims)
                others = [tuple(s + (s == rows and d == s_.index(rows)) for d, s in enumerate(s_)) for s_ in shapes]
            self.return_dims = [moved_dims(a, b) for a, b in zip(shapes, others, strict=True)]
        return self.return_dims

    def _trace(self, signature: Signature) -> Trace:
        if not self.dynamic:
            if signature not in self.traces:
                self.traces[signature] = self.export(signature, None)
            return self.traces[signature]
        key = without_rows(signature, self.batch_dims)
        if key not in self.traces:
            # Export specialises the sizes 0 and 1, so it sees more rows.
            rows = example_rows(signature, self.batch_dims)
            self.traces[key] = self.export(signature if rows > 1 else scaled(signature, self.batch_dims, 4), self.batch_dims)
        return self.traces[key]

    # -- import --------------------------------------------------------------------------------------------------------
    def _import(self, signature: Signature) -> Graph:
        constants, self.before = dict(self.constants), None
        try:
            return self._import_at(signature)
        except CannotFold:
            self.unfold(constants)
        finally:
            self.before = None
        return self._import(signature)

    def unfold(self, constants: dict[str, torch.Tensor]) -> None:
        """The next trace is made as if this one hadn't been, with less folding, or with the same where it may do with all parameters shown."""
        if self.before is not None:  # traced just now; the attributes of an older trace have moved on
            self.before.restore()
        if self.folding is not None and self.folding.exposed:
            self.hides = False
            self.constants, self.folding = constants, None
            return self.traces.clear()
        groups = self.folding.groups if self.folding is not None and self.fold == "alike" else []
        self.fold = "equal" if groups and repeated(self.module, attributes=True) not in (groups, []) else "none"
        self.constants, self.folding = constants, None
        self.traces.clear()

    def _import_at(self, signature: Signature) -> Graph:
        importer = Importer(FakeTensorMode(allow_non_fake_inputs=True))
        if torch.is_autocast_enabled("cpu"):  # around the call: not in the trace
            importer.autocast = ("cpu", torch.get_autocast_dtype("cpu"), True)
        importer.rows_apart = self.rows_apart
        if self.opaque == [""]:
            return self._import_whole(importer, signature)
        trace = self._trace(signature)
        self.last = trace
        importer.opaques = dict(trace.ops.calls)
        spec = trace.program.graph_signature
        shared: dict[int, Any] = {}
        buffers = importer.buffers
        parameters: dict[str, Any] = {}
        feeds = iter(self._feeds(importer, signature))

        def source(kind: str, target: str) -> Any:
            if kind == "USER_INPUT":
                return next(feeds)
            tensor, group, name = self._stored(trace.program, target, kind)
            if id(tensor) not in shared:
                shared[id(tensor)] = self._source(importer, group, name, tensor)
                if group != "const":
                    (buffers if group == "buffer" else parameters)[name] = shared[id(tensor)]
            return shared[id(tensor)]

        handles = self._in_order(trace, [(item.kind.name, item.target) for item in spec.input_specs], source)
        if trace.folding is not None:
            importer.stored = trace.folding.by_path(buffers | parameters)
        with quiet(), uncollected():
            outputs = importer.run(trace.program.graph_module, handles)
        made = list(zip(outputs, spec.output_specs, strict=True))
        for handle, item in made:
            if item.kind.name == "BUFFER_MUTATION":
                importer.aliases.write(buffers[clean_path(item.target)], importer.aliases.read(handle))
        results = [importer.aliases.read(o) for o, item in made if item.kind.name in ("USER_OUTPUT", "LOSS_OUTPUT")]
        return self._finish(importer, results, {n: importer.aliases.read(h) for n, h in (buffers | parameters).items() if importer.aliases.read(h) is not h})

    @staticmethod
    def _in_order(trace: Trace, wanted: list[tuple[str, str]], source: Callable[[str, str], Any]) -> list[Any]:
        """The sources of a program's inputs, (kind, path), parameters first. Those that it lacks, of copies, are made too, where they would stand."""
        if trace.folding is None or not trace.folding.hidden:
            return [source(kind, path) for kind, path in wanted]
        present, handles, left = set(wanted), [], iter(wanted)
        for path in trace.parameters:
            made = source("PARAMETER", path)
            if ("PARAMETER", path) not in present:
                continue
            if next(left, None) != ("PARAMETER", path):
                trace.folding.exposed = True
                raise CannotFold(f"the export has {path} at another place than the module")
            handles.append(made)
        return handles + [source(kind, path) for kind, path in left]

    def _import_whole(self, importer: Importer, signature: Signature) -> Graph:
        """The last rung: everything is one operator."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.in_spec)
        call = ModuleCall(self.objective, (args, kwargs), self.train, self.recordings[""][0])
        r = call.recording
        names = unique(leaf_names(pytree.tree_unflatten(list(range(len(r.out_constants))), r.out_spec)))
        self.last = Trace(None, OpaqueOps(), r.out_constants, r.out_slots, r.out_spec, [names[i] for i in r.out_slots])  # type: ignore[arg-type]
        handles = self._feeds(importer, signature)
        handles += [self._source(importer, "param", self.names_of[id(t)], t) for _, t in self.objective.named_parameters()]
        handles += [self._source(importer, "buffer", self.names_of.get(id(t), clean_path(n)), t) for n, t in self.objective.named_buffers()]
        made = importer.emit("opaque", call, *handles)
        importer.describe_opaque(call)
        results = [made] if isinstance(made, torch.Tensor) else made
        outputs, written = results[: len(r.out_slots)], results[len(r.out_slots) :]
        return self._finish(importer, outputs, {clean_path(n): v for n, v in zip(r.written, written, strict=True)})

    def _feeds(self, importer: Importer, signature: Signature) -> list[torch.Tensor]:
        if len(signature) != len(self.tensor_slots):
            raise ValueError(f"[capture] {len(signature)} input tensors, captured with {len(self.tensor_slots)}")
        handles = []
        for name, (shape, dtype), dim, known in zip(self._names, signature, self.batch_dims, self.inputs, strict=True):
            handle = fake_like(importer.mode, shape, dtype, known.requires_grad)
            importer.source_node("feed", f"in:{name}", handle, name, sample_dim=dim)
            handles.append(importer.aliases.fresh(handle))
        return handles

    def _source(self, importer: Importer, group: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        handle = fake_like(importer.mode, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        importer.source_node(group, f"{group}:{name}", handle, name)
        return importer.aliases.fresh(handle)

    def _finish(self, importer: Importer, outputs: list[torch.Tensor], written: dict[str, torch.Tensor]) -> Graph:
        for name, tensor in zip(self._last().out_names, outputs, strict=True):
            importer.return_node(f"out:{name}", tensor, name)
        for name, tensor in written.items():
            importer.return_node(f"write:{name}", tensor, name, target="buffer_write")
        importer.graph.train, importer.graph.dynamic = self.train, self.dynamic
        return importer.finish()

    def _stored(self, program: torch.export.ExportedProgram, target: str, kind: str) -> tuple[torch.Tensor, str, str]:
        name = clean_path(target)
        tables = {"PARAMETER": ("param", self.module.named_parameters), "BUFFER": ("buffer", self.module.named_buffers)}
        if kind == "CONSTANT_TENSOR":
            return self._constant(name, program.constants[target])
        if kind not in tables:
            raise CaptureError(f"[capture] input of kind {kind}")
        group = tables[kind][0]
        owner, _, leaf = target.rpartition(".")
        tensor = getattr(FlatCallPath(self.objective).get(owner), leaf)
        return tensor, group, self.names_of.get(id(tensor), name)

    def _constant(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, str, str]:
        """Constants of several traces may have one name and different values."""
        candidate, k = name, 0
        known = self.constants.setdefault(candidate, tensor)
        while known is not tensor and not (known.dtype == tensor.dtype and not known.is_meta and torch.equal(known, tensor)):
            k += 1
            candidate = f"{name}.{k}"
            known = self.constants.setdefault(candidate, tensor)
        return known, "const", candidate

    # -- stored tensors ------------------------------------------------------------------------------------------------
    def stored_tensor(self, kind: str, qualname: str) -> torch.Tensor:
        """The user's own Parameter or buffer, or a constant of the trace."""
        if kind == "param":
            return self.parameters[qualname]
        if kind == "buffer":
            return self.buffers[qualname]
        return self.constants[qualname]

    def param(self, qualname: str) -> nn.Parameter:
        return self.parameters[qualname]

    def stored_tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        return {n.name: self.stored_tensor(n.kind, n.qualname) for n in graph.nodes if n.kind in ("param", "buffer", "const")}


class FlatCallPath:
    """Finds a module by its path in the exported wrapper."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def get(self, path: str) -> nn.Module:
        return self.objective.get_submodule(path.removeprefix("objective").removeprefix("."))


@contextlib.contextmanager
def cumulative_averages(module: nn.Module) -> Iterator[None]:
    """Batch norms with momentum=None are traced with a number that stands for it."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None]
    for m in norms:
        m.momentum = CUMULATIVE
    try:
        yield
    finally:
        for m in norms:
            m.momentum = None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, which else goes through all that a trace holds, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A trace that doesn't run at other sizes is refused with a reason; torch would also log the traceback of its fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def prefixed(prefix: str, items: Any) -> Any:
    return ((prefix + n, t) for n, t in items)


def user_returns(graph: Graph) -> list[Any]:
    return [n for n in graph.of_kind("return") if n.target != "buffer_write"]
