"""Pinned configurations and forbidden cuts: in every candidate, also where a node would come by a cut by following."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn

from torch_soap import _C, Plan, plan, verify


def images() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 8)]
    return nn.Sequential(*layers), torch.randn(8, 3, 8, 8)


def slow(devices: int) -> _C.Machine:
    """Links so slow that the search leaves data parallelism."""
    out = _C.Machine(devices)
    out.intra = _C.Link(latency_ns=50e3, bytes_per_s=1e7)
    return out


def search(**constraints: Any) -> Plan:
    module, x = images()
    return plan(module, x, machine=slow(2), **constraints)


def cuts(found: Plan, name: str) -> dict[str, tuple[int, int]]:
    """Factor -> (tiles, chunks) of a node as it runs, whether written or followed."""
    assert found.context is not None
    program = _C.lower(found.context.graph, found.strategy, found.context.rows)
    node = next(n for n in program.graph.nodes if n.name == name)
    rule, tiling = program.rules[node.id], program.tilings[node.id]
    out = {rule.factors[c.factor].name: (len(c.parts), len(c.parts[0])) for c in tiling.cuts}
    return {f: n for f, n in out.items() if n != (1, 1)}


def test_a_pinned_configuration_stays() -> None:
    assert "5" not in search().strategy.nodes or _C.print_config(search().strategy.nodes["5"]) != "o=2 @ [1,0]"
    found = search(pin={"5": "o=2 @ [1,0]", "param:7.weight": "d1=2"})
    assert _C.print_config(found.strategy.nodes["5"]) == "o=2 @ [1,0]"
    assert _C.print_config(found.strategy.nodes["param:7.weight"]) == "d1=2"
    module, x = images()
    assert verify(module, x, found, steps=2).ok


def test_a_node_pinned_to_nothing_follows() -> None:
    found = search(pin={"1": "", "3": ""})
    assert "1" not in found.strategy.nodes and "3" not in found.strategy.nodes


def test_pins_by_pattern_take_what_each_operator_has() -> None:
    found = search(pin={"?": "k=2"})
    assert cuts(found, "0") == cuts(found, "2") == {"k": (2, 1)}


@pytest.mark.parametrize("names", [["n"], ["n", "h", "w"], ["k", "c", "h", "w"]])
def test_forbidden_factors_are_not_cut_however_a_node_comes_by_them(names: list[str]) -> None:
    found = search(forbid={"?": names})
    assert found.context is not None
    for node in found.context.graph.nodes:
        if node.kind == _C.NodeKind.op and len(node.name) == 1:
            assert not set(cuts(found, node.name)) & set(names), found.text
    rows = {"d0"} & set(cuts(found, "1"))  # a ReLU's rows are d0: n by another name
    assert not (rows and "n" in names), found.text


def test_every_candidate_keeps_what_is_forbidden() -> None:
    found = search(forbid={"*": ["n", "h", "w"]})
    assert found.context is not None and len(found.context.starts) > 1
    for name, strategy in found.context.starts:
        program = _C.lower(found.context.graph, strategy, found.context.rows)
        for node in program.graph.nodes:
            if node.kind != _C.NodeKind.op:
                continue
            cut = {program.rules[node.id].factors[c.factor].name for c in program.tilings[node.id].cuts if len(c.parts) * len(c.parts[0]) > 1}
            assert not cut & {"n", "h", "w", "d0"}, name  # d0: what elementwise operators call the rows


def test_devices_and_chunks_can_be_forbidden() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    batch = (torch.randn(64, 256), torch.randn(64, 256))
    free = plan(module, batch, loss=nn.functional.mse_loss, machine=slow(2))
    assert free.context is not None
    assert any(c.devices for _, s in free.context.starts for c in s.nodes.values())  # pipelines, one device
    found = plan(module, batch, loss=nn.functional.mse_loss, machine=slow(2), forbid={"*": ["devices", "chunks"]})
    assert found.context is not None
    for name, strategy in found.context.starts:
        for config in strategy.nodes.values():
            assert list(config.devices) in ([], list(range(len(config.devices)))), name
            assert all(cut.chunks == 1 for _, cut in config.cuts), name


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ({"forbid": {"nothing*": "n"}}, "there is no operator nothing"),
        ({"forbid": {"0": "o"}}, 'has a factor "o"; there are n, k, c'),
        ({"pin": {"0": "o=2"}}, 'no factor "o"'),
        ({"pin": {"9": "n=2"}}, "there is no operator or parameter 9"),
        ({"pin": {"param:5.weight": "d0=2 @ [0,0]"}}, "pinned and forbidden: .*two parts"),
    ],
)
def test_what_cannot_be_kept_is_said(constraints: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        search(**constraints)


def test_resolving_keeps_the_constraints_and_costs_no_more_than_the_best_known_candidate() -> None:
    found = search()
    again = found.resolve(pin={"7": "n=fed"}, forbid={"5": "o"})
    assert _C.print_config(again.strategy.nodes["7"]) == "n=fed"
    assert "o" not in cuts(again, "5")
    assert again.stats["simulations"] < found.stats["simulations"]
    free = again.resolve()  # what a constraint ruled out is known still
    assert free.predicted["step_time_ns"] <= found.predicted["step_time_ns"] <= again.predicted["step_time_ns"]


def test_a_written_plan_is_bound_before_it_is_resolved() -> None:
    module, x = images()
    written = Plan(strategy=search().strategy, text="")
    with pytest.raises(ValueError, match=r"resolve.*plan\.bind"):
        written.resolve()
    assert written.bind(module, x, machine=slow(2)).resolve(pin={"5": "o=2"}).strategy.nodes["5"].cuts[0][0] == "o"


def test_alexnet_is_resolved_at_once() -> None:
    """No bar on seconds: they are in the report of `plan.stats`. The number of simulations is what bounds them."""
    found = plan(tv.AlexNet().to("meta"), torch.empty(32, 3, 224, 224, device="meta"), machine=slow(4))
    begin = time.perf_counter()
    again = found.resolve(pin={"classifier.*": "o=4"}, forbid={"features.*": "h"})
    assert again.stats["simulations"] <= 200 and again.stats["seconds"] <= time.perf_counter() - begin
    assert cuts(again, "classifier.1") == {"o": (4, 1)} and "h" not in cuts(again, "features.0")
