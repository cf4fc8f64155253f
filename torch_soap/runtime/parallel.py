"""Parallel: what stands behind a parallelized module: captures, engines, where parameters live, and the agreement of ranks.

[Note: whole, stored, copy] A parameter is *whole* in the user's eyes (names and shapes of checkpoints). A rank *stores* one box of it (or
nothing): that is `param.data`, and `.grad` has the same shape. What an operator reads is a *copy*, made by the Program.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from torch_soap import _C
from torch_soap.capture import Captured, capture
from torch_soap.capture.graph import Graph
from torch_soap.plan import Plan, lower
from torch_soap.random import CounterState
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.rewrite.substitution import Checker
from torch_soap.runtime.backward import NUM_OTHERS, accumulates_all, agree_on_backward, input_gradients, mean_gradient
from torch_soap.runtime.calling import Calling, all_plain, input_tensors, structure_key
from torch_soap.runtime.comm import Comm
from torch_soap.runtime.copies import plain_copy, with_memory
from torch_soap.runtime.deferred import Deferred
from torch_soap.runtime.engine import Engine, StepState
from torch_soap.runtime.header import Header, RankMismatchError, agree
from torch_soap.runtime.meter import Meter
from torch_soap.runtime.storage import assemble, cut, materialise
from torch_soap.runtime.tree import ModuleTree
from torch_soap.runtime.watch import AttributeWatch, GradientWatch, HookWatch, ParameterWatch, ReadAttributes, ReplicaWatch, checksum, compare_replicas

Planner = Callable[[_C.OpGraph, Graph, list[int]], Plan]


class Parallel:
    """One parallelized module on one rank.

    Args:
        planner: gives the plan at the first call: (graph, captured graph, rows of each process) -> Plan.
    """

    def __init__(self, module: nn.Module, comm: Comm, *, loss: Callable[..., Any] | None, planner: Planner) -> None:
        self.module = module
        self.comm = comm
        self.loss = loss
        self.planner = planner
        self.plan: Plan | None = None
        self.planned: set[str] = set()  # nodes of the graph that the plan was made for
        self.captures: dict[Any, list[tuple[Captured, ReadAttributes]]] = {}  # by modes and structure of the call
        self.engines: dict[Any, tuple[Engine, Graph]] = {}
        self.boxes: dict[str, list[Any] | None] = {}  # by parameter name, once planned
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters(remove_duplicate=False)}
        self.family: list[weakref.ref[Parallel]] = [weakref.ref(self)]  # copies of one another: planned together
        self.own_forward: Any = None  # a forward that was set on the module itself
        self.sample_dims: Sequence[int | None] | None = None  # of each input tensor, named by the user
        self.refresh: Callable[[nn.Module], None] | None = None  # before a lazy plan cuts parameters: rank 0's win once more
        self.owners: dict[str, bool] = {}  # this rank's part counts in global norms and checkpoints
        self.storage: dict[str, Any] = {}  # node name -> Sharding
        self.random = CounterState.from_torch()
        self.header = Header(comm)
        self.label = ""  # which of the models that this process parallelized: the same on all ranks
        self.calls = 0
        self.capture_seconds = 0.0  # the last capture's
        self.deferred = Deferred(self.parameters)
        self.meter = Meter()
        self.trial: Callable[[Plan, Graph, Sequence[torch.Tensor], dict[str, torch.Tensor]], Plan] | None = None  # chooses among a plan and its rivals
        self.search: Planner | None = None  # a plan for this machine as it is now, whatever the first one was
        self.pending_states: list[tuple[Any, dict[str, Any]]] = []  # optimizers and their whole state, for after the next cut
        self.tree = ModuleTree(module)
        self.cuts: dict[str, bool] = {}  # what `is_cut` has said
        self.structures: dict[Any, Any] = {}  # dtypes, dims and needs of gradients of a call's tensors -> what `structure_key` has said
        self.calling: dict[Engine, Calling] = {}
        self.frozen: dict[Captured, list[bool]] = {}  # which parameters of its twin require gradients
        self.known = ParameterWatch()
        self.replicas, self.gradients, self.hooks, self.attributes = ReplicaWatch(), GradientWatch(), HookWatch(), AttributeWatch(self.tree)

    # -- planning ------------------------------------------------------------------------------------------------------
    def capture(self, args: tuple[Any, ...], kwargs: dict[str, Any], structure: Any = None) -> Captured:
        """The capture of the module's present mode, as `attributes.look` has found it; made at the first call in that mode.

        It is made of a plain twin with whole parameters, so that tracing and checking never touch the user's Parameters. What the
        twin's parameters hold is given back afterwards: later traces need their shapes only.
        """
        key = (self.tree.last().number, self.attributes.mode, structure_key(args, kwargs) if structure is None else structure)
        known = self.captures.setdefault(key, [])
        captured = next((c for c, read in known if read.unchanged()), None)
        if captured is None:
            twin = plain_copy(self, {}, for_capture=True)
            on_meta = any(p.is_meta for p in twin.parameters())
            if on_meta:
                with_memory(twin)
            read = ReadAttributes(twin)

            def make() -> Captured:
                with read, torch.compiler.set_stance("force_eager"):
                    return capture(twin, args, kwargs, train=self.module.training, loss=self.loss, sample_dims=self.sample_dims, check=not on_meta)

            begin = time.perf_counter()
            captured = self.together(make, input_tensors(args, kwargs))
            self.capture_seconds = time.perf_counter() - begin
            for p in twin.parameters():
                p.grad = None
                p.data = torch.empty_like(p.data)
            self.settle_buffers(twin)
            known.append((captured, read.of(self.module)))
            self.attributes.captured(captured, known[-1][1])
        if self.frozen.get(captured) != self.attributes.frozen:
            self.frozen[captured] = self.attributes.frozen
            for mine, theirs in zip(self.module.parameters(), captured.module.parameters(), strict=True):
                theirs.requires_grad_(mine.requires_grad)
        return captured

    def settle_buffers(self, twin: nn.Module) -> None:
        """Buffers that the first forward gives another shape have it in the twin: the module's get it too, as in one process."""
        for name, b in twin.named_buffers():
            if self.module.get_buffer(name).shape != b.shape:
                owner, _, leaf = name.rpartition(".")
                self.module.get_submodule(owner)._buffers[leaf] = b.detach().clone()

    def together(self, make: Callable[[], Captured], tensors: Sequence[torch.Tensor]) -> Captured:
        """make() on every rank; where one fails all raise, and say so when it is because their inputs differ. Collective."""
        made, failure = None, None
        try:
            made = make()
        except Exception as error:
            failure = error
        failures = self.comm.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if any(failures):
            self.header.explain_failure(tensors, failure)
        if failure is not None:
            raise failure
        for rank, text in enumerate(failures):
            if text is not None:
                raise RankMismatchError(f"[capture] rank {rank} failed: {text}")
        assert made is not None
        return made

    def stored(self, captured: Captured, graph: Graph) -> dict[str, torch.Tensor]:
        """By node name: the user's own Parameters (this rank's parts) and buffers, and the trace's constants."""
        params: dict[str, torch.Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        tables: dict[str, dict[str, torch.Tensor]] = {"param": params, "buffer": buffers, "const": {}}
        return {
            n.name: tables[n.kind][n.qualname] if n.qualname in tables[n.kind] else captured.stored_tensor(n.kind, n.qualname)
            for n in graph.nodes
            if n.kind in tables
        }

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Captures and plans for this process' example inputs, without running."""
        self.header.check(
            self.module.training, torch.is_grad_enabled(), input_tensors(args, kwargs), structure_key(args, kwargs), self.attributes.look(), model=self.label
        )
        captured = self.capture(args, kwargs)
        tensors = captured.flatten_inputs(args, kwargs)
        rows, signature = self.header.rows(tensors, captured.batch_dims)
        self.engine(captured, signature, rows, tensors)

    def engine(self, captured: Captured, signature: Any, rows: Sequence[int], tensors: Sequence[torch.Tensor]) -> tuple[Engine, Graph]:
        """The engine for these global input shapes and rows; the first one plans, on trial with this process' inputs, and cuts the parameters."""
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        key = (id(captured), signature, tuple(rows), autocast, self.attributes.mode, tuple(self.attributes.frozen))
        if key in self.engines:
            return self.engines[key]
        graph = captured.instantiate(signature)
        op_graph = to_op_graph(graph)
        if self.plan is None:
            plan = self.planner(op_graph, graph, list(rows))
            Checker(graph).check(op_graph, plan.strategy.rewrites)
            if self.trial is not None:
                plan = self.trial(plan, graph, tensors, self.stored(captured, graph))
            self.adopt(plan)
            assert self.plan is not None
            if self.plan.stats:
                self.plan.stats.setdefault("capture_seconds", self.capture_seconds)
            self.planned = {n.name for n in _C.rewritten(op_graph, self.plan.strategy.rewrites).nodes}
            self.plan.exact = captured.exact
            if not captured.exact:
                warnings.warn("[torch_soap] results may differ from one process: " + "; ".join(captured.reasons), stacklevel=2)
        strategy = self.plan.strategy.copy()
        if self.storage:
            strategy.rewrites = _C.fitting(op_graph, strategy.rewrites)
            names = {n.name for n in _C.rewritten(op_graph, strategy.rewrites).nodes}
            for name in self.planned - names:  # operators that this mode doesn't have
                strategy.remove(name)
            for name, sharding in self.storage.items():
                strategy.keep_storage(name, sharding)
        program = lower(op_graph, self.plan, rows, strategy)
        agree(self.comm, "program", hashlib.sha256(str(program).encode()).hexdigest(), "the lowered programs differ")
        if not self.storage:
            if self.refresh is not None:
                self.refresh(self.module)
            for other in [self, *(p for r in self.family if (p := r()) not in (None, self))]:
                if other is not self:
                    other.plan, other.planned = self.plan, self.planned
                other.cut_parameters(program)
        for optimizer, state in self.pending_states:
            optimizer.load_state_dict(state)
        self.pending_states.clear()
        engine = Engine(program, graph, self.comm.rank, self.comm)
        self.comm.join(engine.groups())
        self.engines[key] = engine, graph
        return engine, graph

    def cut_parameters(self, program: _C.Program) -> None:
        """From here on a Parameter's data is the part that this rank stores."""
        self.shapes = {n: tuple(p.shape) for n, p in self.module.named_parameters(remove_duplicate=False)}
        for node in program.graph.nodes:
            if node.kind not in (_C.NodeKind.param, _C.NodeKind.buffer):
                continue
            sharding = program.tiles[node.outputs[0]]
            self.storage[node.name] = sharding
            if node.kind != _C.NodeKind.param:
                continue
            name = node.name.removeprefix("param:")
            mine = next((c for c in sharding.coords if self.comm.rank in c.devices), None)
            self.boxes[name] = mine.box if mine is not None else None
            self.owners[name] = mine is not None and mine.devices[0] == self.comm.rank
        self.cuts.clear()
        self.materialise()
        self.gradients.attach(dict(self.parameters()))
        for name, p in self.parameters():
            if name in self.boxes and self.is_cut(name) and tuple(p.shape) == self.shapes[name]:
                part = cut(p.data, self.boxes[name]).clone(memory_format=torch.contiguous_format)
                grad = None if p.grad is None else cut(p.grad, self.boxes[name]).clone()
                p.grad = None
                p.data = part
                p.grad = grad
        self.known.start(self.parameters())

    def adopt(self, plan: Plan) -> None:
        self.plan = plan
        plan.monitor = weakref.ref(self)

    def materialise(self) -> None:
        """Gives parameters and buffers of the meta device memory for this rank's part only, unset until load_state_dict."""
        made = materialise(self.module, self.boxes)
        if made:
            warnings.warn(f"[torch_soap] {made} parameters were on the meta device: this rank's parts have memory now, load a state_dict", stacklevel=2)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def is_cut(self, name: str) -> bool:
        """Whether any rank stores less than the whole parameter."""
        known = self.cuts.get(name)
        if known is None:
            sharding = self.storage.get(f"param:{name}")
            if sharding is None:
                return False
            known = self.cuts[name] = len(sharding.coords) > 1 or len(sharding.coords[0].devices) < self.comm.world_size
        return known

    def gather(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor that is laid out as the parameter `name` is. Collective."""
        box = self.boxes[name]
        mine = (box_runs(box), tensor.detach().cpu()) if self.owners[name] and box is not None else None
        parts = [p for p in self.comm.gather_objects(mine) if p is not None]
        sets = [([_C.IndexSet.from_runs(runs) for runs in b], t) for b, t in parts]
        return assemble(self.shapes[name], sets)

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside, parameters have their whole data (read only: changes are lost). Collective where anything is cut."""
        if any(self.is_cut(name) for name, _ in self.parameters()):
            self.comm.gather_ints([], "deepcopy")
        kept = {}
        for name, p in self.parameters():
            if self.is_cut(name):
                kept[name] = (p, p.data, p.grad)
                whole = self.gather(name, p.data)
                p.grad = None
                p.data = whole
        try:
            yield
        finally:
            for p, data, grad in kept.values():
                p.data = data
                p.grad = grad

    # -- calling -------------------------------------------------------------------------------------------------------
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward of all ranks together."""
        if torch.is_inference_mode_enabled():  # parameters are cut, and programs kept, for training too
            with torch.inference_mode(False), torch.no_grad():
                args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
                return self.call(args, kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("[torch_soap] torch.func's transforms don't go through a parallelized module: apply them to the plain one")
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # a checkpoint around us would run us again, in another order
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                return self.call_plainly(args, kwargs)
        return self.call_plainly(args, kwargs)

    def call_plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        summary = self.attributes.look()
        tree = self.tree.last()
        fresh = self.known.look(tree)
        if fresh:
            self.gradients.attach(fresh)
        plain = all_plain(args, kwargs)
        leaves = list(args) if plain else input_tensors(args, kwargs)
        structure = self.structure_of(args) if plain else structure_key(args, kwargs)
        grad = torch.is_grad_enabled()
        deferred = grad and self.deferred.wanted()
        self.header.check(
            self.module.training,
            grad,
            leaves,
            structure,
            summary,
            model=self.label,
            deferred=deferred,
            replaced=self.known.replaced,
            reseeded=self.random.reseeded(),
        )
        self.calls += 1  # alike on all ranks
        captured = self.capture(args, kwargs, structure)
        tensors = leaves if plain else captured.flatten_inputs(args, kwargs)
        if captured.ragged and self.comm.world_size > 1:
            raise ValueError(
                f"[forward] {captured.ragged} are offsets of an embedding_bag into indices that are given too: each process' count from 0, so its "
                "bags can't be joined with others'. Give the indices in 2-D, one bag a row, padded with padding_idx (or weighted 0)"
            )
        rows, signature = self.header.rows(tensors, captured.batch_dims)
        self.same_constants(captured, tensors)
        engine, graph = self.engine(captured, signature, rows, tensors)
        calling = self.calling.get(engine)
        if calling is None or calling.tree is not tree:  # a first call may have changed the module
            tree = self.tree.now()
            calling = self.calling[engine] = Calling(captured, graph, tree, engine, self.gradients)
        self.hooks.look(tree)
        self.random.next_call()
        self.same_random()
        feeds = dict(zip(calling.feeds, tensors, strict=True))
        stored = calling.stored()
        if self.replicas.due(self.calls) or self.known.fresh():
            compare_replicas(self.comm, {n: t for n, t in stored.items() if n in self.storage}, self.storage)
        if grad and (calling.any_trained() or any(t.requires_grad for t in tensors)):
            outputs = list(RunProgram.apply(self, engine, calling, feeds, stored, deferred, *tensors, *calling.parameters))
        else:
            state = engine.forward(feeds, stored, grad=False, random=self.random)
            outputs = self.finish(engine, state, stored)
        return captured.unflatten_outputs(outputs)

    def structure_of(self, args: tuple[torch.Tensor, ...]) -> Any:
        """As structure_key, of a call that is all plain."""
        key = tuple([(t.dtype, t.dim(), t.requires_grad) for t in args])
        if key not in self.structures:
            self.structures[key] = structure_key(args, {})
        return self.structures[key]

    def same_constants(self, captured: Captured, tensors: Sequence[torch.Tensor]) -> None:
        """An input without rows is the same on all ranks."""
        if None not in captured.batch_dims:
            return
        numbers = [checksum(t) for t, dim in zip(tensors, captured.batch_dims, strict=True) if dim is None]
        names = [n for n, dim in zip(captured.input_names(), captured.batch_dims, strict=True) if dim is None]
        everyone = self.comm.gather_objects(numbers)
        for rank, other in enumerate(everyone):
            for name, mine, first in zip(names, other, everyone[0], strict=True):
                if mine != first:
                    raise RankMismatchError(f"[forward] {name} has no dim for rows, and rank {rank} has other values than rank 0")

    def same_random(self) -> None:
        """Ranks that seed torch differently (by rank, as is usual), or only some of them anew, draw what rank 0 draws."""
        if self.header.reseeded:
            first = self.comm.gather_objects((self.random.seed, self.random.call))[0]
            self.random.seed, self.random.call = first
            self.random.changed = False

    def finish(self, engine: Engine, state: StepState, stored: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Writes buffers; the outputs in order."""
        engine.write(state, stored)
        return [engine.output(state, node).detach() for node in engine.returns]


class RunProgram(torch.autograd.Function):
    """The whole Program as one autograd node; its inputs are the module's inputs and Parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        parallel: Parallel,
        engine: Engine,
        calling: Calling,
        feeds: dict[str, torch.Tensor],
        stored: dict[str, torch.Tensor],
        deferred: bool,
        *tensors: torch.Tensor,
    ) -> Any:
        seeds = None
        if engine.program.interleaved:
            share = 1.0 / parallel.comm.world_size
            seeds = {engine.names[n]: torch.full(engine.shapes[engine.value_of_return[n]], share, dtype=engine.dtype_of(n)) for n in engine.returns}
        later = engine.program.interleaved and (deferred or bool(parallel.deferred.waiting))
        begin_ns = parallel.meter.begin(engine)
        state = engine.forward(feeds, stored, grad=True, random=parallel.random, seeds=seeds, deferred=later)
        outputs = parallel.finish(engine, state, stored)
        ctx.forward_ns = time.perf_counter_ns() - begin_ns
        ctx.parallel, ctx.engine, ctx.state, ctx.deferred, ctx.call = parallel, engine, state, deferred, parallel.calls
        ctx.calling = calling
        ctx.shapes = {i: tensors[i].shape for i in calling.special}
        # What comes in from the loss of this process is taken as 1/P of the objective's. What goes out to a part of this process'
        # own graph (a generator, a stem under DDP) is the gradient of its own loss again; a leaf has the objective's.
        ctx.inner = [i for i, t in enumerate(tensors[: len(calling.feeds)]) if t.grad_fn is not None]
        ctx.mark_non_differentiable(*[o for o, n in zip(outputs, engine.returns, strict=True) if not engine.return_wants_grad(n)])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        # once_differentiable would say nothing where the incoming gradient is a constant, and give zeros.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "[torch_soap] double backward (create_graph=True) doesn't go through the parallel program; compute such a term on the plain module"
            )
        engine, state, comm = ctx.engine, ctx.state, ctx.parallel.comm
        begin_ns = time.perf_counter_ns()
        if state is None:
            raise RuntimeError("[torch_soap] backward a second time through the same forward: pass retain_graph=True to the first")
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if keep:
            state = state.copy()
        else:
            ctx.state = None
        deferred = ctx.parallel.deferred
        accumulates = (ctx.deferred or bool(deferred.waiting)) and accumulates_all(ctx.next_functions)
        used, accumulates = agree_on_backward(engine, ctx.parallel, grads, accumulates, ctx.call)
        scale: torch.Tensor | None = None
        if engine.program.interleaved:
            scale = mean_gradient(comm, grads)
        else:
            incoming = {engine.names[n]: g / comm.world_size for n, g in zip(engine.returns, grads, strict=True) if g is not None}
            state.deferred = accumulates
            engine.backward(state, incoming, retain_graph=keep)
        if not accumulates:  # else gradients aren't reduced here
            ctx.parallel.meter.end_backward(engine, ctx.forward_ns, begin_ns)
        if state.deferred and not accumulates:
            engine.reduce(state)
        elif state.deferred:
            deferred.add(engine, state, scale, engine.nodes_before(used))
        if accumulates and not ctx.deferred:
            deferred.flush()
        return (*[None] * NUM_OTHERS, *input_gradients(ctx, state, used, scale))


def box_runs(box: list[Any]) -> list[list[tuple[int, int]]]:
    return [list(s.runs) for s in box]
