"""The planner's entry point."""

from __future__ import annotations

from typing import Any

from torch_soap import _C
from torch_soap.capture.graph import Graph
from torch_soap.plan import Plan, as_plan
from torch_soap.runtime.comm import Comm


def search_plan(graph: _C.OpGraph, captured: Graph, rows: list[int], *, comm: Comm | None, machine: Any = None, memory_limit: int | None = None) -> Plan:
    """Data parallel until the search is there."""
    return as_plan("* n=fed", graph, len(rows))
