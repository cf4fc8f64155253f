"""What a person has decided before the search begins: pinned configurations and forbidden cuts, by patterns of a plan's text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch_soap import _C

Pin = Mapping[str, str]
Forbid = Mapping[str, str | Iterable[str]]

OTHERS = ("n", "devices", "chunks")  # besides factors: where the rows lie, a device list, cuts in time


def constraints(graph: _C.OpGraph, pin: Pin | None, forbid: Forbid | None, world_size: int) -> _C.Constraints:
    """Patterns made concrete for a graph.

    Args:
        pin: the words of a plan's line by pattern ("classifier.*": "o=2"); of several that fit a node the first counts.
        forbid: names of factors that may not be cut by pattern, or "devices" (no device list of its own), "chunks" (no cuts in time).

    Raises:
        ValueError: a pattern that nothing fits, a configuration or factor that isn't there.
    """
    out = _C.Constraints()
    if pin:
        out.pin = _C.parse_changes(graph, "\n".join(f"{pattern} {words}" for pattern, words in pin.items()), world_size)
    forbidden: dict[str, set[str]] = {}
    for pattern, given in (forbid or {}).items():
        names = {given} if isinstance(given, str) else set(given)
        nodes = [n for n in graph.nodes if n.kind == _C.NodeKind.op and _C.matches(pattern, n.name)]
        if not nodes:
            raise ValueError(f"[plan] forbid: there is no operator {pattern}; there are {', '.join(operators(graph))}")
        factors = list(dict.fromkeys(f.name for n in nodes for f in _C.make_rule(graph, n, world_size).factors))
        for name in sorted(names - {*factors, *OTHERS}):
            raise ValueError(f'[plan] forbid: no operator that fits {pattern} has a factor "{name}"; there are {", ".join([*factors, *OTHERS[1:]])}')
        for n in nodes:
            forbidden.setdefault(n.name, set()).update(names)
    out.forbid = forbidden
    return out


def operators(graph: _C.OpGraph, most: int = 12) -> list[str]:
    names = [n.name for n in graph.nodes if n.kind == _C.NodeKind.op]
    return names if len(names) <= most else [*names[:most], "..."]
