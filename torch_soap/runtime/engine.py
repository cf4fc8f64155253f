"""Engine: one rank's program at one signature, forward and backward in the Program's own order.

What a step does many times runs in C++ (csrc/engine/engine.h): segments, their backward, movements within the rank and among ranks that share memory.
Here is what is prepared once, and what is rare.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from torch_soap import _C, _backend
from torch_soap.capture.graph import Graph
from torch_soap.random import CounterState
from torch_soap.rewrite.segment import DTYPES, build_segment
from torch_soap.runtime.comm import Comm
from torch_soap.runtime.meter import Sample
from torch_soap.runtime.movement import Index, PlannedStep, compiled, execute, index_of, plan_step, take
from torch_soap.runtime.state import StepState
from torch_soap.runtime.storage import cut, stored_boxes


class Engine:
    """Runs one rank's part of a Program.

    Args:
        graph: the captured graph that the Program was lowered from.
    """

    def __init__(self, program: _C.Program, graph: Graph, rank: int, comm: Comm) -> None:
        self.program = program
        self.rank_program = _C.project(program, rank)
        self.comm = comm
        self.values = list(self.rank_program.values)
        self.instructions = list(self.rank_program.instructions)
        self.segments = list(self.rank_program.segments)
        self.modules = [build_segment(program, self.rank_program, s, graph) for s in self.segments]
        self.inputs = [list(s.inputs) for s in self.segments]
        self.outs = [list(s.outputs) for s in self.segments]
        self.differentiable = [s.differentiable for s in self.segments]
        self.again = [set(s.again) if s.region >= 0 else None for s in self.segments]  # of segments computed again: outputs wanted then
        self.recomputes = [[(a.segment, a.fill) for a in i.recomputes] for i in self.instructions]
        self.frees = [list(i.frees) for i in self.instructions]
        self.kept = [list(i.kept) for i in self.instructions]
        self.kinds = [i.kind for i in self.instructions]
        self.segment_of = [i.segment for i in self.instructions]
        self.planned: list[PlannedStep | None] = [plan_step(program, self.rank_program, i, DTYPES) if i.segment < 0 else None for i in self.instructions]
        self.shapes = [list(v.shape) for v in self.values]
        self.wants_grad = [v.grad for v in self.values]
        kinds = _C.NodeKind
        nodes = program.graph.nodes
        self.with_grad = {g.tensor for g in program.groups if g.grad}
        self.feeds = [n.id for n in nodes if n.kind == kinds.feed]
        self.stores = [n.id for n in nodes if n.kind in (kinds.param, kinds.buffer, kinds.const)]
        self.returns = [n.id for n in nodes if n.kind == kinds.return_ and n.target != "buffer_write"]
        self.writes = [n.id for n in nodes if n.kind == kinds.return_ and n.target == "buffer_write"]
        self.names = [n.name for n in nodes]
        self.written = [(n, self.names[n].removeprefix("write:")) for n in self.writes]
        self.places: dict[str, Index | None] = {}  # of what is written: this rank's part, None: it has none
        self.value_of_store = list(self.rank_program.params)
        self.value_of_return = list(self.rank_program.returns)
        backward = (_C.InstructionKind.segment_backward, _C.InstructionKind.grad_fill, _C.InstructionKind.refill)
        self.is_backward = [k in backward for k in self.kinds]
        self.trace: list[tuple[int, int, int]] | None = None  # when asked: (instruction, start, end) in ns of its clock
        self.trace_clock: Callable[[], int] = time.perf_counter_ns
        self.sample: Sample | None = None  # of the step that runs, when it is sampled
        self.num_forward = next((i for i, k in enumerate(self.kinds) if k in backward), len(self.kinds))
        if program.interleaved:
            self.num_forward = len(self.kinds)
        stores = {self.value_of_store[n] for n in (*self.feeds, *self.stores)}
        self.boxes = stored_boxes(program, rank)
        self.fed = [(self.value_of_store[n], self.names[n]) for n in self.feeds if self.value_of_store[n] >= 0]
        self.store_names = [self.names[n] for n in self.stores]
        self.node_of = {name: i for i, name in enumerate(self.names)}
        self.dtypes = {n: self._dtype_of(n) for n in (*self.feeds, *self.stores, *self.returns)}
        self.released = self._released()
        # What is stored and what is gathered anew stays itself, with its version: whoever changes it between forward and backward hears of it.
        self.enters = [wants and v not in stores and v not in self.refilled for v, wants in enumerate(self.wants_grad)]
        self.recomputed_on = self._recomputed_on()
        read = {self.values[v].tensor for v in self.recomputed_on}
        self.overwritten = [n for n in self.stores if self._is_written(n) and nodes[n].outputs[0] in read]
        self.param_fills, self.fill_sources, self.filled_params = self._param_fills()
        self.dropped = self._dropped()
        self.before: dict[frozenset[int], set[int]] = {}
        self.run_segment: list[Callable[..., Any]] = [m.forward for m in self.modules]
        self.given_back = [[v for v in values if v in self.refilled] for values in self.inputs]  # copies among a segment's inputs
        self.own_storage = [p is not None and any(v in self.refilled for t in p.transfers for v, _ in t.results) for p in self.planned]
        self.core: _backend.Engine | None = None  # made at the first step, when the groups of ranks are there

    def _compiled(self) -> _backend.Engine:
        kinds = _C.InstructionKind
        usual = {kinds.segment: _backend.Kind.segment, kinds.fill: _backend.Kind.fill, kinds.grad_fill: _backend.Kind.grad_fill}
        segments = []
        for i, values in enumerate(self.inputs):
            again = self.again[i]
            inputs = [(v, self.wants_grad[v], not self.enters[v]) for v in values]
            wanted = [again is not None and v in again for v in self.outs[i]]
            segments.append((inputs, self.outs[i], self.given_back[i], self.differentiable[i], again is not None, wanted))
        steps: list[_backend.Step] = []
        instructions = []
        for i, kind in enumerate(self.kinds):
            planned, how, index = self.planned[i], usual.get(kind, _backend.Kind.rare), self.segment_of[i]
            if kind == kinds.segment_backward and not self.recomputes[i]:
                how = _backend.Kind.segment_backward
            if planned is not None and how != _backend.Kind.rare:
                step = None if self.own_storage[i] else compiled(planned, self.comm)
                if step is None:
                    how = _backend.Kind.rare
                else:
                    index = len(steps)
                    steps.append(step)
            copies, grads = self.dropped.get(i, ([], []))
            instructions.append((how, index, self.is_backward[i], i in self.param_fills, self.frees[i], self.kept[i], self.released.get(i, []), copies, grads))
        stores = [(self.value_of_store[n], self.names[n], self.shapes[self.value_of_store[n]] if self.value_of_store[n] >= 0 else []) for n in self.stores]
        return _backend.Engine(segments, steps, instructions, self.shapes, stores)

    def groups(self) -> set[tuple[int, ...]]:
        """Sets of ranks among which this rank's program exchanges and reduces."""
        steps = [p for p in self.planned if p is not None]
        reductions = {tuple(t.ranks) for p in steps for t in p.transfers if t.all_reduce and self.comm.rank in t.ranks}
        return {tuple(p.ranks) for p in steps if p.ranks} | reductions

    def _recomputed_on(self) -> set[int]:
        """Values that forward leaves for what backward computes again: what enters regions."""
        again = [a for recomputes in self.recomputes for a in recomputes]
        remade = {v for segment, _ in again if segment >= 0 for v in self.again[segment] or ()}
        steps = [step for _, fill in again if fill >= 0 and (step := self.planned[fill]) is not None]
        remade |= {v for step in steps for t in step.transfers for v, _ in t.results}
        return {v for segment, _ in again if segment >= 0 for v in self.inputs[segment]} - remade

    def _is_written(self, store: int) -> bool:
        written = {self.names[n].removeprefix("write:") for n in self.writes}
        return self.names[store].split(":", 1)[-1] in written

    def _released(self) -> dict[int, list[int]]:
        """Instruction -> gathered copies (Keep.use) that forward has used for the last time there.

        Where chunks interleave, forward may use a copy after the first backward has gathered it again: such a one stays.
        """
        kinds = _C.InstructionKind
        self.refilled = {
            v: position
            for position, (p, k) in enumerate(zip(self.planned, self.kinds, strict=True))
            if p is not None and k == kinds.refill
            for t in p.transfers
            for v, _ in t.results
        }
        last: dict[int, int] = {}
        for position, kind in enumerate(self.kinds):
            if kind == kinds.segment:
                last |= {v: position for v in self.inputs[self.segment_of[position]] if v in self.refilled}
        out: dict[int, list[int]] = {}
        for value, position in last.items():
            if position < self.refilled[value]:
                out.setdefault(position, []).append(value)
        return out

    def _param_fills(self) -> tuple[set[int], dict[int, int], set[int]]:
        """Instructions that bring gradients to parameters over ranks (steps of their own: buckets); the values that they read, with the
        parameter's node; and the nodes of all parameters that any rank has such an instruction for."""
        program, graph = self.program, self.program.graph
        of_step: list[set[int]] = [set() for _ in program.steps]
        for nodes, step in zip(of_step, program.steps, strict=True):
            if step.kind == _C.StepKind.grad_fill and any(program.movement(step.kind, i).pattern != _C.Pattern.local for i in step.items):
                nodes |= {graph.tensors[program.groups[i.id].tensor].producer for i in step.items}
                if any(graph.nodes[n].kind != _C.NodeKind.param for n in nodes):
                    nodes.clear()
        positions = [p for p, i in enumerate(self.instructions) if i.kind == _C.InstructionKind.grad_fill and of_step[i.step]]
        moves = [m for p in positions if (planned := self.planned[p]) is not None for t in planned.transfers for m in t.moves]
        sources = {m.src: graph.tensors[self.values[m.src].tensor].producer for m in moves if m.src >= 0}
        return set(positions), sources, set().union(*of_step)

    def _dropped(self) -> dict[int, tuple[list[int], list[int]]]:
        """Instruction of backward -> copies (Keep.use) and gradients of copies that are used for the last time there."""
        kinds = _C.InstructionKind
        last: tuple[dict[int, int], dict[int, int]] = ({}, {})
        for position, (step, kind) in enumerate(zip(self.planned, self.kinds, strict=True)):
            if kind == kinds.segment_backward:
                last[0].update({v: position for v in self.inputs[self.segment_of[position]] if v in self.refilled})
            elif step is not None and kind == kinds.grad_fill:
                last[1].update({m.src: position for t in step.transfers for m in t.moves if m.src >= 0})
        out: dict[int, tuple[list[int], list[int]]] = {}
        for which, positions in enumerate(last):
            for value, position in positions.items():
                out.setdefault(position, ([], []))[which].append(value)
        return out

    def state(self) -> StepState:
        return StepState(len(self.values), len(self.segments))

    # -- forward -----------------------------------------------------------------------------------------------------
    def forward(
        self,
        feeds: dict[str, torch.Tensor],
        stored: dict[str, torch.Tensor],
        *,
        grad: bool,
        random: CounterState | None = None,
        seeds: dict[str, torch.Tensor] | None = None,
        deferred: bool = False,
    ) -> StepState:
        """Runs up to the first backward instruction (all of them when interleaved).

        Args:
            feeds: this rank's inputs by node name; its own rows where the input has a sample dim.
            stored: this rank's part of each param, buffer and const by node name.
            seeds: interleaved programs: gradients of the returns, by node name.
            deferred: interleaved programs: leave the parameters' gradients unreduced.
        """
        if self.core is None:
            self.core = self._compiled()
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        # A copy of the counters: what backward computes again draws the same.
        state = self.state().of(None if random is None else replace(random), autocast)
        state.deferred = deferred
        for node, name in self.fed:
            state.values[node] = feeds[name].detach()
        self.core.begin(state, [stored[name] for name in self.store_names])
        for node in self.overwritten if grad else []:  # what is computed again reads what forward read
            value = self.value_of_store[node]
            if value >= 0:
                state.values[value] = state.values[value].clone()
        if seeds is not None:
            self.seed(state, seeds)
        self._run(state, self.num_forward, grad)
        if grad:
            state.versions = {v: state.values[v]._version for v in self.recomputed_on if v in state.values}
        return state

    def output(self, state: StepState, node: int) -> torch.Tensor:
        return state.values[self.value_of_return[node]]

    def dtype_of(self, node: int) -> torch.dtype:
        """Of what a feed or store makes, or a return takes."""
        return self.dtypes[node]

    def _dtype_of(self, node: int) -> torch.dtype:
        graph = self.program.graph
        tensors = list(graph.nodes[node].outputs) or list(graph.nodes[node].inputs)
        return DTYPES[graph.tensors[tensors[0]].dtype]

    def return_wants_grad(self, node: int) -> bool:
        return bool(self.program.graph.tensors[self.program.graph.nodes[node].inputs[0]].requires_grad)

    def write(self, state: StepState, stored: dict[str, torch.Tensor]) -> None:
        """Brings what this forward wrote into the buffers (and parameters, their own parts) by node name."""
        if not self.writes:
            return
        targets, sources = [], []
        for node, name in self.written:
            key = f"buffer:{name}" if f"buffer:{name}" in stored else f"param:{name}"
            if key not in self.places:
                value = self.value_of_return[node]
                box = self.boxes[key]
                self.places[key] = None if box is None else index_of(box, self.shapes[value])
            whole, index = state.values[self.value_of_return[node]], self.places[key]
            targets.append(stored[key])
            sources.append(cut(whole, None) if index is None else take(whole, index))
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)

    def seed(self, state: StepState, grads: dict[str, torch.Tensor]) -> None:
        for node in self.returns:
            value = self.value_of_return[node]
            if self.names[node] in grads and self.wants_grad[value]:
                _backend.accumulate(state, value, grads[self.names[node]])

    # -- backward ----------------------------------------------------------------------------------------------------
    def backward(self, state: StepState, grads: dict[str, torch.Tensor], *, retain_graph: bool = False) -> None:
        """Runs the rest. `grads`: of the returns, by node name. Leaves the gradients in `state.grads`.

        With retain_graph the segments' graphs stay; give a copy of the state then.
        """
        if state.position != self.num_forward:
            raise RuntimeError("[engine] this state's backward has run already")
        for value, version in state.versions.items():
            if state.values[value]._version != version:
                name = self.names[self.program.graph.tensors[self.values[value].tensor].producer]
                raise RuntimeError(f"[engine] {name} was changed in place after the forward, and backward computes again on it (the plan's recompute)")
        self.seed(state, grads)
        state.retain_graph = retain_graph
        self._run(state, len(self.instructions), True)

    def nodes_before(self, returns: frozenset[int]) -> set[int]:
        """Nodes of the graph on which one of these returns depends, themselves included."""
        if returns not in self.before:
            graph = self.program.graph
            seen, todo = set(returns), list(returns)
            while todo:
                for tensor in graph.nodes[todo.pop()].inputs:
                    producer = graph.tensors[tensor].producer
                    if producer not in seen:
                        seen.add(producer)
                        todo.append(producer)
            self.before[returns] = seen
        return self.before[returns]

    def gradient(self, state: StepState, node: int) -> torch.Tensor | None:
        """Of this rank's part of a parameter or feed; None where it isn't used. An empty part's is empty (GradScaler insists)."""
        value = self.value_of_store[node]
        if value < 0:
            return None
        grad = state.grads.get(value)
        if grad is not None:
            return grad.to(self.dtypes[node])
        if 0 in self.shapes[value] and self.program.graph.nodes[node].outputs[0] in self.with_grad:
            return torch.empty(self.shapes[value], dtype=self.dtypes[node])
        return None

    def reduce(self, state: StepState) -> None:
        """The gradient fills that a deferred state left out. Collective."""
        for position in sorted(self.param_fills):
            self._grad_fill(state, position)

    # -- instructions ------------------------------------------------------------------------------------------------
    def _run(self, state: StepState, end: int, grad: bool) -> None:
        core = self.core
        assert core is not None
        rare = partial(self._rare, state)
        try:
            if self.trace is None and self.sample is None:
                core.run(state, state.position, end, grad, self.run_segment, state.random, rare)
            else:
                for position in range(state.position, end):
                    if grad or not self.is_backward[position]:
                        self._run_watched(core, state, position, grad, rare)
        except RuntimeError as error:
            if not core.moving:
                raise
            raise RuntimeError(f"[comm] a movement among ranks {core.moving} failed: one of them ended, failed, or is elsewhere") from error
        self.comm.traffic.add_all(*core.take_counts())
        state.position = end

    def _run_watched(self, core: _backend.Engine, state: StepState, position: int, grad: bool, rare: Callable[[int], None]) -> None:
        sample = self.sample
        clock = time.perf_counter_ns if sample is None or self.segment_of[position] < 0 else sample.clock
        start_ns, begin = self.trace_clock(), clock()
        core.run(state, position, position + 1, grad, self._forwards(), state.random, rare)
        if sample is not None:
            sample.instructions[position] = clock() - begin
        if self.trace is not None:
            self.trace.append((position, start_ns, self.trace_clock()))

    def _forwards(self) -> list[Callable[..., Any]]:
        sample = self.sample
        return self.run_segment if sample is None else [partial(sample.run, m) for m in self.modules]

    def _rare(self, state: StepState, position: int) -> None:
        kind, kinds = self.kinds[position], _C.InstructionKind
        if kind == kinds.fill:
            self._fill(state, position)
        elif kind == kinds.refill:
            self._refill(state, position)
        elif kind == kinds.grad_fill:
            if not (state.deferred and position in self.param_fills):
                self._grad_fill(state, position)
        else:
            for segment, fill in self.recomputes[position]:
                if segment >= 0:
                    self._compute_again(state, segment)
                else:
                    self._fill(state, fill)
            _backend.run_backward(state, self.segment_of[position])

    def _compute_again(self, state: StepState, segment: int) -> None:
        enabled, dtype = state.autocast
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            assert self.core is not None
            self.core.forward(state, segment, True, True, self._forwards(), state.random)

    def _fill(self, state: StepState, position: int) -> None:
        step = self.planned[position]
        if step is None:
            raise RuntimeError("[engine] a fill without its plan")
        values = state.values
        if not self.own_storage[position]:
            for value, tensor in execute(step, self.comm, lambda value, dtype: values[value]):
                values[value] = tensor
            return
        sources: set[int] = set()

        def read(value: int, dtype: torch.dtype) -> torch.Tensor:
            sources.add(values[value].untyped_storage().data_ptr())
            return values[value]

        for value, tensor in execute(step, self.comm, read):
            # A copy that is given back and gathered again needs a storage of its own: pieces are views of parameters, of other
            # values, or of what a peer sent.
            storage = tensor.untyped_storage()
            own = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in sources
            values[value] = tensor if own or value not in self.refilled else tensor.clone(memory_format=torch.contiguous_format)

    def _refill(self, state: StepState, position: int) -> None:
        """Gathers a parameter's copy again, into the storage that the segments' graphs saved."""
        step = self.planned[position]
        if step is None:
            raise RuntimeError("[engine] a refill without its plan")
        places: dict[int, torch.Tensor] = {}

        def place(value: int) -> torch.Tensor | None:
            copy = state.copies.get(value)  # None: it was never given back
            if copy is not None:
                copy.untyped_storage().resize_(copy.numel() * copy.element_size())  # made dense by its fill
                places[value] = copy
            return copy

        versions = torch.autograd._unsafe_preserve_version_counter(tuple(state.copies[v] for t in step.transfers for v, _ in t.results if v in state.copies))
        with torch.no_grad(), versions:
            for value, tensor in execute(step, self.comm, lambda v, dtype: state.values[v], place):
                if tensor is not places.get(value) and place(value) is not None:
                    places[value].copy_(tensor)

    def _grad_fill(self, state: StepState, position: int) -> None:
        step = self.planned[position]
        if step is None:
            raise RuntimeError("[engine] a gradient fill without its plan")

        def read(value: int, dtype: torch.dtype) -> torch.Tensor:
            grad = state.grads.get(value)
            return torch.zeros((), dtype=dtype).expand(self.shapes[value]) if grad is None else grad.to(dtype)

        for value, grad in execute(step, self.comm, read):
            _backend.accumulate(state, value, grad)
