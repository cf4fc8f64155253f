"""What the report shows, as plain data: graph, timelines, memory, candidates, measurements."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from torch_soap import _C
from torch_soap.compare import Context, Price, original, price
from torch_soap.plan import Plan
from torch_soap.report.alternatives import alternatives
from torch_soap.trace import Event

MOST_DEVICES = 16  # whose timelines and memory are shown
MOST_EVENTS = 60_000
MEMORY_POINTS = 400  # of a device
SHOWN_KINDS = (_C.NodeKind.op, _C.NodeKind.feed, _C.NodeKind.return_)


def report_data(plan: Plan, program: _C.Program, *, title: str, timeline: Sequence[Event], step_seconds: Sequence[float], seconds: float) -> dict[str, Any]:
    """All of it. `left_out` has a sentence for whatever was too much to show or to compute in `seconds`."""
    context = plan.known_context("report")
    simulation = _C.simulate(program, context.cost, record=True)
    left_out: list[str] = []
    nodes, index = graph_nodes(context, plan, program, simulation, left_out)
    devices = shown_devices(plan.world_size, left_out)
    now = price(context, plan.strategy)
    for name, choices in alternatives(context, plan.strategy, now, seconds, left_out).items():
        if name in index:
            nodes[index[name]]["alternatives"] = choices
    machine = context.cost.machine
    return {
        "title": title,
        "world": plan.world_size,
        "exact": plan.exact,
        "text": plan.text,
        "chosen": plan.predicted.get("chosen", ""),
        "machine": machine_facts(machine),
        "memory_limit": context.memory_limit if context.memory_limit is not None else machine.memory_bytes,
        "step_ns": simulation.step_ns,
        "parts": now.parts,
        "nodes": nodes,
        "devices": devices,
        "device_totals": [
            {"compute": c, "communication": m, "memory": b}
            for c, m, b in zip(simulation.compute_ns, simulation.communication_ns, simulation.memory_bytes, strict=True)
        ],
        "timeline": timelines(program, simulation, timeline, index, devices, left_out),
        "memory": memory(program, simulation, machine, devices),
        "candidates": candidates(context, plan, now, seconds, left_out),
        "progress": plan.stats.get("progress", []),
        "stats": {k: v for k, v in plan.stats.items() if k != "progress"},
        "measured": measured(now, devices, timeline, step_seconds or plan.measured.get("step_seconds", ())),
        "health": plan.measured.get("health"),
        "left_out": left_out,
    }


def machine_facts(machine: _C.Machine) -> dict[str, Any]:
    links = {
        name: {"latency_us": link.latency_ns / 1e3, "gb_per_s": link.bytes_per_s / 1e9} for name, link in (("intra", machine.intra), ("inter", machine.inter))
    }
    return {
        "name": machine.name,
        "hosts": len(set(machine.host_of)),
        "host_of": list(machine.host_of),
        "tflops": machine.flops_per_s / 1e12,
        "memory_gb_per_s": machine.memory_bytes_per_s / 1e9,
        "overlap": machine.overlap,
        **links,
    }


def graph_nodes(
    context: Context, plan: Plan, program: _C.Program, simulation: _C.Simulation, left_out: list[str]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The captured graph's operators, feeds and returns with what the plan does with them, and their places by name; parameters stand with who reads them."""
    graph = context.graph
    known = {n.name for n in graph.nodes}
    members: dict[str, list[_C.Node]] = {}  # what each became when it was lowered
    for n in program.graph.nodes:
        members.setdefault(original(n.name, known), []).append(n)
    configured = {name: _C.print_config(config) for name, config in plan.strategy.nodes.items()}
    lowered = {n.name: n for n in program.graph.nodes}
    aside = bookkeeping(graph)
    num_aside = sum(n.kind == _C.NodeKind.op and n.id in aside for n in graph.nodes)
    if num_aside:
        left_out.append(f"{num_aside} operators that read and write buffers only are not drawn")
    shown = [n for n in graph.nodes if n.kind in SHOWN_KINDS and n.id not in aside]
    index = {n.name: i for i, n in enumerate(shown)}
    out = []
    for n in shown:
        parts = members.get(n.name, [])
        told = [_C.describe(program, m.id) for m in parts]
        inputs, stores = [], []
        for t in n.inputs:
            producer = graph.nodes[graph.tensors[t].producer]
            if producer.name in index:
                inputs.append(index[producer.name])
            elif producer.kind == _C.NodeKind.param:
                stores.append(parameter(program, simulation, lowered[producer.name], configured.get(producer.name)))
        result = graph.tensors[n.outputs[0]] if n.outputs else None
        out.append(
            {
                "name": n.name,
                "kind": "op" if n.kind == _C.NodeKind.op else "edge",
                "target": n.target,
                "source": n.source,
                "shape": shape_text(result) if result else "",
                "inputs": list(dict.fromkeys(inputs)),
                "parameters": stores,
                "config": configured.get(n.name),
                "cuts": " ".join(dict.fromkeys(d.cuts for d in told if d.cuts)),
                "degrees": [max((getattr(d, letter) for d in told), default=1) for letter in ("samples", "attributes", "parameters")],
                "chunks": max((d.chunks for d in told), default=1),
                "replicas": max((d.replicas for d in told), default=1),
                "devices": sorted({x for d in told for x in d.devices}),
                "parts": [m.name for m in parts] if len(parts) > 1 else [],
                "ns": sum(simulation.node_ns[m.id] for m in parts),
                "moved": sum(simulation.moved_bytes[m.id] for m in parts),
                "bytes": sum(d.result_bytes for d in told),
            }
        )
    return out, index


def bookkeeping(graph: _C.OpGraph) -> set[int]:
    """Writes of buffers, and operators between buffers alone (counters of batches): nobody reads a graph for them."""
    from_stores: set[int] = set()  # nodes that nothing but stores goes into
    for n in graph.nodes:
        if n.kind not in SHOWN_KINDS or (n.inputs and n.kind == _C.NodeKind.op and all(graph.tensors[t].producer in from_stores for t in n.inputs)):
            from_stores.add(n.id)
    readers: dict[int, list[_C.Node]] = {}
    for n in graph.nodes:
        for t in n.inputs:
            readers.setdefault(graph.tensors[t].producer, []).append(n)
    aside = {n.id for n in graph.nodes if n.target == "buffer_write"}
    for n in reversed(list(graph.nodes)):
        if n.kind == _C.NodeKind.op and n.id in from_stores and all(r.id in aside for r in readers.get(n.id, [])):
            aside.add(n.id)
    return aside


def parameter(program: _C.Program, simulation: _C.Simulation, node: _C.Node, config: str | None) -> dict[str, Any]:
    tensor = program.graph.tensors[node.outputs[0]]
    return {
        "name": node.name.removeprefix("param:"),
        "shape": shape_text(tensor),
        "bytes": tensor.element_bytes * math.prod(tensor.shape),
        "stored": _C.describe(program, node.id).result_bytes,
        "moved": simulation.moved_bytes[node.id],
        "config": config,
    }


def shape_text(tensor: _C.Tensor) -> str:
    return f"{' x '.join(map(str, tensor.shape)) or 'scalar'} {tensor.dtype}"


def shown_devices(world: int, left_out: list[str]) -> list[int]:
    if world <= MOST_DEVICES:
        return list(range(world))
    left_out.append(f"timelines and memory of {world - MOST_DEVICES} of {world} devices: {MOST_DEVICES} evenly chosen ones are shown")
    return [d * world // MOST_DEVICES for d in range(MOST_DEVICES)]


def timelines(
    program: _C.Program, simulation: _C.Simulation, real: Sequence[Event], index: dict[str, int], devices: list[int], left_out: list[str]
) -> dict[str, Any]:
    """Events as numbers: simulated [step, device, stream, begin ns, end ns], measured the same with names of their own. Streams: 0 compute,
    1 communication, 2 the host's launches, whose step is -1 for the update."""
    wanted = set(devices)
    events = [[e.step, e.device, 2 if e.host else int(e.communication), e.begin_ns, e.end_ns] for e in simulation.events if e.device in wanted]
    if len(events) > MOST_EVENTS:
        events.sort(key=lambda e: e[3] - e[4])
        left_out.append(f"{len(events) - MOST_EVENTS} of {len(events)} events of the timeline: the longest are shown")
        events = sorted(events[:MOST_EVENTS], key=lambda e: e[3])
    known = set(index)
    steps: dict[int, list[Any]] = {}
    for number in {e[0] for e in events}:
        if number < 0:
            steps[number] = ["update", -1, "update"]
            continue
        step = program.steps[number]
        computes = step.kind in (_C.StepKind.compute, _C.StepKind.compute_backward)
        node = step.items[0].id if computes else program.graph.tensors[program.groups[step.items[0].id].tensor].producer
        steps[number] = [_C.step_name(program, number), index.get(original(program.graph.nodes[node].name, known), -1), step.kind.name]
    names = list(dict.fromkeys(e.name for e in real))
    at = {name: i for i, name in enumerate(names)}
    words = [name.split(" ") for name in names]
    return {
        "steps": steps,
        "simulated": events,
        "names": [[name, next((index[w] for w in said if w in index), -1)] for name, said in zip(names, words, strict=True)],
        "measured": [[at[e.name], e.device, int(e.stream != "compute"), e.start_ns, e.start_ns + e.duration_ns] for e in real if e.device in wanted],
    }


def memory(program: _C.Program, simulation: _C.Simulation, machine: _C.Machine, devices: list[int]) -> dict[str, Any]:
    curves = _C.memory_over_time(program, simulation, machine, MEMORY_POINTS)
    return {str(d): [[p.time_ns, *p.bytes] for p in curves[d]] for d in devices}


def candidates(context: Context, plan: Plan, now: Price, seconds: float, left_out: list[str]) -> list[dict[str, Any]]:
    """What a person would write, and what the search found, as it priced them; a plan that was not searched is compared with the seeds now."""
    limit = context.memory_limit if context.memory_limit is not None else context.cost.machine.memory_bytes
    mine = {"name": "this plan", "step_ns": now.step_ns, "memory": max(now.memory_bytes), "fits": max(now.memory_bytes) <= limit, "mine": True}
    known = plan.predicted.get("seeds") or {}
    out = [
        {"name": name, "step_ns": c["step_time_ns"], "memory": c["memory_bytes"], "fits": c.get("fits", True), "mine": False}
        for name, c in known.items()
        if c["step_time_ns"] >= 0
    ]
    if not known:
        seeds, begin = _C.seeds(context.graph, plan.world_size), time.perf_counter()
        for number, (name, strategy) in enumerate(seeds):
            if time.perf_counter() - begin > seconds:
                left_out.append(f"{len(seeds) - number} of {len(seeds)} plans that a person would write")
                break
            try:
                its = price(context, strategy)
            except ValueError:  # a seed that this model doesn't allow
                continue
            most = max(its.memory_bytes)
            out.append({"name": name, "step_ns": its.step_ns, "memory": most, "fits": most <= limit, "mine": False})
    out = [c for c in out if (c["name"], c["step_ns"]) != (plan.predicted.get("chosen"), now.step_ns)]  # itself
    return [mine, *sorted(out, key=lambda c: (not c["fits"], c["step_ns"]))]


def measured(now: Price, devices: list[int], real: Sequence[Event], step_seconds: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of predicted against measured ns, None where nothing was measured."""
    what = f"step, median of {len(step_seconds)}" if len(step_seconds) > 1 else "step"
    rows: list[dict[str, Any]] = [{"what": what, "predicted": now.step_ns, "measured": statistics.median(step_seconds) * 1e9 if step_seconds else None}]
    if not real:
        return rows + [{"what": f"of it the busiest device: {part}", "predicted": ns, "measured": None} for part, ns in now.parts.items() if ns > 0]
    for device in devices:
        for stream, predicted in (("compute", now.compute_ns[device]), ("communication", now.communication_ns[device])):
            spent = sum(e.duration_ns for e in real if e.device == device and e.stream == stream)
            if spent or predicted:
                rows.append({"what": f"device {device}: {stream}", "predicted": predicted, "measured": spent})
    return rows
