"""The shortest check that everything is there: a few modules are exact and a plan survives its text. Below 30 s."""

from __future__ import annotations

import pytest
import torch

from tests.property.cases import build
from torch_soap.testing import random_plan
from torch_soap.verify import verify


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("mlp", "0 o=2 store=o\n2 i=2\n4 n=2x2t @ [1,0]"),
        ("conv_bn", "0 h=[0,4,11]\n3 k=2 store=k\n* n=fed"),
        ("causal", "/scaled_dot_product_attention s=[0,2,7]\nup o=2\ndown i=2\n* n=fed"),
    ],
)
def test_exact(name: str, plan: str) -> None:
    torch.set_num_threads(1)
    built = build(name)
    report = verify(built.module, built.inputs, plan, world_size=2)
    assert report.ok, str(report)


def test_a_plan_survives_its_text() -> None:
    built = build("mlp")
    plan = random_plan(built.module, built.inputs, 3, seed=1)
    assert verify(built.module, built.inputs, plan.text, world_size=3, steps=1).ok
