"""Plan: what is saved of a strategy, and what a person reads."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_soap import _C
from torch_soap.compare import Change, Context, price_change
from torch_soap.constraints import Forbid, Pin

if TYPE_CHECKING:
    from torch_soap.health import Health
    from torch_soap.trace import Event

FORMAT = 2  # of the saved file; 1 had no "nodes"
READABLE = (1, 2)
NAMED = 8  # names that a warning lists


@dataclass
class Plan:
    """A strategy with what is known about it.

    Attributes:
        strategy: a configuration for each operator and parameter.
        text: the same as lines that a person can edit (docs/plan-format.md); parses back to `strategy`.
        fingerprint: of the graph that it was made for.
        predicted: step time in ns and its parts, memory in bytes per device; empty for a plan that nobody has priced.
        stats: seconds of capture and search, number of simulations.
        nodes: operators and parameters of the graph that it was made for.
        measured: what was measured of it where it ran: "step_seconds", a list; "health", what `health` found last.
        context: what it was priced with, in the process that planned; None for a plan that was loaded or written until `bind`.
        exact: False only where the whole model is opaque and trains as DDP would.
    """

    strategy: _C.Strategy
    text: str
    fingerprint: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    explanation: str = ""
    source: str = ""  # the text that a person wrote, for errors that only lowering finds
    nodes: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    context: Context | None = None
    monitor: Any = field(default=None, repr=False, compare=False)  # weak reference to the Parallel that trains on it

    @property
    def world_size(self) -> int:
        return int(self.strategy.world_size)

    @property
    def cost(self) -> _C.CostModel | None:
        return self.context.cost if self.context else None

    def explain(self) -> str:
        """The plan as a table: a line for each operator with its S/O/A/P degrees, devices and predicted time."""
        return self.explanation or self.text

    def known_context(self, asker: str) -> Context:
        if self.predicted.get("grid"):
            raise ValueError(
                f"[{asker}] this plan for {self.world_size} devices was priced by its grid, and single lines of it can't be: plan for fewer devices"
            )
        if self.context is None:
            raise ValueError(f"[{asker}] the plan was loaded or written, so nothing is known to price it with: plan.bind(module, example_inputs) first")
        return self.context

    def bind(self, module: Any, example_inputs: Any, *, loss: Callable[..., Any] | None = None, machine: Any = None) -> Plan:
        """Gives a loaded or written plan what `why_not`, `resolve` and `diff` need: the model's graph and a machine. Returns the plan.

        Args:
            example_inputs: the global batch.
            machine: to price it on; default: this version's guess of one host, nothing is measured.

        Raises:
            ValueError: the plan isn't legal for this model.
        """
        from torch_soap.planner import graph_for

        graph, _, rows = graph_for(module, example_inputs, loss, self.world_size)
        as_plan(self, graph)
        lower(graph, self, rows)
        self.context = Context(graph, rows, _C.CostModel(machine or _C.Machine(self.world_size)), [("loaded", self.strategy)])
        return self

    def why_not(self, operator: str, configuration: str = "") -> Change:
        """The price of one line changed: `print(plan.why_not("features.3", "n=2"))`.

        Args:
            operator: a name or pattern, or the whole line: "features.3 n=2", "* n=fed store=d0", "param:0.weight d0=2", "set order=1f1b".
            configuration: words of a plan's line; none: it follows.
        """
        return price_change(self.known_context("why_not"), self.strategy, f"{operator} {configuration}".strip())

    def resolve(self, *, pin: Pin | None = None, forbid: Forbid | None = None, simulations: int = 40, seed: int = 0) -> Plan:
        """Searches again from where this plan's search ended, under other constraints, with a small budget. Not collective.

        Args:
            pin: configurations by pattern that are fixed, as for `torch_soap.plan`.
            forbid: factors by pattern that may not be cut, as for `torch_soap.plan`.
            simulations: of descent and of random proposals each.
        """
        from torch_soap.planner import resolved

        return resolved(self, self.known_context("resolve"), pin, forbid, simulations, seed)

    def report(
        self, path: str | Path, *, title: str = "", timeline: Sequence[Event] = (), step_seconds: Sequence[float] = (), seconds: float = 10.0
    ) -> list[Path]:
        """Writes one HTML file that needs no network, and beside it `<name>.trace.json` for Perfetto; returns both paths. Not collective.

        Args:
            title: of the page; default: the file's name.
            timeline: a recorded step (`torch_soap.trace.measured_events`), shown under the simulated one.
            step_seconds: of measured steps; default: `measured["step_seconds"]`.
            seconds: for pricing alternatives, the most expensive operators first, and for pricing the seeds of a plan that was not searched. The page
                says what was left out.
        """
        from torch_soap.report import write_report

        return write_report(self, path, title=title, timeline=timeline, step_seconds=step_seconds, seconds=seconds)

    def health(self) -> Health:
        """What training has measured so far against what was predicted: `print(model.plan.health())`. Collective. A report that is written
        afterwards has it.

        Raises:
            ValueError: nothing was predicted (a loaded or written plan), or too few steps have run.
        """
        from torch_soap.health import health_of

        parallel = self.monitor() if self.monitor is not None else None
        if parallel is None:
            raise ValueError("[health] no model trains on this plan in this process")
        self.known_context("health")
        return health_of(self, parallel)

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "world_size": self.world_size,
                "fingerprint": self.fingerprint,
                "exact": self.exact,
                "strategy": self.text.splitlines(),
                "machine": self.machine,
                "predicted": self.predicted,
                "stats": self.stats,
                "nodes": self.nodes,
            },
            indent=1,
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    def __str__(self) -> str:
        return self.text


class OneProcess:
    """`model.plan` where there is one process: nothing is cut, the module's own forward runs. It explains itself like a Plan, but there is nothing to save."""

    world_size = 1
    text = ""
    exact = True

    def __init__(self) -> None:
        self.predicted: dict[str, Any] = {}
        self.stats: dict[str, Any] = {}

    def health(self) -> Health:
        raise ValueError("[health] one process: the module's own forward runs, nothing was predicted")

    def explain(self) -> str:
        return "one process: the module's own forward runs, nothing is planned"

    def __str__(self) -> str:
        return self.text


def fingerprint(graph: _C.OpGraph) -> str:
    """Names and operators of the graph, without sizes: the same model at another batch size has the same fingerprint."""
    lines = [f"{n.name} {n.target} {len(n.inputs)}" for n in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def make_plan(graph: _C.OpGraph, strategy: _C.Strategy, **known: Any) -> Plan:
    return Plan(strategy=strategy, text=_C.print_plan(graph, strategy), fingerprint=fingerprint(graph), nodes=names_of(graph), **known)


def names_of(graph: _C.OpGraph) -> list[str]:
    return [n.name for n in graph.nodes if n.kind in (_C.NodeKind.op, _C.NodeKind.param)]


def lower(graph: _C.OpGraph, plan: Plan, rows: Sequence[int], strategy: _C.Strategy | None = None) -> _C.Program:
    """The Program of a plan (or of `strategy`, made from it) for these rows of each process.

    Raises:
        ValueError: what only the whole graph shows; names the line of the text that the plan was written as.
    """
    try:
        return _C.lower(graph, strategy or plan.strategy, list(rows))
    except ValueError as error:
        message = str(error)
        named = re.match(r"\[plan\] (?:there is no operator )?(order|\S+?):?(?:\s|$)", message)
        for number, line in enumerate(plan.source.splitlines() if named else [], 1):
            words = line.split("#")[0].replace("set order=", "order ").split()
            if named and words and fnmatch.fnmatchcase(named[1], words[0]):
                raise ValueError(f"plan line {number}: {message.removeprefix('[plan] ')}\n  {line.strip()}") from error
        raise


def text_of(plan: str | Path) -> str:
    """The text of a plan, or of the file that the argument is the path of: a Path, or a string of one line that ends in .json or is a file's."""
    line = str(plan)
    is_path = isinstance(plan, Path) or ("\n" not in line and (line.endswith(".json") or os.path.isfile(line)))
    return Path(plan).read_text() if is_path else line


def as_plan(plan: Plan | str | Path, graph: _C.OpGraph, world_size: int | None = None, *, strict: bool | None = None) -> Plan:
    """A Plan from a Plan, the path of a saved one, or the text that a person writes.

    Args:
        strict: whether a plan for another model is an error; else what still fits is kept by name, and a warning names the rest. Default: for a
            Plan yes, for a saved one no.

    Raises:
        ValueError: the text names what isn't there or can't be cut (with line number and what would be legal), the plan is
            for another number of devices or another model.
    """
    if isinstance(plan, Plan):
        if world_size is not None and plan.world_size != world_size:
            raise ValueError(f"[plan] the plan is for {plan.world_size} devices, there are {world_size}")
        if not plan.fingerprint or plan.fingerprint == fingerprint(graph):
            return plan
        if strict is not False:
            raise ValueError(f"[plan] the plan was made for another model (fingerprint {plan.fingerprint}, this model {fingerprint(graph)})")
        return fitted(plan.text.splitlines(), graph, plan.world_size, plan.nodes)
    text = text_of(plan)
    saved: dict[str, Any] = {}
    if text.lstrip().startswith("{"):
        saved = json.loads(text)
        if saved.get("format") not in READABLE:
            raise ValueError(f"[plan] the saved plan has format {saved.get('format')}, this version reads {', '.join(map(str, READABLE))}")
        if world_size is not None and saved["world_size"] != world_size:
            raise ValueError(f"[plan] the saved plan is for {saved['world_size']} devices, there are {world_size}")
        world_size = int(saved["world_size"])
        if saved["fingerprint"] != fingerprint(graph):
            if strict:
                raise ValueError(f"[plan] the saved plan was made for another model (fingerprint {saved['fingerprint']}, this model {fingerprint(graph)})")
            return fitted(saved["strategy"], graph, world_size, saved.get("nodes", []))
        text = "\n".join(saved["strategy"])
    if world_size is None:
        raise ValueError("[plan] a plan given as text needs the number of devices (world_size)")
    strategy = _C.parse_plan(graph, text, world_size)
    return make_plan(graph, strategy, source=text, **{k: saved[k] for k in ("machine", "predicted", "stats", "exact") if k in saved})


def fitted(lines: Sequence[str], graph: _C.OpGraph, world_size: int, before: Sequence[str]) -> Plan:
    """The plan of a model that has changed: lines that are legal for this graph, one by one. A warning names the others and what is new."""
    kept: list[str] = []
    gone: list[str] = []
    illegal: list[str] = []
    names = names_of(graph)
    rewrites: list[_C.Rewrite] = []
    for line in lines:
        if words := line.split() if line.startswith("rewrite ") else []:
            rewrites = _C.fitting(graph, [*rewrites, _C.Rewrite(words[1], words[2:])])
            (kept if rewrites and str(rewrites[-1]) == " ".join(words[1:]) else illegal).append(line)
    after = _C.rewritten(graph, rewrites)
    known = set(names_of(after))
    total, lines = len(lines), [line for line in lines if not line.startswith("rewrite ")]
    for line in lines:
        words = line.split()
        if words[0] == "recompute":
            regions = {word: known_region(graph, word) for word in words[1:]}
            gone += [word for word, there in regions.items() if not there]
            line = " ".join(["recompute", *(word for word, there in regions.items() if there)])
            if not any(regions.values()):
                continue
        nodes = [words[1], words[3]] if words[0] == "edge" else [] if words[0] in ("set", "recompute") else [words[0]]
        if any(n not in known and n.rpartition("/")[0] not in known for n in nodes):
            gone += [n for n in nodes if n not in known]
            continue
        try:
            _C.parse_plan(after, line, world_size)
        except ValueError as error:
            illegal.append(str(error).removeprefix("plan line 1: ").removeprefix("[plan] ").splitlines()[0])
        else:
            kept.append(line)
    new = [n for n in names if n not in set(before)] if before else []
    unfit = {"no longer there": list(dict.fromkeys(gone)), "no longer legal": illegal, "new, follow their input": new}
    said = "; ".join(f"{what}: {some(of)}" for what, of in unfit.items() if of) or "sizes or operators differ"
    warnings.warn(f"[plan] the plan was made for another model: {len(kept)} of {total} lines still fit and are kept; {said}", stacklevel=3)
    text = "\n".join(kept)
    return make_plan(graph, _C.parse_plan(graph, text, world_size), source=text)


def known_region(graph: _C.OpGraph, word: str) -> bool:
    try:
        _C.parse_regions(graph, word)
    except ValueError:
        return False
    return True


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
