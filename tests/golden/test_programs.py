"""Programs as text. A change shows as a diff: `make golden-update` rewrites the files, review what changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_soap import _C
from torch_soap.capture import capture
from torch_soap.rewrite.graph_import import to_op_graph

FOLDER = Path(__file__).parent / "programs"

MLP = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
CONV = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))

CASES = {
    "ddp": (MLP, [(4, 6)], None, 2, "* n=fed"),
    "megatron": (MLP, [(4, 6)], None, 2, "0 o=2 store=o\n2 i=2 store=i"),
    "zero3": (MLP, [(4, 6)], None, 2, "0 n=fed store=shard keep=use\n2 n=fed store=shard keep=use\n* n=fed"),
    "uneven_chunks_devices": (MLP, [(6, 6)], None, 3, "0 n=[0,1,6]x2t @ [2,0]\n2 o=2 @ [1,0]\n* n=fed"),
    "pipeline_1f1b": (MLP, [(4, 6), (4,)], F.cross_entropy, 2, "set order=1f1b\n0 n=1x2t @ [0]\n1 n=1x2t @ [0]\n* n=1x2t @ [1]"),
    "halo": (CONV, [(2, 2, 8, 8)], None, 2, "0 h=2\n1 h=2\n2 d2=2\n3 h=2\n* n=fed"),
    "exchange_by_choice": (MLP, [(4, 6)], None, 2, "0 o=2\n2 i=2\nedge 2 -> out:0 via=exchange"),
}


@pytest.mark.parametrize("name", CASES)
def test_program(name: str) -> None:
    module, shapes, loss, world, text = CASES[name]
    inputs = [torch.zeros(s) if len(s) > 1 else torch.zeros(s, dtype=torch.int64) for s in shapes]
    captured = capture(module, tuple(inputs), loss=loss, check=False)
    graph = to_op_graph(captured.instantiate(captured.inputs))
    program = _C.lower(graph, _C.parse_plan(graph, text, world), [shapes[0][0] // world] * world)
    ranks = "".join(_C.project(program, r).describe(program) for r in range(world))
    got = f"# {text!r} on {world} devices\n\n{graph}\n{program}\n{ranks}"
    path = FOLDER / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(got)
    assert path.exists(), f"no {path.name}: run make golden-update"
    assert got == path.read_text()
