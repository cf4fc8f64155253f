"""The planner's last word."""

from __future__ import annotations

import torch
from torch import nn

from tests.unit.planning import graph_of
from torch_soap import _C
from torch_soap.planner import settled


def test_a_plan_that_beat_a_seed_by_a_guess_gives_way() -> None:
    """Priced again, one device loses to data parallelism; a seed that doesn't fit, or isn't legal, doesn't count."""
    graph = graph_of(nn.Sequential(nn.Linear(256, 256)), torch.randn(65536, 256))
    cost, rows, one_device = _C.CostModel(_C.Machine(2, 1)), [32768, 32768], "0  @ [0]\n"
    found = {"chosen": "descent", "plan": one_device, "seeds": {"ddp": {"step_time_ns": 1}}}
    assert settled(graph, found, rows, cost, 1 << 40, None)[0] == "ddp"
    assert settled(graph, found, rows, cost, 1, None) == ("descent", one_device)
    found["seeds"] = {"ddp": {"step_time_ns": -1}}
    assert settled(graph, found, rows, cost, 1 << 40, None) == ("descent", one_device)
