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


def pooled() -> _C.OpGraph:
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    return graph_of(module, torch.randn(4, 2, 8, 8))


def with_loss() -> _C.OpGraph:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return graph_of(module, torch.randn(8, 6), torch.zeros(8, dtype=torch.long), loss=nn.functional.cross_entropy)


PROGRAMS = {
    "mlp_data_parallel": (mlp, "* n=fed"),
    "mlp_megatron": (mlp, "0 o=2\n1 d1=2\n2 i=2"),
    "mlp_fully_sharded": (mlp, "* n=fed store=shard keep=use"),
    "mlp_chunks": (mlp, "0 n=1x2t @ [0]\n1 @ [0]\n2 n=1x2t @ [1]"),
    "mlp_exchange_by_choice": (mlp, "0 o=2\n2 i=2\nedge 2 -> out:0 via=exchange"),
    "mlp_uneven_chunks_devices": (mlp, "0 n=[0,1,8]x2t @ [1,0]\n2 o=2 @ [1,0]\n* n=fed"),
    "mlp_loss_1f1b": (with_loss, "set order=1f1b\n0 n=1x2t @ [0]\n1 n=1x2t @ [0]\n* n=1x2t @ [1]"),
    "mlp_loss_gpipe": (with_loss, "0 n=1x2t @ [0]\n1 n=1x2t @ [0]\n* n=1x2t @ [1]"),
    "conv_halo_batch_norm": (conv, "0 h=[0,3,8]\n1 h=2"),
    "conv_pool_halo": (pooled, "0 h=2\n1 h=2\n2 d2=2\n3 h=2\n* n=fed"),
}


def test_every_program_belongs_to_a_test() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str) -> None:
    make, text = PROGRAMS[name]
    program = lowered(make(), text, {mlp: [5, 3], with_loss: [4, 4]}.get(make, [2, 2]))
    found = "\n".join([text, "", str(program), *(_C.project(program, r).describe(program) for r in range(2))])
    path = FOLDER / f"{name}.txt"
    if os.environ.get("SOAP_GOLDEN_UPDATE") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.read_text() == found, f"if the new program is right: SOAP_GOLDEN_UPDATE=1 pytest {__file__}"
