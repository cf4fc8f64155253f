"""Graph rewrites: every entry of the table on all ranks of a plan, wrong entries refused, lines of a plan's text, the search."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_soap
from tests.unit.planning import op_graph
from torch_soap import _C, testing
from torch_soap.capture import capture
from torch_soap.plan import as_plan
from torch_soap.rewrite import local
from torch_soap.rewrite.substitution import Checker, refusal


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Attention(nn.Module):
    """With products of their own for queries, keys and values; keys and values are half as wide."""

    def __init__(self, width: int = 16, kv: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = nn.Linear(width, width, bias=bias), nn.Linear(width, kv, bias=bias), nn.Linear(width, kv, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.q.out_features // self.heads
        q, k, v = (y.unflatten(-1, (-1, size)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))


class GPT(nn.Module):
    def __init__(self, layers: int = 2, width: int = 16, kv: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), Attention(width, kv, bias), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)]) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, attention, up, down in self.blocks:
            x = x + attention(norm(x))
            x = x + down(F.gelu(up(x)))
        return x


class InceptionBlock(nn.Module):
    """1x1 convolutions of one input, of other widths, two of them with what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 6, 1)
        self.b2, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.cat([F.relu(y) for y in (self.a(x), self.b2(F.relu(self.b(x))), self.c(x))], 1))


class Small(nn.Module):
    """A function of the input and two weights."""

    def __init__(self, fn: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.fn = fn
        self.weights = nn.ParameterList(torch.randn(s) for s in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x, *self.weights)


def gates(x: torch.Tensor, *_: Any) -> torch.Tensor:
    a, b, c = x.split([2, 4, 2], -1)
    return torch.cat([torch.sigmoid(a) * torch.tanh(c), torch.exp(-b)], -1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fuse_linears": (Attention, (4, 6, 16)),
    "fuse_convolutions": (InceptionBlock, (4, 6, 8, 8)),
    "fuse_matmuls": (lambda: Small(lambda x, v, w: (x @ v).tanh().sum(-1) + (x @ w).sum(-1), (8, 4), (8, 6)), (4, 6, 8)),
    "fuse_addmms": (lambda: Small(lambda x, v, w, b, c: torch.addmm(b, x, v).sin().sum(-1) + torch.addmm(c, x, w).sum(1), (8, 4), (8, 6), (4,), (6,)), (4, 8)),
    "fuse_uses_of_a_weight": (lambda: Small(lambda x, w, b: F.linear(x.tanh(), w, b).sin() + F.linear(x.exp(), w, b), (6, 8), (6,)), (4, 6, 8)),
    "join_summed_linears": (lambda: Small(lambda x, v, w, b: F.linear(x.tanh(), v, b) + F.linear(x, w), (6, 8), (6, 8), (6,)), (4, 8)),
    "scale_after_linear": (lambda: Small(lambda x, w: F.linear(x * 0.25, w), (2, 8)), (4, 8)),
    "unary_before_cat": (lambda: Small(lambda x, w: torch.cat([x, F.linear(x, w)], 1).tanh(), (6, 8)), (4, 8)),
    "unary_after_cat": (lambda: Small(lambda x, w: torch.cat([F.linear(x.sin(), w).tanh(), F.linear(x, w).tanh()], 1), (6, 8)), (4, 8)),
    "unary_before_permute": (lambda: Small(lambda x, w: F.linear(x, w).transpose(1, 2).tanh(), (6, 8)), (4, 6, 8)),
    "unary_after_permute": (lambda: Small(lambda x, w: F.linear(x, w).tanh().transpose(1, 2), (6, 8)), (4, 6, 8)),
    "split_at_once": (lambda: Small(gates), (4, 6, 8)),
    "cat_of_all_parts": (lambda: Small(lambda x, w: torch.cat(F.linear(x, w).split([2, 4], -1), -1).sin(), (6, 8)), (4, 8)),
    "part_of_cat": (lambda: Small(lambda x, w: torch.cat([x, F.linear(x, w)], -1)[:, 8:].sin(), (6, 8)), (4, 8)),
    "flatten_cats": (lambda: Small(lambda x, w: torch.cat([x, torch.cat([x.sin(), F.linear(x, w)], 1), x.exp()], 1).sin(), (6, 8)), (4, 8)),
    "cancel_permutes": (lambda: Small(lambda x, w: F.linear(x, w).transpose(1, 2).transpose(1, 2).sin(), (6, 8)), (4, 6, 8)),
    "merge_permutes": (lambda: Small(lambda x, w: F.linear(x, w).transpose(1, 2).transpose(0, 2).sin(), (6, 8)), (4, 6, 8)),
}  # fmt: skip


def found(module: nn.Module, x: torch.Tensor, name: str) -> tuple[Any, _C.OpGraph, _C.Rewrite]:
    captured = capture(module, (x,), {})
    graph = op_graph(captured)
    return captured, graph, next(r for r in _C.find_rewrites(graph) if r.substitution == name)


def test_the_table_has_a_case_for_each_entry() -> None:
    assert {s.name for s in _C.substitutions()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_each_entry_on_all_ranks(name: str) -> None:
    """Rows that each process feeds, and two random plans of what the rewrite leaves, with what follows from it rewritten too."""
    make, shape = CASES[name]
    module, x = make(), torch.randn(shape)
    captured, graph, rewrite = found(module, x, name)
    after = _C.rewritten(graph, [rewrite])
    assert str(after) != str(graph)
    report = torch_soap.verify(module, x, f"rewrite {rewrite}\n* n=fed", world_size=2, steps=2)
    assert report.ok, report
    for seed in range(2):
        plan = testing.random_plan_of(captured, 2 + seed, seed, rewrites=2)
        report = torch_soap.verify(module, x, plan, steps=2)
        assert report.ok, f"{plan}\n{report}"


MEGATRON = """
rewrite fuse_linears blocks.0.1.q blocks.0.1.k blocks.0.1.v
rewrite fuse_linears blocks.1.1.q blocks.1.1.k blocks.1.1.v
blocks.*.q/joined o=2:3.16.1
blocks.*.q/weight d0=2:3.16.1
blocks.*.q/bias   d0=2:3.16.1
blocks.*.out      i=2
blocks.*.2        o=2
blocks.*.3        i=2
"""


def test_heads_cut_within_each_part() -> None:
    """Of three fused products each device has its heads of each: no movement between them and attention, and the weights stay where they are used."""
    module, x = GPT(), torch.randn(4, 6, 16)
    report = torch_soap.verify(module, x, MEGATRON, world_size=2, steps=1)  # a bias of keys has no gradient but rounding: steps would drift
    assert report.ok, report
    graph = op_graph(capture(module, (x,), {}))
    program = _C.lower(graph, _C.parse_plan(graph, MEGATRON, 2), [2, 2])
    kept = {n.name: program.tiles[n.outputs[0]] for n in program.graph.nodes if n.kind == _C.NodeKind.param}
    assert [list(c.devices) for c in kept["param:blocks.0.1.k.weight"].coords] == [[0], [1]]


WRONG = {
    "bias_forgotten": "from y* = linear(x, weight*, bias*)\n to weight = cat(weight*; dim=0)\n to joined = like y(x, weight)\n to y* = split(joined; dim=-1)",
    "bias_scaled": "from m = mul(x; other=s)\n from y = linear(m, w, b)\n to p = like y(x, w, b)\n to y = like m(p)",
    "parts_in_any_order": "from part* = narrow(x; dim=d, start=s*, length=n*)\n from y = cat(part*; dim=d)\n to y = x",
}


@pytest.mark.parametrize("name", ["bias_forgotten", "bias_scaled", "parts_in_any_order"])
def test_a_wrong_entry_is_refused(name: str) -> None:
    def swapped(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = torch.cat([x[:, 3:], x[:, :3]], 1)
        return F.linear(y * 0.5, w, b) + F.linear(x, w, b.exp()).sin() + F.linear(x, w.exp(), b)

    table = _C.parse_substitutions(f"{name}: rounding\n{WRONG[name]}")
    captured = capture(Small(swapped, (6, 6), (6,)), (torch.randn(4, 6),), {})
    graph = op_graph(captured)
    rewrites = _C.find_rewrites(graph, table)
    assert rewrites, "it fits nowhere"
    module_graph = captured.instantiate(captured._signature_of(captured.inputs))
    checker = Checker(module_graph, table)
    with pytest.warns(UserWarning, match=f"not used, {name} is wrong here: results 0 of both sides"):
        assert checker(rewrites[0], _C.sample_of(graph, rewrites[0], table))
    with pytest.raises(ValueError, match=f"{name} is wrong here"):
        checker.check(graph, rewrites[:1])


def test_parts_swapped_in_the_split_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong local computation of what a rewrite makes is refused too, and a plan that has it raises."""
    module, x = Attention(16, 16), torch.randn(4, 6, 16)
    captured, graph, rewrite = found(module, x, "fuse_linears")
    split = local.LOCALS["split"]
    monkeypatch.setitem(local.LOCALS, "split", lambda e, call: [*reversed(split(e, call))])  # type: ignore[misc]
    reason = refusal(rewrite, _C.sample_of(graph, rewrite), captured.instantiate(captured._signature_of(captured.inputs)))
    assert "fuse_linears is wrong here: results 0 of both sides" in reason
    with pytest.raises(ValueError, match="fuse_linears is wrong here"):
        torch_soap.verify(module, x, f"rewrite {rewrite}\n* n=fed", world_size=2)


def test_bias_joined_in_another_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Attention(16, 16), torch.randn(4, 6, 16)
    captured, graph, rewrite = found(module, x, "fuse_linears")
    cat = local.LOCALS["cat"]

    def wrong(e: Any, call: Any) -> Any:
        if len(call.shapes[0]) == 1:
            call.operands = call.operands[::-1]
        return cat(e, call)

    monkeypatch.setitem(local.LOCALS, "cat", wrong)
    assert "fuse_linears is wrong here" in refusal(rewrite, _C.sample_of(graph, rewrite), captured.instantiate(captured._signature_of(captured.inputs)))


def test_samples_are_small_and_know_layers_alike() -> None:
    captured = capture(GPT(2, 64, 64), (torch.randn(8, 32, 64),), {})
    graph = op_graph(captured)
    both = [r for r in _C.find_rewrites(graph) if r.substitution == "fuse_linears"]
    assert [r.anchors for r in both] == [[f"blocks.{i}.1.{p}" for p in "qkv"] for i in range(2)]
    assert _C.signature(graph, both[0]) == _C.signature(graph, both[1])
    sample = _C.sample_of(graph, both[0])
    assert max(torch.Size(t.shape).numel() for t in sample.source.tensors) <= 64
    assert {t.dtype for t in sample.source.tensors} == {"float64"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rewrite fuse_lines q k", r"plan line 1: \[rewrite\] there is no substitution fuse_lines; there are fuse_linears, "),
        ("rewrite fuse_linears q", "anchored at two or more operators, not 1"),
        ("rewrite fuse_linears q w", "there is no operator w"),
        ("rewrite fuse_linears q out", "x is in:0 and /view"),
        ("rewrite fuse_linears q q", "q stands twice"),
        ("rewrite fuse_linears", "a rewrite is written: rewrite substitution operator"),
        ("rewrite fuse_linears q k v\nq o=2", "plan line 2: there is no operator or parameter q; there are .*q/weight, q/bias, q/joined, q/split"),
    ],
)
def test_lines_that_are_refused(line: str, message: str) -> None:
    graph = op_graph(capture(Attention(), (torch.randn(4, 6, 16),), {}))
    with pytest.raises(ValueError, match=message):
        _C.parse_plan(graph, line, 2)


def test_a_plan_keeps_its_rewrites(tmp_path: Any) -> None:
    graph = op_graph(capture(Attention(), (torch.randn(4, 6, 16),), {}))
    text = "rewrite fuse_linears q k v\nq/joined n=fed\n"
    plan = as_plan(text, graph, 2)
    assert plan.text.splitlines()[0] == "rewrite fuse_linears q k v"
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["strategy"][0] == "rewrite fuse_linears q k v"
    again = as_plan(tmp_path / "plan.json", graph)
    assert again.strategy == plan.strategy
    assert [str(r) for r in again.strategy.rewrites] == ["fuse_linears q k v"]
    # A model without v: the rewrite no longer fits, nor what was said of what it made.
    other = op_graph(capture(nn.Sequential(nn.Linear(16, 16)), (torch.randn(4, 6, 16),), {}))
    with pytest.warns(UserWarning, match=r"0 of 2 lines still fit.*no longer there: q/joined; no longer legal: rewrite fuse_linears q k v"):
        assert not as_plan(tmp_path / "plan.json", other).strategy.rewrites


def launch_bound(devices: int = 2, overhead_ns: float = 50e3) -> _C.Machine:
    machine = _C.Machine(devices, 1)
    machine.op_overhead_ns = overhead_ns
    return machine


def test_the_search_rewrites_alike_blocks_alike() -> None:
    """Where launches cost most, one product and one concatenation are better than three products: in all blocks. With biases there are two
    concatenations, and as many launches as before."""
    module, x = GPT(2, bias=False), torch.randn(4, 6, 16)
    plan = torch_soap.plan(module, x, machine=launch_bound())
    fused = [r for r in plan.strategy.rewrites if r.substitution == "fuse_linears"]
    assert [r.anchors for r in fused] == [[f"blocks.{i}.1.{p}" for p in "qkv"] for i in range(2)]
    assert plan.predicted["step_time_ns"] < plan.predicted["without_rewrites_ns"]
    assert "fuse_linears blocks.0.1.q blocks.0.1.k blocks.0.1.v and 1 more alike: -" in plan.explain()
    assert torch_soap.verify(module, x, plan, steps=1).ok
    assert plan.predicted["rewrites"][0]["gain_ns"] > 0


def test_concatenated_weights_are_priced() -> None:
    """Where memory costs most, weights that would be copied in every step stay apart; small ones are joined."""
    machine = launch_bound()
    module, x = Attention(256, 256, bias=False), torch.randn(2, 2, 256)
    machine.memory_bytes_per_s = 1e9
    assert "fuse_linears" not in torch_soap.plan(module, x, machine=machine).text
    machine.memory_bytes_per_s = 1e12
    assert "fuse_linears" in torch_soap.plan(module, x, machine=machine).text


def test_a_pinned_operator_isnt_rewritten() -> None:
    plan = torch_soap.plan(Attention(16, 16, bias=False), torch.randn(4, 6, 16), machine=launch_bound(), pin={"k": "n=fed"})
    assert "rewrite fuse_linears" not in plan.text
    again = torch_soap.plan(Attention(16, 16, bias=False), torch.randn(4, 6, 16), machine=launch_bound()).resolve(pin={"k": "n=fed"})
    assert "rewrite fuse_linears" not in again.text


def test_why_not_a_rewrite() -> None:
    plan = torch_soap.plan(Attention(16, 16, bias=False), torch.randn(4, 6, 16), machine=launch_bound(), rewrites=False)
    change = plan.why_not("rewrite fuse_linears q k v")
    assert change.legal and change.step_ns is not None and change.step_ns < 0
    assert not plan.why_not("rewrite fuse_linears q out").legal
    rewritten = torch_soap.plan(Attention(16, 16, bias=False), torch.randn(4, 6, 16), machine=launch_bound())
    assert rewritten.why_not("q/joined", "o=2").legal
    assert "q/joined" in str(torch_soap.diff(plan, rewritten))


def test_a_refused_rewrite_isnt_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    cat = local.LOCALS["cat"]
    monkeypatch.setitem(local.LOCALS, "cat", lambda e, call: e(torch.neg, cat(e, call)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan = torch_soap.plan(Attention(16, 16, bias=False), torch.randn(4, 6, 16), machine=launch_bound())
    assert "fuse_linears" not in plan.text
    assert any("fuse_linears is wrong here" in str(w.message) for w in said)


def test_the_module_stays_as_it_is() -> None:
    """Parameters keep their names, shapes and identity: the concatenation is made in the step."""
    module, x = Attention(16, 16), torch.randn(4, 6, 16)
    before = {n: (id(p), p.detach().clone()) for n, p in module.named_parameters()}
    state = copy.deepcopy(module.state_dict())
    assert torch_soap.verify(module, x, "rewrite fuse_linears q k v\nparam:*.weight d0=2 keep=use\n* n=fed", world_size=2).ok
    assert {n: id(p) for n, p in module.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(v, state[n]) for n, v in module.state_dict().items())
