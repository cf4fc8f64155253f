"""Programs of small graphs as text. `SOAP_GOLDEN_UPDATE=1 pytest tests/golden` writes them anew; read the diff before you commit it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.planning import graph_of, lowered
from torch_soap import _C

FOLDER = Path(__file__).parent / "programs"


def mlp() -> _C.OpGraph:
    return graph_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(8, 4))


def conv() -> _C.OpGraph:
    return graph_of(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)), torch.randn(4, 2, 8, 8))


PROGRAMS = {
    "mlp_data_parallel": (mlp, "* n=fed"),
    "mlp_megatron": (mlp, "0 o=2\n1 d1=2\n2 i=2"),
    "mlp_fully_sharded": (mlp, "* n=fed store=shard keep=use"),
    "mlp_chunks": (mlp, "0 n=1x2t @ [0]\n1 @ [0]\n2 n=1x2t @ [1]"),
    "conv_halo_batch_norm": (conv, "0 h=[0,3,8]\n1 h=2"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str) -> None:
    make, text = PROGRAMS[name]
    program = lowered(make(), text, [5, 3] if make is mlp else [2, 2])
    found = "\n".join([text, "", str(program), *(_C.project(program, r).describe(program) for r in range(2))])
    path = FOLDER / f"{name}.txt"
    if os.environ.get("SOAP_GOLDEN_UPDATE") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.read_text() == found, f"if the new program is right: SOAP_GOLDEN_UPDATE=1 pytest {__file__}"
