"""The thin path through every layer, in seconds: capture, rules, lowering, all ranks in this process, a search."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_soap
from torch_soap.capture import capture
from torch_soap.plan import as_plan
from torch_soap.rewrite.graph_import import to_op_graph


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))


CASES = [
    (mlp, (5, 6), 2, "* n=fed"),
    (mlp, (5, 6), 2, "0 o=2 store=o\n3 i=2 store=i\n* n=fed"),
    (mlp, (5, 6), 3, "0 n=2x2t @ [2,0]\n3 n=fed store=shard keep=use\n* n=fed"),
    (conv, (4, 2, 9, 7), 2, "* n=fed"),
    (conv, (4, 2, 9, 7), 2, "0 h=[0,2,5]\n1 h=2\n3 h=2\n* n=fed"),
    (Attention, (2, 6, 8), 2, "qkv o=2:3.2.4\n/scaled_dot_product_attention h=2\nout i=2\n* n=fed"),
    (Attention, (2, 6, 8), 4, "/scaled_dot_product_attention s=2z t=2\n* n=fed"),
]


@pytest.mark.parametrize(("make", "shape", "world", "plan"), CASES)
def test_plan_is_exact(make: type[nn.Module], shape: tuple[int, ...], world: int, plan: str) -> None:
    torch.manual_seed(0)
    report = torch_soap.verify(make(), torch.randn(shape), plan, world_size=world, steps=2)
    assert report.ok, str(report)


def test_search_beats_data_parallel_where_links_are_slow() -> None:
    module = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048))
    machine = torch_soap._C.Machine(2)
    machine.intra = torch_soap._C.Link(latency_ns=50e3, bytes_per_s=1.25e8)
    plan = torch_soap.plan(module, torch.randn(8, 2048), world_size=2, machine=machine)
    assert plan.predicted["step_time_ns"] < 0.5 * plan.predicted["seeds"]["ddp"]["step_time_ns"], plan.explain()


def test_plan_text_parses_back() -> None:
    captured = capture(mlp(), (torch.randn(4, 6),))
    graph = to_op_graph(captured.instantiate(captured.inputs))
    plan = as_plan("0 o=[0,3,8]x2t @ [1,0] store=o keep=use\nset order=gpipe\n3 i=2 replicas=1\n* n=fed", graph, 2)
    assert as_plan(plan.text, graph, 2).strategy == plan.strategy


def test_one_process_is_untouched() -> None:
    module = mlp()
    same = torch_soap.parallelize(module)
    assert same is module and type(same) is nn.Sequential and "forward" not in vars(same)
    assert not same._forward_pre_hooks and not same._forward_hooks and not same._state_dict_hooks
    with same.no_sync():
        assert "one process" in same.plan.explain()
    again = pickle.loads(pickle.dumps(copy.deepcopy(same.eval())))
    assert torch.equal(again(torch.ones(1, 6)), module(torch.ones(1, 6)))
