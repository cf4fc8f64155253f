"""The plan's text: it prints what it parses, and each mistake gets its message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.planning import graph_of
from torch_soap import _C
from torch_soap.capture import capture
from torch_soap.plan import as_plan, make_plan
from torch_soap.testing import random_plan_of

GRAPH = graph_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 4))

ROUND_TRIP = [
    ("0 o=2", "0  o=2\n"),
    ("0  n=2x3t   o=[0,5,6] @ [1, 0,0 ,1]", "0  n=2x3t o=[0,5,6] @ [1,0,0,1]\n"),
    ("0 o=2z", "0  o=2z\n"),
    ("0 o=1x2t:2.3.1", "0  o=1x2t:2.3.1\n"),
    ("0 n=fed", "0  n=fed\n"),
    ("0 replicas=1", "0  replicas=1\n"),
    ("0 replicas=2 # both\n\n# nothing\n2 @ [1]", "0  replicas=2\n2  @ [1]\n"),
    ("set order=1f1b bucket_bytes=77\n0 o=2", "set order=1f1b\nset bucket_bytes=77\n0  o=2\n"),
    ("0 o=2 store=o", "param:0.weight  d0=2 @ [0,1]\nparam:0.bias    d0=2 @ [0,1]\n0               o=2\n"),
    (
        "0 o=2 store=whole keep=until_step",
        "param:0.weight  replicas=2 keep=until_step @ [0,1]\nparam:0.bias    replicas=2 keep=until_step @ [0,1]\n0               o=2 keep=until_step\n",
    ),
    ("param:2.weight d1=2 @ [1,0]", "param:2.weight  d1=2 @ [1,0]\n"),
    ("2 o=2x2t\n* n=fed", "0  n=fed\n1  n=fed\n2  o=2x2t\n"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "printed"), ROUND_TRIP)
def test_round_trip(text: str, printed: str) -> None:
    strategy = _C.parse_plan(GRAPH, text, 2)
    out = _C.print_plan(GRAPH, strategy)
    assert out == printed
    assert _C.parse_plan(GRAPH, out, 2) == strategy


ERRORS = [
    ("0 q=2", '[plan] 0 (linear): no factor "q"; it has n (S, size 8), i (R, size 4), o (P, size 6)'),
    ("0 o=x", '"x" is not a number'),
    ("nothing o=2", "there is no operator or parameter nothing; there are 0, 1, 2"),
    ("in:0 n=2", "there is no operator or parameter in:0; there are 0, 1, 2"),
    ("0 o=2 @ 0,1", "devices are written @ [0,1]"),
    ("0 o=[0", '"[0": missing ]'),
    ("0 o=[3]", '"[3]": cut points are [0, ..., size]'),
    ("0 o=0", '"0": degrees are 1 or more'),
    ("0 n=2:2.2", '"2:2.2": mixed radix is :outer.middle.inner'),
    ("0 o=2:2.2.2", "[plan] 0: o has size 6, not 2*2*2"),
    ("0 keep=forever", "keep is until_backward, use, until_step"),
    ("0 hello", '"hello" is not factor=degree, store=, keep=, replicas= or @ [devices]'),
    ("set speed=9", 'unknown setting "speed=9"; there are order=gpipe|1f1b and bucket_bytes=N'),
    ("0 replicas=0", "replicas is 1 or more"),
    ("0 o=2 store=h", "store=h: 0 (linear) has the factors n, i, o; or store=whole, store=shard"),
    ("0 store=o", "store=o: the line does not cut o"),
    ("0 o=2 @ [0,1,2]", "[plan] 0: @ [0,1,2] names 3 devices, 2 tiles x 1 replicas need 2"),
    ("0 o=2 @ [0,7]", "[plan] 0: there is no device 7; devices are 0..1"),
    ("0 o=3", "[plan] 0: 3 tiles x replicas on 2 devices: name the devices (@ [...])"),
    ("0 o=[0,5,4,6]", "[plan] 0: o=[0,5,4,6] must rise from 0 to the factor's size 6"),
    ("0 o=2 o=2 @ [0,0,1,1]", "[plan] 0: factor o is cut twice"),
    ("0 replicas=2 @ [1,1]", "[plan] 0: a tile has two replicas on one device in @ [1,1]"),
    ("0 c=fed", '"c=fed": only n is cut as the processes feed'),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors(line: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        _C.parse_plan(GRAPH, f"# a comment\n{line}", 2)
    assert str(caught.value) == f"plan line 2: {message}\n  {line}"


def test_a_line_that_is_shadowed() -> None:
    with pytest.raises(ValueError, match="plan line 2: an earlier line already configures 0"):
        _C.parse_plan(GRAPH, "0 o=2\n0 n=2", 2)
    _C.parse_plan(GRAPH, "0 o=2\n1 d1=2\n2 n=2\n? n=2", 2)  # a pattern that earlier lines use up is no mistake


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("param:0.weight d0=2 @ [0,0]", "[plan] param:0.weight: device 0 would store two parts of it; a device stores one"),
        ("param:0.weight d0=1x2t", "[plan] param:0.weight: storage isn't cut in time"),
        ("set order=1f1b", "[plan] order 1f1b needs the loss inside: output out:0 has 24 elements"),
    ],
)
def test_what_only_the_whole_graph_shows(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        _C.lower(GRAPH, _C.parse_plan(GRAPH, text, 2), [4, 4])
    assert str(caught.value) == message


def test_random_plans_round_trip() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (torch.randn(8, 4),), {})
    for seed in range(30):
        plan = random_plan_of(captured, 1 + seed % 5, seed)
        again = as_plan(plan.text, GRAPH, plan.world_size)
        assert again.strategy == plan.strategy
        assert make_plan(GRAPH, again.strategy).text == plan.text


def test_a_plan_is_read_from_a_file(tmp_path: Path) -> None:
    """Lines or what Plan.save wrote; named by a Path or by a string."""
    lines = tmp_path / "mine.plan"
    lines.write_text("0 o=2\n* n=fed\n")
    saved = tmp_path / "saved.json"
    wanted = as_plan(lines, GRAPH, 2)
    wanted.save(saved)
    for given in (str(lines), saved, str(saved), lines.read_text(), "0 o=2\n* n=fed # " + "x" * 5000):
        assert as_plan(given, GRAPH, 2).text == wanted.text
    with pytest.raises(FileNotFoundError):
        as_plan("nothing.json", GRAPH, 2)
