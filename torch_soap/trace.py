"""Timelines of a step: what ran when on each device, simulated or measured, and the Chrome trace that shows both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch_soap import _C
from torch_soap.plan import Plan
from torch_soap.runtime.comm import Comm
from torch_soap.runtime.engine import Engine


@dataclass
class Event:
    """One step of a Program on one device. Times in ns from the start of the timeline."""

    name: str
    stream: str  # "compute", "communication", or "host": what launches them
    device: int
    start_ns: int
    duration_ns: int


def instruction_name(engine: Engine, position: int) -> tuple[str, str]:
    """(name, stream) of an instruction: its operators, or what its transfers move."""
    instruction = engine.instructions[position]
    graph, kinds = engine.program.graph, _C.InstructionKind
    if instruction.kind in (kinds.segment, kinds.segment_backward):
        names = [graph.nodes[i.node].name for i in engine.segments[instruction.segment].items]
        text = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})" if names else "nothing"
        return text + (" backward" if instruction.kind == kinds.segment_backward else ""), "compute"
    tensors = [graph.tensors[engine.program.groups[t.item.id].tensor] for t in instruction.transfers]
    names = list(dict.fromkeys(graph.nodes[t.producer].name for t in tensors))
    what = {kinds.fill: "move", kinds.grad_fill: "reduce", kinds.refill: "gather again"}[instruction.kind]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    moves = any(t.pattern != _C.Pattern.local for t in instruction.transfers)
    return f"{what} {names[0] if names else ''}{more}", "communication" if moves else "compute"


def measured_events(engine: Engine, comm: Comm) -> list[Event]:
    """All ranks' records of one step (`engine.trace`), from the first start. Ranks of one host share the clock. Collective."""
    mine = []
    for position, start, end in engine.trace or []:
        name, stream = instruction_name(engine, position)
        mine.append(Event(name, stream, comm.rank, start, end - start))
    events = [e for part in comm.gather_objects(mine) for e in part]
    origin = min((e.start_ns for e in events), default=0)
    for e in events:
        e.start_ns -= origin
    return events


def simulated_events(program: _C.Program, plan: Plan) -> list[Event]:
    """The step as the simulator sees it, with what the plan was priced with; empty for a plan that was not searched here."""
    if plan.cost is None:
        return []
    return [
        Event(
            "update" if e.step < 0 else _C.step_name(program, e.step),
            "host" if e.host else "communication" if e.communication else "compute",
            e.device,
            e.begin_ns,
            e.end_ns - e.begin_ns,
        )
        for e in _C.simulate(program, plan.cost, record=True).events
    ]


STREAMS = ("compute", "communication", "host")


def chrome_trace(timelines: dict[str, Sequence[Event]]) -> str:
    """Chrome's JSON trace format (also Perfetto's): a process for each timeline, a thread for each device and stream."""
    out: list[dict[str, object]] = []
    for process, (label, events) in enumerate(timelines.items()):
        out.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": label}})
        for thread in sorted({(e.device, e.stream) for e in events}):
            tid = len(STREAMS) * thread[0] + STREAMS.index(thread[1])
            out.append({"ph": "M", "pid": process, "tid": tid, "name": "thread_name", "args": {"name": f"device {thread[0]} {thread[1]}"}})
        for e in events:
            tid = len(STREAMS) * e.device + STREAMS.index(e.stream)
            out.append({"ph": "X", "pid": process, "tid": tid, "name": e.name, "cat": e.stream, "ts": e.start_ns / 1e3, "dur": e.duration_ns / 1e3})
    return json.dumps({"traceEvents": out, "displayTimeUnit": "ms"})
