"""A saved plan meets another model: what still fits is kept, the rest is said by name."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.planning import graph_of, op_graph
from torch_soap import _C, Plan, manual_plan, verify
from torch_soap.capture import capture
from torch_soap.plan import FORMAT, as_plan

X = torch.randn(8, 16)


def model(*layers: tuple[str, nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(layers))


def original() -> nn.Module:
    return model(("up", nn.Linear(16, 32)), ("act", nn.ReLU()), ("down", nn.Linear(32, 16)), ("head", nn.Linear(16, 4)))


def graph(module: nn.Module) -> _C.OpGraph:
    return graph_of(module, X)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    as_plan("up o=2 store=o\ndown i=2\nhead n=2 store=shard keep=use\nact d1=2\nedge up -> act via=exchange\nset bucket_bytes=4096", graph(original()), 2).save(
        path
    )
    return path


def loaded(path: Path, module: nn.Module) -> tuple[Plan, str]:
    with pytest.warns(UserWarning, match="made for another model") as said:
        plan = as_plan(path, graph(module))
    assert len(said) == 1
    assert verify(module, X, plan, steps=2).ok
    return plan, str(said[0].message)


def test_the_same_model_is_read_without_a_word_at_any_batch_size(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = as_plan(saved, op_graph(capture(original(), (torch.randn(24, 16),), {})))
    assert plan.text == "\n".join(json.loads(saved.read_text())["strategy"]) + "\n"


def test_a_renamed_layer(saved: Path) -> None:
    renamed = model(("up", nn.Linear(16, 32)), ("act", nn.ReLU()), ("down", nn.Linear(32, 16)), ("top", nn.Linear(16, 4)))
    plan, said = loaded(saved, renamed)
    assert "no longer there: param:head.weight, param:head.bias, head" in said
    assert "new, follow their input: param:top.weight, param:top.bias, top" in said
    assert _C.print_config(plan.strategy.nodes["up"]) == "o=2" and "top" not in plan.strategy.nodes
    assert "edge up -> act via=exchange" in plan.text and "set bucket_bytes=4096" in plan.text


def test_a_removed_layer_takes_its_edge_with_it(saved: Path) -> None:
    plan, said = loaded(saved, model(("up", nn.Linear(16, 32)), ("down", nn.Linear(32, 16)), ("head", nn.Linear(16, 4))))
    assert "no longer there: act" in said and "new" not in said
    assert "edge" not in plan.text and _C.print_config(plan.strategy.nodes["down"]) == "i=2"


def test_an_added_layer(saved: Path) -> None:
    layers = list(original().named_children())
    plan, said = loaded(saved, model(*layers[:3], ("norm", nn.LayerNorm(16)), layers[3]))
    assert "new, follow their input: param:norm.weight, param:norm.bias, norm" in said and "no longer" not in said
    assert set(plan.strategy.nodes) >= {"up", "act", "down", "head"} and "norm" not in plan.strategy.nodes


def test_a_layer_of_another_kind_says_what_is_not_legal(saved: Path) -> None:
    plan, said = loaded(saved, model(("up", nn.Linear(16, 32)), ("act", nn.ReLU()), ("down", nn.LayerNorm(32)), ("head", nn.Linear(32, 4))))
    assert 'no longer legal: down (layer_norm): no factor "i"' in said
    assert "down" not in plan.strategy.nodes


def test_strict_refuses(saved: Path) -> None:
    other = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(ValueError, match="another model"):
        as_plan(saved, graph(other), strict=True)
    plan = as_plan(saved, graph(original()))
    with pytest.raises(ValueError, match="another model"):
        as_plan(plan, graph(other))
    with pytest.warns(UserWarning, match="1 of 10 lines"):
        assert as_plan(plan, graph(other), strict=False).text == "set bucket_bytes=4096\n"


def test_format_one_is_read_and_others_are_refused(saved: Path) -> None:
    content = json.loads(saved.read_text())
    assert content["format"] == FORMAT == 2
    del content["nodes"]
    saved.write_text(json.dumps({**content, "format": 1}))
    assert as_plan(saved, graph(original())).text == "\n".join(content["strategy"]) + "\n"
    saved.write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(ValueError, match="format 9, this version reads 1, 2"):
        as_plan(saved, graph(original()))


def test_a_manual_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    module = original()
    plan = manual_plan(module, X, machine=_C.Machine(4), dp=2, tp=2, zero=3)
    plan.save(path)
    again = as_plan(path, graph(module))
    assert again.strategy == plan.strategy and again.predicted == plan.predicted
