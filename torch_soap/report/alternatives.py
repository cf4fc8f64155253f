"""Why not otherwise: what each operator's other configurations would cost, the most expensive operators first."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch_soap import _C
from torch_soap.compare import Context, Price, changed, price


def alternatives(context: Context, strategy: _C.Strategy, now: Price, seconds: float, left_out: list[str]) -> dict[str, list[dict[str, Any]]]:
    """By operator its alternatives: words of a plan's line, ns more of the step; where the time allows it also parts and memory.

    Every operator first by delta simulation, which knows the time only; then, in what is left of `seconds`, by the whole simulation.
    """
    end = time.perf_counter() + seconds
    world = strategy.world_size
    after, plain = replace(context, graph=_C.rewritten(context.graph, strategy.rewrites)), strategy.copy()  # the operators that the plan runs
    plain.rewrites = []
    operators = [n for n in after.graph.nodes if n.kind == _C.NodeKind.op]
    # What an operator moves is not in its time; it decides among equals.
    operators.sort(key=lambda n: (-now.operators[n.name][0], -now.operators[n.name][1]))
    if world == 1 or not operators:
        return {}
    out: dict[str, list[dict[str, Any]]] = {}
    mine = {name: _C.print_config(config) for name, config in strategy.nodes.items()}
    delta = _C.DeltaSimulator(after.graph, plain, context.rows, context.cost)
    for number, node in enumerate(operators):
        if time.perf_counter() > end - seconds / 2:
            left_out.append(f"alternatives of {len(operators) - number} of {len(operators)} operators, those that take the least time")
            break
        out[node.name] = [timed(after, delta, node, words, said, world) for words, said in configurations(after, node, world, mine.get(node.name, ""))]
    limit = context.memory_limit if context.memory_limit is not None else context.cost.machine.memory_bytes
    for choices in out.values():
        choices.sort(key=lambda c: c.get("ns", float("inf")))
    # The best alternative of each operator first: it is what the plan is compared with.
    legal = [(place, name, choice) for name, choices in out.items() for place, choice in enumerate(choices) if "ns" in choice]
    legal.sort(key=lambda entry: entry[0] > 0)
    for number, (_, name, choice) in enumerate(legal):
        if time.perf_counter() > end:
            left_out.append(f"memory and parts of {len(legal) - number} of {len(legal)} alternatives: only their times are known")
            break
        choice.update(priced(context, strategy, now, name, choice["words"], limit))
        if "reason" in choice:
            del choice["ns"]
    return out


def configurations(context: Context, node: _C.Node, world: int, mine: str) -> list[tuple[str, str]]:
    """(words of a plan's line, what they mean) of what a person would try, without `mine`, what the operator has."""
    tries = [("", "follow its input"), ("n=fed", "keep the rows of each process")]
    for factor in _C.make_rule(context.graph, node, world).factors:
        parts = factor.size // factor.unit
        if factor.cut == _C.Cuttable.whole or parts < 2:
            continue
        degree = max(d for d in range(1, world + 1) if world % d == 0 and d <= parts)
        if degree == 1:
            continue
        kind = "samples" if factor.kind == _C.FactorKind.sample else "positions" if factor.kind == _C.FactorKind.attribute else "channels"
        alike = f" replicas={world // degree}" if degree < world else ""
        tries.append((f"{factor.name}={degree}{alike}", f"cut {factor.name} ({kind}) over {degree} devices" + (f", {world // degree} alike" if alike else "")))
    tries.append(("@ [0]", "whole, on one device"))
    return [(words, said) for words, said in tries if words != mine]


def timed(context: Context, delta: _C.DeltaSimulator, node: _C.Node, words: str, said: str, world: int) -> dict[str, Any]:
    out: dict[str, Any] = {"words": words, "said": said}
    before = delta.step_ns
    try:
        config = _C.parse_changes(context.graph, f"{node.name} {words}", world)[node.name]
        after = delta.change(node.id, config)
    except ValueError as error:
        return {**out, "reason": shortened(str(error))}
    delta.undo()
    return {**out, "ns": after - before}


def shortened(message: str) -> str:
    return message.removeprefix("plan line 1: ").removeprefix("[plan] ").splitlines()[0]


def priced(context: Context, strategy: _C.Strategy, now: Price, name: str, words: str, limit: int) -> dict[str, Any]:
    try:
        after = price(context, changed(context.graph, strategy, f"{name} {words}"))
    except ValueError as error:  # what only the whole program shows
        return {"reason": shortened(str(error))}
    most = max(after.memory_bytes)
    return {
        "ns": after.step_ns - now.step_ns,
        "parts": {part: after.parts[part] - now.parts[part] for part in now.parts},
        "memory": most - max(now.memory_bytes),
        "fits": most <= limit,
    }
