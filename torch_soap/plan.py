"""Plan: what is saved of a strategy, and what a person reads."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_soap import _C

FORMAT = 1


@dataclass
class Plan:
    """A strategy with what is known about it.

    Attributes:
        strategy: a configuration for each operator and parameter.
        text: the same as lines that a person can edit (docs/plan-format.md); parses back to `strategy`.
        fingerprint: of the graph that it was made for.
        predicted: step time in ns and its parts, memory in bytes per device; empty for a plan that nobody has priced.
        stats: seconds of capture and search, number of simulations.
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
    cost: _C.CostModel | None = None  # what it was priced with, in the process that planned

    @property
    def world_size(self) -> int:
        return int(self.strategy.world_size)

    def explain(self) -> str:
        """The plan as a table: a line for each operator with its S/O/A/P degrees, devices and predicted time."""
        return self.explanation or self.text

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

    def explain(self) -> str:
        return "one process: the module's own forward runs, nothing is planned"

    def __str__(self) -> str:
        return self.text


def fingerprint(graph: _C.OpGraph) -> str:
    """Names and operators of the graph, without sizes: the same model at another batch size has the same fingerprint."""
    lines = [f"{n.name} {n.target} {len(n.inputs)}" for n in graph.nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def make_plan(graph: _C.OpGraph, strategy: _C.Strategy, **known: Any) -> Plan:
    return Plan(strategy=strategy, text=_C.print_plan(graph, strategy), fingerprint=fingerprint(graph), **known)


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


def as_plan(plan: Plan | str | Path, graph: _C.OpGraph, world_size: int | None = None) -> Plan:
    """A Plan from a Plan, the path of a saved one, or the text that a person writes.

    Raises:
        ValueError: the text names what isn't there or can't be cut (with line number and what would be legal), the plan is
            for another number of devices or another model.
    """
    if isinstance(plan, Plan):
        if world_size is not None and plan.world_size != world_size:
            raise ValueError(f"[plan] the plan is for {plan.world_size} devices, there are {world_size}")
        if plan.fingerprint and plan.fingerprint != fingerprint(graph):
            raise ValueError(f"[plan] the plan was made for another model (fingerprint {plan.fingerprint}, this model {fingerprint(graph)})")
        return plan
    text = text_of(plan)
    saved: dict[str, Any] = {}
    if text.lstrip().startswith("{"):
        saved = json.loads(text)
        if saved.get("format") != FORMAT:
            raise ValueError(f"[plan] the saved plan has format {saved.get('format')}, this version reads {FORMAT}")
        if saved["fingerprint"] != fingerprint(graph):
            raise ValueError(f"[plan] the saved plan was made for another model (fingerprint {saved['fingerprint']}, this model {fingerprint(graph)})")
        if world_size is not None and saved["world_size"] != world_size:
            raise ValueError(f"[plan] the saved plan is for {saved['world_size']} devices, there are {world_size}")
        text = "\n".join(saved["strategy"])
        world_size = saved["world_size"]
    if world_size is None:
        raise ValueError("[plan] a plan given as text needs the number of devices (world_size)")
    strategy = _C.parse_plan(graph, text, world_size)
    return make_plan(graph, strategy, source=text, **{k: saved[k] for k in ("machine", "predicted", "stats", "exact") if k in saved})
