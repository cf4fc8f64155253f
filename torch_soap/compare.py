"""Prices of strategies side by side: what one changed line costs (`Plan.why_not`), what two plans differ in (`diff`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch_soap import _C

if TYPE_CHECKING:
    from torch_soap.plan import Plan

MIB = 1 << 20
SHOWN = 40  # rows of a printed difference


@dataclass
class Context:
    """What a plan was priced with, in the process that planned: enough to price it again with something changed.

    Attributes:
        rows: of the global batch, that each process feeds.
        starts: candidates of the search that found it, by name, the best first; where `Plan.resolve` begins.
    """

    graph: _C.OpGraph
    rows: list[int]
    cost: _C.CostModel
    starts: list[tuple[str, _C.Strategy]] = field(default_factory=list)
    memory_limit: int | None = None


@dataclass
class Price:
    """A simulated step. Per operator and parameter: forward and backward in ns on the slowest device, bytes that its results' movements send."""

    step_ns: int
    compute_ns: list[int]
    communication_ns: list[int]
    memory_bytes: list[int]
    operators: dict[str, tuple[int, int]]
    configurations: dict[str, str]
    recompute: str = ""
    device_step_ns: int | None = None  # of hosts that take no time; None: as the step

    @property
    def parts(self) -> dict[str, int]:
        """The step in ns by what the busiest device does: compute, communication, waiting for its host, and the rest (waiting and the update).
        They add up to the step."""
        compute, communication = max(zip(self.compute_ns, self.communication_ns, strict=True), key=sum)
        device = self.step_ns if self.device_step_ns is None else self.device_step_ns
        parts = {"compute": compute, "communication": communication, "waiting and update": device - compute - communication}
        return parts | ({"waiting for the host": self.step_ns - device} if device < self.step_ns else {})


def price(context: Context, strategy: _C.Strategy) -> Price:
    """Simulates one step. Raises ValueError where the strategy isn't legal."""
    program = _C.lower(context.graph, strategy, context.rows)
    simulation = _C.simulate(program, context.cost)
    known = {n.name for n in _C.rewritten(context.graph, strategy.rewrites).nodes}
    times = dict.fromkeys(known, (0, 0))
    for node, ns, moved in zip(program.graph.nodes, simulation.node_ns, simulation.moved_bytes, strict=True):
        name = original(node.name, known)
        times[name] = times[name][0] + ns, times[name][1] + moved
    configurations: dict[str, str] = {}
    for name, config in strategy.nodes.items():
        name, text = original(name, known), _C.print_config(config) if name in known else f"{name} {_C.print_config(config)}"
        configurations[name] = f"{configurations[name]}; {text}" if name in configurations else text
    return Price(
        simulation.step_ns,
        list(simulation.compute_ns),
        list(simulation.communication_ns),
        list(simulation.memory_bytes),
        times,
        configurations,
        recomputed(strategy),
        simulation.device_step_ns,
    )


def recomputed(strategy: _C.Strategy) -> str:
    return " ".join("+".join(region) for region in strategy.recompute)


def figures(simulation: _C.Simulation) -> dict[str, Any]:
    """What a plan's `predicted` has of its simulation."""
    return {
        "step_time_ns": simulation.step_ns,
        "compute_ns": list(simulation.compute_ns),
        "communication_ns": list(simulation.communication_ns),
        "memory_bytes": list(simulation.memory_bytes),
        **({"host_ns": list(simulation.host_ns), "device_step_ns": simulation.device_step_ns} if any(simulation.host_ns) else {}),
    }


def original(name: str, known: set[str]) -> str:
    """The node of the captured graph that a node belongs to: itself, or what was expanded into it."""
    while name not in known and "/" in name:
        name = name.rpartition("/")[0]
    return name


def signed(ns: float) -> str:
    return f"{ns / 1e6:+.3f} ms"


def by_parts(before: Price, after: Price) -> str:
    was, now = before.parts, after.parts
    return ", ".join(f"{part} {signed(now.get(part, 0) - was.get(part, 0))}" for part in dict.fromkeys([*was, *now]))


def by_memory(before: Sequence[int], after: Sequence[int]) -> str:
    """The device whose peak changes most."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    device = max(range(len(changes)), key=lambda d: abs(changes[d]))
    return f"memory {changes[device] / MIB:+.2f} MiB on device {device}" if changes[device] else "memory as before"


@dataclass
class Change:
    """One changed line of a plan, priced.

    Attributes:
        line: as given.
        before: the plan's price.
        after: the price with the change; None where it isn't legal, then `reason` says why and what would be.
        fits: whether it fits the memory limit.
    """

    line: str
    before: Price
    after: Price | None
    reason: str = ""
    fits: bool = True

    @property
    def legal(self) -> bool:
        return self.after is not None

    @property
    def step_ns(self) -> int | None:
        """How much longer a step takes; None where the change isn't legal."""
        return None if self.after is None else self.after.step_ns - self.before.step_ns

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.line}: not legal: {self.reason}"
        out = f"{self.line}: {signed(self.after.step_ns - self.before.step_ns)} step ({by_parts(self.before, self.after)}), "
        out += by_memory(self.before.memory_bytes, self.after.memory_bytes)
        return out if self.fits else f"{out}; does not fit: a device needs {max(self.after.memory_bytes) / MIB:.1f} MiB"


def changed(graph: _C.OpGraph, strategy: _C.Strategy, text: str) -> _C.Strategy:
    """The strategy with lines of a plan's text written over it; `set`, `edge` and `recompute` lines too. A `rewrite` line takes the strategy along."""
    lines = text.splitlines()
    whole = [line for line in lines if re.match(r"\s*(set|edge|recompute)\b", line)]
    rewrites = [line for line in lines if re.match(r"\s*rewrite\s", line)]
    if whole:
        settings = [line for line in _C.print_plan(graph, strategy).splitlines() if not any(same_key(line, w) for w in whole)]
        strategy = _C.parse_plan(graph, "\n".join([*settings, *whole]), strategy.world_size)
    else:
        strategy = strategy.copy()
    now = _C.rewritten(graph, strategy.rewrites)
    for line in rewrites:
        _, substitution, *anchors = line.split("#")[0].split()
        rewrite = _C.Rewrite(substitution, anchors)
        after = _C.rewritten(now, [rewrite])
        strategy, now = _C.transferred(now, strategy, [rewrite], after), after
    changes = _C.parse_changes(now, "\n".join("" if line in [*whole, *rewrites] else line for line in lines), strategy.world_size)
    for name, config in changes.items():
        if config is None:
            strategy.remove(name)
        else:
            strategy.set(name, config)
    return strategy


def same_key(a: str, b: str) -> bool:
    """Whether two `set` or `edge` lines say the same thing's value. `recompute` lines name regions, which add up."""
    if a.split()[0] == "recompute":
        return False
    return re.split(r"via=|=", " ".join(a.split()))[0] == re.split(r"via=|=", " ".join(b.split()))[0]


def price_change(context: Context, strategy: _C.Strategy, line: str) -> Change:
    before = price(context, strategy)
    try:
        after = price(context, changed(context.graph, strategy, line))
    except ValueError as error:
        return Change(line, before, None, str(error).removeprefix("[plan] "))
    limit = context.memory_limit if context.memory_limit is not None else context.cost.machine.memory_bytes
    return Change(line, before, after, fits=max(after.memory_bytes) <= limit)


@dataclass
class Row:
    """An operator or parameter that two plans treat differently: configuration, ns, bytes moved, each of a and of b."""

    name: str
    configurations: tuple[str, str]
    ns: tuple[int, int]
    moved_bytes: tuple[int, int]


@dataclass
class Difference:
    """What two plans differ in: `rows`, the largest difference in time first, and the price of each plan."""

    a: Price
    b: Price
    machines: tuple[str, str]
    rows: list[Row]

    def __str__(self) -> str:
        if not self.rows:
            return "the plans are the same"
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        width = min(max(len(r.name) for r in self.rows), 44)
        first = min(max(len(r.configurations[0]) for r in self.rows), 40)
        yield f"{'':<{width}}  {'a':<{first}}  {'time us':>10} {'moved bytes':>12}   b"
        for r in self.rows[:SHOWN]:
            change = f"{(r.ns[1] - r.ns[0]) / 1e3:>+10.1f} {r.moved_bytes[1] - r.moved_bytes[0]:>+12}"
            yield f"{r.name:<{width}}  {r.configurations[0]:<{first}}  {change}   {r.configurations[1]}"
        if len(self.rows) > SHOWN:
            yield f"... and {len(self.rows) - SHOWN} more"
        if self.a.recompute != self.b.recompute:
            yield f"computed again in backward: {self.a.recompute or 'nothing'} -> {self.b.recompute or 'nothing'}"
        change = signed(self.b.step_ns - self.a.step_ns)
        yield f"step {self.a.step_ns / 1e6:.3f} ms -> {self.b.step_ns / 1e6:.3f} ms: {change} ({by_parts(self.a, self.b)})"
        if len(self.a.memory_bytes) == len(self.b.memory_bytes):
            yield by_memory(self.a.memory_bytes, self.b.memory_bytes)
        else:
            yield f"memory of the fullest device {max(self.a.memory_bytes) / MIB:.2f} MiB -> {max(self.b.memory_bytes) / MIB:.2f} MiB"
        if self.machines[0] != self.machines[1]:
            yield f"priced on two machines: {self.machines[0]} and {self.machines[1]}"


def diff(a: Plan, b: Plan) -> Difference:
    """Operators and parameters that two plans of one model configure differently, or that cost differently in them.

    Raises:
        ValueError: a plan was only loaded from a file or written: `plan.bind(module, example_inputs)` first.
    """
    contexts = a.known_context("diff"), b.known_context("diff")
    prices = price(contexts[0], a.strategy), price(contexts[1], b.strategy)
    rows = []
    for name in dict.fromkeys([*prices[0].operators, *prices[1].operators]):
        kind = "where it is used" if name.startswith("param:") else "follows"
        configurations = tuple(p.configurations.get(name, kind if name in p.operators else "not there") for p in prices)
        costs = [p.operators.get(name, (0, 0)) for p in prices]
        if configurations[0] != configurations[1] or costs[0] != costs[1]:
            rows.append(Row(name, (configurations[0], configurations[1]), (costs[0][0], costs[1][0]), (costs[0][1], costs[1][1])))
    rows.sort(key=lambda r: (-abs(r.ns[1] - r.ns[0]), -abs(r.moved_bytes[1] - r.moved_bytes[0]), r.name))
    machines = contexts[0].cost.machine.name, contexts[1].cost.machine.name
    return Difference(*prices, machines, rows)
