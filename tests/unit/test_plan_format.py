"""docs/plan-format.md is true: its plans parse, print, parse back and lower; what it says is refused is, with the words it gives."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_soap import _C
from torch_soap.capture import capture
from torch_soap.plan import as_plan
from torch_soap.plan import lower as lower_plan
from torch_soap.rewrite.graph_import import to_op_graph

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "plan-format.md").read_text()
WORLD = 2


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


@functools.cache
def graph() -> _C.OpGraph:
    torch.set_num_threads(1)
    names: dict[str, type[nn.Module]] = {}
    exec(blocks("python")[0], {"nn": nn, "torch": torch}, names)
    captured = capture(names["Example"](), (torch.randn(8, 3, 16, 16),), {}, check=False)
    return to_op_graph(captured.instantiate(captured._signature_of([captured.leaves[i] for i in captured.tensor_slots])))


def lower(text: str) -> _C.Program:
    return lower_plan(graph(), as_plan(text, graph(), WORLD), [4, 4])


@pytest.mark.parametrize("text", blocks("plan"))
def test_plans(text: str) -> None:
    strategy = _C.parse_plan(graph(), text, WORLD)
    assert _C.parse_plan(graph(), _C.print_plan(graph(), strategy), WORLD) == strategy
    assert len(lower(text).steps) > 0


@pytest.mark.parametrize("text", blocks("refused"))
def test_refused(text: str) -> None:
    written, message = text.rsplit("! ", 1)
    with pytest.raises(ValueError, match=re.escape(message.strip())):
        lower(written)


def rows(heading: str, after: str) -> list[tuple[str, str]]:
    """The rows of the first table after a heading, whose first cell is code."""
    section = DOCUMENT.split(f"## {heading}\n")[1].split(after)[0]
    return [(text, cell.strip().replace("\\|", "|")) for text, cell in re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE)]


@pytest.mark.parametrize(("text", "message"), rows("Errors", "A second line"))
def test_table_of_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        _C.parse_plan(graph(), text, WORLD)
    assert str(error.value).startswith("plan line 1: ") and str(error.value).endswith(text)


@pytest.mark.parametrize("text", ["n=4", "n=fed", "h=[0,5,8]", "n=2x4t", "n=4t"])
def test_table_of_cuts(text: str) -> None:
    assert any(text == row for row, _ in rows("Cuts", "Several cuts"))
    lower(f"features.2 {text} @ [0,1{',0,1' if text == 'n=4' else ''}]" if not text.endswith("=4t") else f"features.2 {text}")


def test_parameters_stay_where_they_are_used() -> None:
    program = lower("classifier.0 o=2")
    weight = program.graph.nodes[program.graph.find("param:classifier.0.weight")]
    assert [c.devices for c in program.tiles[weight.outputs[0]].coords] == [[0], [1]]
