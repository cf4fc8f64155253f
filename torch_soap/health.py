"""`model.plan.health()`: what training measures of itself against what was predicted, and what to do where they differ.

What is compared, in the order in which a person would look:

    step       forward and backward, median over the last steps, slowest rank, against the simulated step without its update
    families   operators of one family (csrc/cost/work.h): their forward by the clock of the thread that computes them, in sampled steps. A backward
               segment's time goes to its operators' families by what was predicted, corrected by how far each family's forward was off
    links      movements of one kind among as many ranks on as many hosts: the rank that came last to a movement says how long it took
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch_soap import _C, cache, calibrate
from torch_soap.measuring import CORES
from torch_soap.runtime.replan import replan

if TYPE_CHECKING:
    from torch_soap.plan import Plan
    from torch_soap.runtime.parallel import Parallel

OFF = 1.5  # times longer or shorter than predicted: a row is off
COUNTS = 0.05  # of the step, that a row's difference makes up at least
STEP_OFF = 1.15  # the step itself


@dataclass(frozen=True)
class Row:
    """A part of a step, on the slowest rank: "step", "matmul", "all_reduce of 2 ranks within a host"."""

    name: str
    predicted_ns: int
    measured_ns: int

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_ns / max(self.predicted_ns, 1)

    def is_off(self, step_ns: int) -> bool:
        return not 1 / OFF <= self.ratio <= OFF and abs(self.measured_ns - self.predicted_ns) >= COUNTS * step_ns

    def __str__(self) -> str:
        return f"{self.name:<44} {self.predicted_ns / 1e6:>10.2f} {self.measured_ns / 1e6:>10.2f} {self.ratio:>8.2f}"


@dataclass
class Health:
    """Predicted against measured, the same on all ranks.

    Attributes:
        step: forward and backward.
        families: of operators; forward and backward together.
        links: movements, by kind, ranks and hosts.
        num_steps: that `step` is the median of.
        num_samples: steps that `families` and `links` are the medians of.
    """

    step: Row
    families: list[Row]
    links: list[Row]
    num_steps: int
    num_samples: int
    parallel: Any = field(default=None, repr=False, compare=False)

    @property
    def suspects(self) -> list[Row]:
        """Families and links whose prediction is off by so much that the step is, the largest difference first."""
        off = [r for r in [*self.families, *self.links] if r.is_off(max(self.step.measured_ns, self.step.predicted_ns))]
        return sorted(off, key=lambda r: -abs(r.measured_ns - r.predicted_ns))

    @property
    def ok(self) -> bool:
        return 1 / STEP_OFF <= self.step.ratio <= STEP_OFF and not self.suspects

    @property
    def rows(self) -> list[Row]:
        return [self.step, *self.families, *self.links]

    def as_data(self) -> dict[str, Any]:
        """Plain data for the report."""
        suspects = self.suspects
        parts = [("step", [self.step]), ("family", self.families), ("link", self.links)]
        rows = [
            {"what": r.name, "part": part, "predicted": r.predicted_ns, "measured": r.measured_ns, "off": r in suspects}
            for part, of_part in parts
            for r in of_part
        ]
        return {"rows": rows, "ok": self.ok, "num_steps": self.num_steps, "num_samples": self.num_samples}

    def __str__(self) -> str:
        lines = [f"{'':<44} {'predicted':>10} {'measured':>10} {'ratio':>8}", f"{'ms, slowest rank':<44}", *map(str, self.rows)]
        lines.append(f"over {self.num_steps} steps, parts over {self.num_samples} sampled ones")
        for r in self.suspects:
            lines.append(
                f"off: {r.name} takes {r.ratio:.1f} times as long as was predicted" if r.ratio > 1 else f"off: {r.name} takes {r.ratio:.2f} of the prediction"
            )
        if not self.ok:
            lines.append("plan.health().recalibrate(optimizer) measures what is off again and plans anew; all ranks together")
        return "\n".join(lines)

    def recalibrate(self, *optimizers: Any) -> Plan:
        """Measures again what is off (everything where nothing stands out), plans anew, and puts the model on that plan. Collective.

        Args:
            optimizers: of the model's parameters; their state moves to where the new plan has the parameters.

        Raises:
            RuntimeError: the model is gone.
        """
        parallel: Parallel | None = self.parallel() if self.parallel is not None else None
        if parallel is None or parallel.search is None:
            raise RuntimeError("[health] the model that this was measured of is gone")
        comm = parallel.comm
        host_of = calibrate.placement(comm)
        known = cache.load(comm.world_size, comm, host_of)
        forget(known, [r.name for r in self.suspects], {r.name for r in self.families})
        if comm.rank == 0:
            cache.save(comm.world_size, known, host_of)
        comm.gather_ints([])  # written before anyone reads
        captured_graph = next(iter(parallel.engines.values()))[1]
        context = parallel.plan.known_context("health") if parallel.plan is not None else None
        assert context is not None
        plan: Plan = parallel.search(context.graph, captured_graph, context.rows)
        if parallel.plan is not None and plan.text == parallel.plan.text:
            parallel.plan.predicted, parallel.plan.context = plan.predicted, plan.context
            return parallel.plan
        states = [o.state_dict() for o in optimizers]
        replan(parallel, plan)
        parallel.pending_states = list(zip(optimizers, states, strict=True))
        return plan


def forget(known: dict[str, Any], suspects: Iterable[str], families: set[str]) -> None:
    """Drops what the suspects were predicted by, all where there are none."""
    suspects = list(suspects)
    links = [s for s in suspects if s not in families]
    if not suspects or len(links) < len(suspects):
        for name in ("rates", "efficiency", "update", "busy_speed", "update_speed", "jitter", "step_overhead"):
            known.pop(name, None)
        known["operators"].clear()
    if not suspects or links:
        known["tables"].clear()
        for name in ("cold_ns", "turn_ns", "piece_ns", "message_ns"):
            known.pop(name, None)
    known["marks"].clear()


def measured_parts(parallel: Parallel) -> list[tuple[dict[int, int], dict[int, int], dict[int, int], dict[int, int]]]:
    """Of each sample on this rank: forward by program node; program step -> ns of movements; of backward segments (by instruction)."""
    kinds = _C.InstructionKind
    out = []
    latest: Any = parallel.meter.samples[-1][0] if parallel.meter.samples else None
    for engine, sample in parallel.meter.samples:
        if engine is not latest:  # other shapes
            continue
        moves, backward, forward = {}, {}, {}
        for position, ns in sample.instructions.items():
            instruction = engine.instructions[position]
            if instruction.kind == kinds.segment_backward:
                backward[instruction.segment] = ns
            elif instruction.kind == kinds.segment:
                forward[instruction.segment] = ns
            elif any(t.pattern != _C.Pattern.local for t in instruction.transfers):
                moves[instruction.step] = ns
        out.append((dict(sample.operators), moves, backward, forward))
    return out


def medians(samples: list[dict[int, int]]) -> dict[int, int]:
    keys = {k for s in samples for k in s}
    return {k: int(statistics.median(s[k] for s in samples if k in s)) for k in keys}


def health_of(plan: Plan, parallel: Parallel) -> Health:
    """See `Plan.health`. Collective."""
    comm = parallel.comm
    samples = measured_parts(parallel)
    parts = [medians([s[i] for s in samples]) for i in range(3)]
    segments = []
    engine = parallel.meter.samples[-1][0] if samples else None
    if engine is not None:
        segments = [[(i.node, i.tile, i.chunk) for i in s.items if not i.empty] for s in engine.segments]
    steps = list(parallel.meter.steps)
    mine = (int(statistics.median(steps)) if steps else 0, len(steps), len(samples), parts, segments)
    everyone = comm.gather_objects(mine)
    found: Health | str | None = None
    if comm.rank == 0:
        if not all(e[2] for e in everyone):
            found = f"[health] {min(e[1] for e in everyone)} steps have been measured: train some more, the first sample is taken at the third step"
        else:
            assert engine is not None
            found = compare(plan, engine.program, everyone)
    found = comm.gather_objects(found)[0]
    if isinstance(found, str):
        raise ValueError(found)
    assert isinstance(found, Health)
    note_error(comm, found)
    found.parallel = plan.monitor
    plan.measured["health"] = found.as_data()
    return found


def note_error(comm: Any, found: Health) -> None:
    """For the next search on this machine: how far off this prediction was. Collective."""
    host_of = calibrate.placement(comm)
    if comm.rank == 0:
        known = cache.load(comm.world_size, None, host_of, CORES.distance_ns)
        known["error"] = round(abs(found.step.ratio - 1), 3)
        cache.save(comm.world_size, known, host_of)


def compare(plan: Plan, program: _C.Program, everyone: list[Any]) -> Health:
    cost = plan.known_context("health").cost
    machine = cost.machine
    simulation = _C.simulate(program, cost, record=True)
    nodes = program.graph.nodes
    families: dict[str, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0] for _ in everyone])
    for rank, (_, _, _, (forward, _, backward), segments) in enumerate(everyone):
        predicted: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])  # by family
        by_family: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for items in segments:
            for node, tile, chunk in items:
                one_way, back = cost.time(program, node, tile, chunk)
                by_family[_C.family_of(nodes[node])][0] += one_way
                predicted[node][0] += one_way
                predicted[node][1] += back
        for node, ns in forward.items():
            by_family[_C.family_of(nodes[node])][1] += ns
        ratios = {f: m / p if p else 1.0 for f, (p, m) in by_family.items()}
        for f, (p, m) in by_family.items():
            families[f][rank][0] += p
            families[f][rank][1] += m
        for segment, ns in backward.items():
            shares: dict[str, float] = defaultdict(float)
            for node, tile, chunk in segments[segment]:
                shares[_C.family_of(nodes[node])] += cost.time(program, node, tile, chunk)[1]
            weights = {f: p * ratios.get(f, 1.0) for f, p in shares.items()}
            total = sum(weights.values())
            for f, p in shares.items():
                families[f][rank][0] += p
                families[f][rank][1] += ns * weights[f] / total if total else 0.0
    links: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    priced: dict[int, int] = defaultdict(int)
    for step in {e.step: e for e in simulation.events if e.communication}:
        spans = [e for e in simulation.events if e.communication and e.step == step]
        device = spans[0].device
        priced[step] = sum(e.end_ns - e.begin_ns for e in spans if e.device == device)
    for step, ns in priced.items():
        took = [e[3][1][step] for e in everyone if step in e[3][1]]
        if took:
            row = links[link_name(program, step, machine)]
            row[0] += ns
            row[1] += min(took)
    slowest = {f: max(per_rank, key=lambda v: v[1]) for f, per_rank in families.items()}
    end = max((e.end_ns for e in simulation.events), default=0)
    return Health(
        Row("step", int(end + machine.step_overhead_ns), max(e[0] for e in everyone)),
        [Row(f, int(p), int(m)) for f, (p, m) in sorted(slowest.items())],
        [Row(name, p, m) for name, (p, m) in sorted(links.items())],
        min(e[1] for e in everyone),
        min(e[2] for e in everyone),
    )


def link_name(program: _C.Program, step: int, machine: _C.Machine) -> str:
    """ "all_reduce of 2 ranks within a host": what the movements of a step are priced as; of several kinds the largest set of ranks."""
    moved = [program.movement(program.steps[step].kind, item) for item in program.steps[step].items]
    moved = [m for m in moved if m.pattern != _C.Pattern.local]
    largest = max(moved, key=lambda m: len(m.ranks))
    hosts = len({machine.host_of[r] for r in largest.ranks})
    kind = "all_reduce" if largest.pattern == _C.Pattern.all_reduce else "exchange"
    return f"{kind} of {len(largest.ranks)} ranks " + ("within a host" if hosts == 1 else f"over {hosts} hosts")
