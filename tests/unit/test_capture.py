"""Capture: what comes out computes what the module does, at the example's size and at others, and the module is untouched."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_soap.capture import Captured, Graph, capture, run_graph
from torch_soap.capture.graph import refs


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def targets(graph: Graph) -> list[str]:
    return [n.target for n in graph.nodes if n.kind == "op"]


def names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.kind == "op"]


def check_form(graph: Graph) -> None:
    """Every value is made once, before it is used; names are unique; arguments hold no tensor and no symbolic size."""
    made: set[int] = set()
    for node in graph.nodes:
        assert set(node.inputs) <= made, node.name
        assert list(refs((node.args, node.kwargs))) == list(node.inputs)
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            assert not isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat), node.name
        assert not made & set(node.outputs)
        made |= set(node.outputs)
    everything = [n.name for n in graph.nodes]
    assert len(set(everything)) == len(everything)
    kinds = [n.kind for n in graph.nodes]
    order = {"feed": 0, "param": 0, "buffer": 0, "const": 0, "op": 1, "return": 2}
    assert [order[k] for k in kinds] == sorted(order[k] for k in kinds)


def agrees(captured: Captured, *tensors: torch.Tensor, tolerance: float = 1e-4) -> Graph:
    """The graph at these inputs against the module itself: outputs, gradients of parameters, buffers."""
    graph = captured.instantiate(tensors)
    check_form(graph)
    module = captured.module
    saved = {n: b.clone() for n, b in module.named_buffers()}
    parameters = [p for p in captured.parameters.values() if p.requires_grad]

    def gradients(result: Any) -> list[torch.Tensor | None]:
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
        total = sum(((o.double() * torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape)).sum() for o in outputs), torch.zeros(()))
        if outputs and parameters:
            total.backward()  # what a reentrant checkpoint needs
        grads = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return grads

    torch.manual_seed(1)
    expected = captured.call(tensors)
    expected_grads = gradients(expected)
    expected_buffers = {n: b.clone() for n, b in module.named_buffers()}
    with torch.no_grad():
        for n, b in module.named_buffers():
            b.copy_(saved[n])
    torch.manual_seed(1)
    feeds = dict(zip(captured.input_names(), tensors, strict=True))
    outputs, writes = run_graph(graph, captured.stored_tensors(graph) | feeds)
    got = captured.unflatten_outputs(outputs)
    assert type(got) is type(expected)
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        else:
            assert a == b
    for a, b in zip(expected_grads, gradients(got), strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            scale = max(float(a.abs().max()), 1e-3)
            assert float((a - b).abs().max()) <= tolerance * 20 * scale
    for n, b in expected_buffers.items():
        torch.testing.assert_close(writes.get(n, saved[n]), b, rtol=tolerance, atol=tolerance)
    return graph


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target)


# -- vision ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "size"), [("alexnet", 64), ("resnet18", 32), ("mobilenet_v3_small", 32), ("vit_b_16", 32)])
@pytest.mark.parametrize("train", [True, False])
def test_torchvision(name: str, size: int, train: bool) -> None:
    torchvision = pytest.importorskip("torchvision")
    options: dict[str, Any] = {"image_size": size} if name == "vit_b_16" else {}
    if name == "vit_b_16":
        model = torchvision.models.VisionTransformer(size, 16, 2, 4, 64, 128, num_classes=5, dropout=0.1)
    else:
        model = torchvision.models.get_model(name, num_classes=5, **options)
    captured = capture(model, (torch.randn(2, 3, size, size), torch.tensor([1, 2])), train=train, loss=cross_entropy)
    assert captured.dynamic
    assert captured.checked
    assert captured.opaque == []
    graph = agrees(captured, torch.randn(5, 3, size, size), torch.arange(5), tolerance=1e-3)
    assert graph.sample_dims == {"in:0": 0, "in:1": 0, "out:0": None}
    assert graph.train == train
    assert all(not t.endswith("_") for t in targets(graph))


def test_names_are_the_same_in_train_and_eval() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    train, evaluation = (capture(model, (x,), train=t).instantiate((x,)) for t in (True, False))
    assert set(names(evaluation)) <= set(names(train))
    assert {"conv1", "bn1", "layer1.0.conv1", "layer1.0", "fc"} <= set(names(evaluation))
    assert sum(n.target == "buffer_write" for n in train.nodes) == 60
    assert evaluation.buffer_writes == []


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.mid = nn.Conv2d(4, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down(x)
        return self.out(torch.cat([self.up(F.relu_(self.mid(self.pool(a)))), a], 1))


def test_unet() -> None:
    captured = capture(UNet(), (torch.randn(2, 1, 8, 8, requires_grad=True),))
    graph = agrees(captured, torch.randn(3, 1, 8, 8))
    assert {"up", "mid", "out", "down.0", "down.1", "down.2", "/cat"} <= set(names(graph))


# -- language --------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int = 17, width: int = 16, heads: int = 4, layers: int = 2, context: int = 12) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1))


def test_gpt_with_tied_weights() -> None:
    model = Gpt()
    ids = torch.randint(0, 17, (3, 12))
    captured = capture(model, (ids, ids), loss=token_loss)
    graph = agrees(captured, torch.randint(0, 17, (5, 12)), torch.randint(0, 17, (5, 12)))
    assert captured.param("tokens.weight") is model.tokens.weight
    params = [n.qualname for n in graph.of_kind("param")]
    assert params.count("tokens.weight") == 1
    assert "head.weight" not in params
    shared = next(n for n in graph.nodes if n.name == "param:tokens.weight").outputs[0]
    assert {n.name for n in graph.nodes if shared in n.inputs} == {"tokens", "head"}
    assert {"blocks.0.qkv", "blocks.1.mlp.1", "blocks.0/scaled_dot_product_attention", "drop"} <= set(names(graph))
    sizes = {tuple(graph.values[n.inputs[0]].shape) for n in graph.nodes if n.kind == "return"}
    assert sizes == {()}


class LstmLm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        y, state = self.lstm(self.embed(ids), (h0, c0))
        return self.head(y), state


def test_lstm_state_has_its_rows_in_the_middle() -> None:
    """h0 is [layers, rows, hidden] with as many layers as rows: only replay can tell the two apart."""
    captured = capture(LstmLm().eval(), (torch.randint(0, 11, (2, 5)), torch.randn(2, 2, 8), torch.randn(2, 2, 8)))
    assert captured.batch_dims == [0, 1, 1]
    graph = agrees(captured, torch.randint(0, 11, (4, 5)), torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    assert graph.sample_dims == {"in:0": 0, "in:1": 1, "in:2": 1, "out:0": 0, "out:1.0": 1, "out:1.1": 1}


# -- in-place writes -------------------------------------------------------------------------------------------------------
class Writes(nn.Module):
    """Every way of writing through views."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        match self.case:
            case "slice":
                y[:, 1:3] = x[:, :2] * 2
            case "select":
                y[:, 2] = 1.0
                y[:, -1] *= 3
            case "step":
                y[:, ::2] = 0.5
            case "view":
                y.view(-1, 2, 3)[:, 1].mul_(x[:, :3])
            case "transpose":
                y.t()[0].add_(5)
                y.permute(1, 0)[1:2].zero_()
            case "chunk":
                y = y.detach()  # torch forbids writes through several views at once under autograd
                a, b = y.chunk(2, dim=1)
                a.add_(b)
                b.relu_()
            case "unbind":
                y = y.detach()
                for i, row in enumerate(y.unbind(1)):
                    row.mul_(i)
            case "base after view":
                v = y[:, :3]
                y.mul_(2)
                return v + y[:, 3:]
            case "two views":
                a, b = y[:, :4], y[:, 2:]
                a.add_(1)
                b.mul_(2)
                return a.sum(1) + y.sum(1)
            case "clone":
                z = y.clone()
                z.add_(1)
                return y * z
            case "contiguous":
                z = y.t().contiguous()
                z.add_(1)
                return y + z.t()
            case "mask":
                y[x > 0] = 0.0
                y.masked_fill_(x < -1, 2.0)
            case "index_put":
                y[torch.arange(x.shape[0]), torch.zeros(x.shape[0], dtype=torch.long)] = x[:, 0]
            case "fill":
                z = torch.zeros_like(y)
                z.copy_(y)
                z[:, 0].fill_(3.0)
                return z + y
        return y


WRITES = ["slice", "select", "step", "view", "transpose", "chunk", "unbind", "base after view", "two views", "clone", "contiguous", "mask", "index_put", "fill"]


@pytest.mark.parametrize("case", WRITES)
def test_writes(case: str) -> None:
    x = torch.randn(3, 6)
    with contextlib.suppress(RuntimeError):
        Writes(case)(x).sum().backward()
    captured = capture(Writes(case), (x,))
    assert captured.opaque == [], captured.reasons
    assert captured.dynamic
    graph = agrees(captured, torch.randn(5, 6))
    assert all(not t.endswith("_") for t in targets(graph))


# -- buffers ---------------------------------------------------------------------------------------------------------------
class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.last = x.detach().sum(0)
        return x * self.mean


def test_buffer_writes() -> None:
    module = Counts()
    before = {n: b.clone() for n, b in module.named_buffers()}
    x = torch.randn(3, 4)
    random_state = torch.get_rng_state()
    captured = capture(module, (x,))
    for n, b in module.named_buffers():
        assert torch.equal(b, before[n])
    assert torch.equal(random_state, torch.get_rng_state())
    graph = agrees(captured, torch.randn(5, 4))
    assert sorted(n for n, _ in graph.buffer_writes) == ["last", "mean", "steps"]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm(momentum: float | None, train: bool) -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3, momentum=momentum))
    captured = capture(module, (torch.randn(4, 2, 6),), train=train)
    assert captured.opaque == [], captured.reasons
    for _ in range(2):
        graph = agrees(captured, torch.randn(5, 2, 6))
    assert len(graph.buffer_writes) == (3 if train else 0)


# -- custom gradients ------------------------------------------------------------------------------------------------------
class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x)
        return x * y, y + factor

    @staticmethod
    def backward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return 7 * a, x * b, None


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p, q = Scale.apply(self.a(x), self.b(x), 2.0)
        return RoundStraightThrough.apply(p) + q


def test_custom_function_keeps_its_gradient() -> None:
    captured = capture(Custom(), (torch.randn(3, 4, requires_grad=True),))
    assert captured.dynamic, captured.reasons
    graph = agrees(captured, torch.randn(5, 4))
    assert targets(graph).count("opaque") == 2
    assert targets(graph).count("linear") == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_is_transparent(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(lambda t: torch.tanh(self.b(t)), self.a(x), use_reentrant=reentrant)
            return y

    captured = capture(Checkpointed(), (torch.randn(3, 4),))
    assert captured.opaque == [], captured.reasons
    assert targets(agrees(captured, torch.randn(5, 4))) == ["linear", "linear", "tanh"]


# -- the lower rungs -------------------------------------------------------------------------------------------------------
class Branches(nn.Module):
    """A Python `if` on data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)) if x.sum() > -1e9 else x


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.random()


def around(child: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Linear(4, 4), child=child, last=nn.Linear(4, 2)))


def test_untraceable_child_is_opaque() -> None:
    captured = capture(around(Branches()), (torch.randn(4, 4),))
    assert captured.opaque == ["child"]
    assert any("test_capture.py" in r and "x.sum()" in r for r in captured.reasons), captured.reasons
    graph = agrees(captured, torch.randn(6, 4))
    assert names(graph) == ["first", "child", "last"]
    assert sorted(n for n, _ in graph.buffer_writes) == ["child.norm.num_batches_tracked", "child.norm.running_mean", "child.norm.running_var"]
    assert graph.sample_dims == {"in:0": 0, "out:0": 0}


def test_python_randomness_is_not_baked() -> None:
    module = around(Noisy())
    state = random.getstate()
    captured = capture(module, (torch.randn(3, 4),))
    assert random.getstate() == state
    assert captured.opaque == ["child"]
    assert not captured.exact
    x = torch.randn(3, 4)
    graph = captured.instantiate((x,))
    feeds = captured.stored_tensors(graph) | {"in:0": x}
    assert not torch.equal(run_graph(graph, feeds)[0][0], run_graph(graph, feeds)[0][0])


def test_a_buffer_that_the_first_forward_shapes_is_kept() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("table", torch.zeros(1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.table.shape[0] != x.shape[1]:
                self.table = torch.arange(x.shape[1], dtype=x.dtype)
            return self.linear(x + self.table)

    module = Positions()
    captured = capture(module, (torch.randn(3, 4),))
    assert captured.opaque == [] and captured.dynamic, captured.reasons
    assert module.table.shape == (4,)
    assert "linear" in targets(agrees(captured, torch.randn(6, 4)))


def test_whole_module_is_opaque() -> None:
    captured = capture(Branches(), (torch.randn(4, 4), torch.randn(4, 4)), loss=F.mse_loss)
    assert captured.opaque == [""]
    graph = agrees(captured, torch.randn(6, 4), torch.randn(6, 4))
    assert targets(graph) == ["opaque"]
    assert graph.sample_dims == {"in:0": 0, "in:1": 0, "out:0": None}


# -- structures ------------------------------------------------------------------------------------------------------------
@dataclass
class Point:
    value: torch.Tensor
    label: str = "p"


@dataclass
class ModelOutput(OrderedDict):  # as in HF: a dict of the fields that aren't None
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


def structured(kind: str) -> Callable[[torch.Tensor], Any]:
    return {
        "tuple": lambda y: (y, None, (y * 2, 3)),
        "dict": lambda y: {"a": y, "b": [y.mean(), "text"]},
        "dataclass": lambda y: Point(y),
        "model output": lambda y: ModelOutput(logits=y, hidden=(y, y.sum(0))),
    }[kind]


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.wrap = structured(kind)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None, double: bool = False) -> Any:
        y = self.linear(x)
        y = y if mask is None else y * mask
        return self.wrap(y * 2 if double else y)


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        ("tuple", {"out:0": 0, "out:2.0": 0}),
        ("dict", {"out:a": 0, "out:b.0": None}),
        ("dataclass", {"out:value": 0}),
        ("model output", {"out:logits": 0, "out:hidden.0": 0, "out:hidden.1": None}),
    ],
)
def test_structures(kind: str, outputs: dict[str, int | None]) -> None:
    captured = capture(Structured(kind), (torch.randn(2, 4),), {"mask": torch.ones(2, 1), "double": True})
    graph = agrees(captured, torch.randn(3, 4), torch.ones(3, 1))
    assert graph.sample_dims == {"in:0": 0, "in:mask": 0} | outputs
    assert captured.flatten_inputs((torch.ones(5, 4),), {"mask": torch.ones(5, 1), "double": True})[0].shape == (5, 4)
    with pytest.raises(ValueError, match="captured with True"):
        captured.flatten_inputs((torch.ones(5, 4),), {"mask": torch.ones(5, 1), "double": False})


# -- regions, devices, sizes -----------------------------------------------------------------------------------------------
class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.linear(x).sigmoid()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float() * scale


def test_regions_become_flags() -> None:
    captured = capture(Regions(), (torch.randn(2, 4),))
    graph = agrees(captured, torch.randn(3, 4), tolerance=1e-2)
    first, sigmoid, second = (n for n in graph.nodes if n.target in ("linear", "sigmoid"))
    assert first.no_grad and sigmoid.no_grad and not second.no_grad
    assert second.autocast == ("cpu", torch.bfloat16, True)
    assert first.autocast is None
    assert graph.values[second.outputs[0]].dtype == torch.bfloat16


def test_autocast_around_the_call() -> None:
    captured = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    assert captured.instantiate((x,)).values[-1].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = captured.instantiate((x,))
    assert graph.values[-1].dtype == torch.bfloat16
    assert run_graph(graph, captured.stored_tensors(graph) | {"in:0": x})[0][0].dtype == torch.bfloat16


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 16, 1 << 16), nn.ReLU())
    captured = capture(model, (torch.empty(2, 1 << 16, device="meta"),))
    assert not captured.checked
    assert any("meta" in r for r in captured.reasons)
    graph = captured.instantiate((torch.empty(8, 1 << 16, device="meta"),))
    assert names(graph) == ["0", "1"]
    assert graph.values[-1].shape == (8, 1 << 16)


class OnlyFour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + 1 if x.shape[0] == 4 else y - 1


def test_a_size_that_the_code_asks_for_is_captured_by_itself() -> None:
    captured = capture(OnlyFour(), (torch.randn(4, 4),))
    assert not captured.dynamic
    assert captured.reasons
    assert targets(agrees(captured, torch.randn(4, 4))) == ["linear", "add"]
    assert targets(agrees(captured, torch.randn(3, 4))) == ["linear", "sub"]


def test_one_example_row_and_mode_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[2].eval()
    captured = capture(model, (torch.randn(1, 4),))
    assert captured.dynamic
    assert [m.training for m in model.modules()] == [True, True, True, False, False]
    graph = agrees(captured, torch.randn(6, 4))
    assert [n.rng_index for n in graph.nodes if n.target == "dropout"] == [0, 1]
    assert [n.arg_names["train"] for n in graph.nodes if n.target == "dropout"] == [True, False]


def test_frozen_parameters_and_arguments_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 2))
    model[0].weight.requires_grad_(False)
    captured = capture(model, (torch.randn(2, 2, 7, 7),))
    graph = agrees(captured, torch.randn(3, 2, 7, 7))
    conv = next(n for n in graph.nodes if n.target == "conv2d")
    assert conv.arg_names["stride"] == [2, 2]
    assert conv.arg_names["padding"] == [0, 0]
    assert conv.arg_names["groups"] == 1
    assert "test_capture" not in conv.source
    weight = next(n for n in graph.nodes if n.name == "param:0.weight")
    assert not graph.values[weight.outputs[0]].requires_grad


def test_one_tensor_given_twice_is_two_inputs() -> None:
    """HF users pass labels=input_ids: a trace would read both from one."""
    x = torch.randn(2, 3)
    captured = capture(nn.Bilinear(3, 3, 2), (x, x))
    agrees(captured, torch.randn(4, 3), torch.randn(4, 3))


def test_loss_module_with_a_buffer() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    captured = capture(nn.Linear(4, 3), (torch.randn(2, 4), torch.tensor([0, 2])), loss=loss)
    graph = agrees(captured, torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
    assert [n.name for n in graph.of_kind("buffer")] == ["buffer:loss.weight"]


def test_another_length_is_another_trace() -> None:
    """Only rows are dynamic; what a trace has baked for one length never serves another."""
    captured = capture(Gpt().eval(), (torch.randint(0, 17, (3, 12)),))
    for rows, length in ((2, 7), (5, 7), (4, 12), (1, 9)):
        graph = agrees(captured, torch.randint(0, 17, (rows, length)))
        assert graph.values[-1].shape[:2] == (rows, length)
    assert len(captured.traces) == 3


def test_rows_must_agree() -> None:
    captured = capture(nn.Linear(4, 3), (torch.randn(2, 4), torch.tensor([0, 2])), loss=cross_entropy)
    with pytest.raises(ValueError, match="different numbers of rows"):
        captured.instantiate((torch.randn(3, 4), torch.tensor([0, 2])))


def test_parametrizations_are_traced() -> None:
    """spectral_norm writes its vectors with `out=`."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)))
    captured = capture(model, (torch.randn(3, 4),))
    assert captured.opaque == [], captured.reasons
    graph = agrees(captured, torch.randn(6, 4))
    assert sorted(n.rpartition(".")[2] for n, _ in graph.buffer_writes) == ["_u", "_v"]


def test_what_cannot_be_repeated_is_opaque_and_runs() -> None:
    class Clock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    captured = capture(Clock(), (torch.randn(3, 4),))
    assert captured.opaque == [""]
    assert not captured.checked
    assert captured.instantiate((torch.randn(3, 4),)).values[-1].shape == (3, 4)


def test_randomness_in_an_opaque_child_is_told_and_counted() -> None:
    class Drops(Branches):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.5)

    class Inactive(Branches):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.0)

    captured = capture(around(Inactive()), (torch.randn(4, 4),))
    assert captured.opaque == ["child"] and captured.exact, captured.reasons
    captured = capture(nn.Sequential(nn.Dropout(0.1), around(Drops()), nn.Dropout(0.2)), (torch.randn(4, 4),))
    assert captured.opaque == ["1.child"]
    assert not captured.exact
    assert any("draws random numbers" in r for r in captured.reasons), captured.reasons
    graph = captured.instantiate(captured.inputs)
    assert [n.rng_index for n in graph.nodes if n.target == "dropout"] == [0, 2]
    assert [n.arg_names["random"] for n in graph.nodes if n.target == "opaque"] == [True]
    assert capture(around(Branches()), (torch.randn(4, 4),)).exact
