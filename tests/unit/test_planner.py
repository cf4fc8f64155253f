"""The planner's last word."""

from __future__ import annotations

import torch
from torch import nn

from tests.unit.planning import graph_of
from torch_soap import _C
from torch_soap.planner import settled
from torch_soap.progress import SearchProgress


def test_a_plan_that_beat_a_seed_by_a_guess_gives_way() -> None:
    """Priced again, one device loses to data parallelism, unless that doesn't fit."""
    graph = graph_of(nn.Sequential(nn.Linear(256, 256)), torch.randn(65536, 256))
    cost, rows = _C.CostModel(_C.Machine(2, 1)), [32768, 32768]
    one_device = _C.parse_plan(graph, "0  @ [0]\n", 2)
    found = {"chosen": "descent", "starts": [("descent", one_device)]}
    again = settled(graph, rows, cost, _C.SearchOptions(), None, SearchProgress(None), found)
    prices = {name: seed["step_time_ns"] for name, seed in again["seeds"].items()}
    assert prices[again["chosen"]] == min(p for p in prices.values() if p >= 0) < prices["descent"]
