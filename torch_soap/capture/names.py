"""Names of nodes: the keys of plans, the same in every capture of a model."""

from __future__ import annotations

import re
from collections import Counter

from torch_soap.capture.graph import Graph

# Operators that carry no work of their own: a module with one other operator gives that one its name.
LIGHT = {"view", "permute", "narrow", "expand", "to", "cat", "detach", "clone", "full", "arange", "slice", "running_average"}


def clean_path(path: str) -> str:
    """A module path (or parameter name) of the user's: without the wrappers' prefixes and export's call counters."""
    path = re.sub(r"@\d+", "", path).removeprefix("L['self']").lstrip(".")
    for prefix in ("objective", "model"):
        if path == prefix or path.startswith(prefix + "."):
            path = path.removeprefix(prefix).removeprefix(".")
    return path


def last_line(trace: str | None) -> str:
    lines = [line.strip() for line in (trace or "").splitlines() if line.strip().startswith("File ")]
    return lines[-1] if lines else ""


def prune(graph: Graph) -> None:
    """Drops operators that nothing reads; random ones stay, so that their numbering does."""
    used: set[int] = set()
    kept = []
    for node in reversed(graph.nodes):
        if node.kind == "op" and not used & set(node.outputs):
            continue
        used |= set(node.inputs)
        kept.append(node)
    graph.nodes = kept[::-1]


def name_nodes(graph: Graph) -> None:
    """Names: the module's path for its only real operator, `<path>/<target>` (`.1`, `.2` on repetition) for others."""
    buffers = {n.outputs[0] for n in graph.nodes if n.kind == "buffer"}
    light = {id(n) for n in graph.nodes if n.target in LIGHT or (n.inputs and buffers.issuperset(n.inputs))}
    real = Counter(n.module_path for n in graph.nodes if n.kind == "op" and id(n) not in light)
    first_real: set[str] = set()
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if node.kind != "op":
            continue
        path = node.module_path
        if path and real[path] == 1 and id(node) not in light and path not in first_real:
            first_real.add(path)
            node.name = path
            continue
        base = f"{path}/{node.target}"
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}.{seen[base] - 1}"


def unique(names: list[str]) -> list[str]:
    """The names, later repetitions with a number."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        out.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return out
