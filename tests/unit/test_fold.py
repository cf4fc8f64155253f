"""Folding: the capture of a model with repeated modules is, node by node and value by value, the one without folding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer

from examples.gpt import GPT
from examples.llama import Llama, Sizes
from torch_soap.capture import Captured, Graph, capture
from torch_soap.capture.opaque import FunctionCall
from torch_soap.capture.signature import scaled, signature_of
from torch_soap.plan import fingerprint
from torch_soap.rewrite.graph_import import to_op_graph


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def graphs(captured: Captured) -> list[Graph]:
    """At the example's rows and at other ones."""
    base = signature_of(captured.inputs)
    others = [scaled(base, captured.batch_dims, f) for f in (3, 5)] if captured.dynamic else []
    return [captured.instantiate(s) for s in (base, *others)]


def both(make: Callable[[], nn.Module], *inputs: torch.Tensor, loss: Any = None) -> Captured:
    """Captures with and without folding, of two modules alike, and compares them; gives the one with folding."""
    folded, whole = (capture(make(), inputs, loss=loss, check=False, fold=fold) for fold in (True, False))
    assert (folded.dynamic, folded.batch_dims, folded.opaque, folded.reasons) == (whole.dynamic, whole.batch_dims, whole.opaque, whole.reasons)
    for a, b in zip(graphs(folded), graphs(whole), strict=True):
        assert len(a.nodes) == len(b.nodes)
        for mine, other in zip(a.nodes, b.nodes, strict=True):
            if isinstance(mine.fn, FunctionCall):
                mine.fn = other.fn = None
            assert mine == other
        assert a.values == b.values
        assert fingerprint(to_op_graph(a)) == fingerprint(to_op_graph(b))
    assert folded.output_names() == whole.output_names()
    return folded


def copies(captured: Captured) -> int:
    """How many calls were folded."""
    return captured.folding.folded if captured.folding is not None and captured.fold != "none" else 0


class Block(nn.Module):
    """x + down(act(up(norm(x)))), with what `trap` does differently."""

    def __init__(self, index: int, trap: str = "") -> None:
        super().__init__()
        self.index = index
        self.trap = trap
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.up(self.norm(x))
        b, _ = x.shape
        y = F.gelu(y).view(b, 2, 8).transpose(1, 2).reshape(b, 16)
        return x + self.drop(self.down(y))


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module], around: Callable[[nn.Module, torch.Tensor], Any] = lambda block, x: block(x)) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)
        self.around = around
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.around(block, x)
        return self.last(x)


def stack(kind: type[nn.Module], count: int = 4, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Stack([kind(i) for i in range(count)], **options)


X = torch.randn(4, 8)


def tiny_llama() -> nn.Module:
    with torch.device("meta"):
        return Llama(Sizes(5, 32, 96, 4, 2, 128), 16).to(torch.bfloat16)


def test_llama() -> None:
    tokens = torch.zeros(4, 16, dtype=torch.long, device="meta")
    assert copies(both(tiny_llama, tokens, tokens)) == 4


def test_gpt() -> None:
    tokens = torch.zeros(4, 16, dtype=torch.long)
    assert copies(both(lambda: GPT(64, layers=4, hidden=32, heads=2, context=16), tokens)) == 3


def test_vision_transformer() -> None:
    """The first layer's input has other strides than the others'."""

    def make() -> nn.Module:
        return VisionTransformer(image_size=16, patch_size=8, num_layers=4, num_heads=4, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=10)

    assert copies(both(make, torch.randn(4, 3, 16, 16))) == 2


def test_encoder_layers() -> None:
    """The first layer's input needs no gradient."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert copies(both(lambda: nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(4, 6, 16))) == 1


def test_dropout_is_numbered_through_the_copies() -> None:
    captured = both(stack(Block), X)
    assert copies(captured) == 3
    assert [n.rng_index for n in graphs(captured)[0].nodes if n.rng_index is not None] == [0, 1, 2, 3]


def test_one_block_called_again_is_folded_too() -> None:
    class Recurrent(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.blocks[0](self.blocks[1](x)))

    assert copies(both(lambda: Recurrent([Block(0), Block(1)]), torch.randn(4, 8))) == 2


def test_frozen_first_layer_leads_apart() -> None:
    """The first block's input needs no gradient, the others' do: two leaders."""

    def make() -> nn.Module:
        model = Stack([Block(i) for i in range(4)])
        model.first.requires_grad_(False)
        return model

    assert copies(both(make, X)) == 2


def test_checked_against_eager() -> None:
    captured = capture(Stack([Block(i) for i in range(3)]).eval(), (X,))
    assert captured.checked and captured.dynamic and copies(captured) == 2


class LayerIndex(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * self.index


class Alternating(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index % 2)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x.flip(1) if self.index else x)


def test_places_that_matter_split_the_groups() -> None:
    assert copies(both(stack(LayerIndex), X)) == 0
    captured = both(stack(Alternating), X)
    assert (captured.fold, copies(captured)) == ("alike", 2)


def test_places_that_are_not_used_do_not() -> None:
    assert both(stack(Block), X).fold == "alike"


def test_other_attributes_are_compared_at_once() -> None:
    captured = both(lambda: Stack([Block(i, trap=str(i % 2)) for i in range(4)]), X)
    assert (captured.fold, copies(captured)) == ("alike", 2)


class DropPath(Block):
    def forward(self, x: torch.Tensor) -> Any:
        keep = 1 - 0.1 * self.index
        return x + super().forward(x) * x.new_empty(x.shape[0], 1).bernoulli_(keep) / keep


class Pair(Block):
    """Returns a tuple, of which one member is what it was given."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), {"given": x, "none": None}


class SharedTensor(Stack):
    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(4)])
        self.blocks[2].up.weight = self.blocks[0].up.weight  # type: ignore[union-attr]


class SharedModule(Stack):
    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(4)])
        self.blocks[1].norm = self.blocks[0].norm


class Counter(Block):
    """A buffer that each call writes."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(x) * self.calls


class Normed(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.norm = nn.BatchNorm1d(8)  # type: ignore[assignment]


class Made(Block):
    """A constant that each call makes."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * torch.tensor([2.0])


class NoGrad(Block):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale = x.abs().amax()
        return super().forward(x / scale)


class WritesInput(Block):
    def forward(self, x: torch.Tensor) -> Any:
        x.add_(1)
        return super().forward(x)


class InPlaceInside(Block):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        y[:, :2] *= 2
        return y.relu_()


class ViewOut(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).view(-1, 2, 4).transpose(1, 2).flatten(1)


class ViewOfInput(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x.view(-1, 2, 4)


class Caches(Block):
    """The first call's result is kept by all, and used instead of one's own."""

    kept: dict[str, torch.Tensor]

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.kept.setdefault("y", super().forward(x))


class Keeps(Block):
    def forward(self, x: torch.Tensor) -> Any:
        self.last = super().forward(x)
        return self.last


class Catches(Block):
    """One block asks for something else, and hides that it was refused."""

    def forward(self, x: torch.Tensor) -> Any:
        with contextlib.suppress(RuntimeError):
            if self.index == 2:
                x = x.sin()
        return super().forward(x)


class ManyHooks(Stack):
    """A hook on a block, and one on a module inside another."""

    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(5)])
        self.blocks[1].register_forward_hook(lambda _m, _a, y: y * 2)
        self.blocks[3].norm.register_forward_pre_hook(lambda _m, a: (a[0] + 1,))  # type: ignore[union-attr]


class HookOnBlock(Stack):
    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(4)])
        self.blocks[1].register_forward_hook(lambda _m, _a, y: y * 2)


class OwnForward(Stack):
    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(4)])
        self.blocks[2].forward = lambda x: x + self.blocks[2].down(F.relu(self.blocks[2].up(x)))  # type: ignore[method-assign,assignment,operator]


class OneInEval(Stack):
    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(4)])
        self.train()
        self.blocks[1].eval()


class OtherWidth(Stack):
    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(4)])
        self.blocks[2].up, self.blocks[2].down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8)


SCALES: dict[int, float] = {}


class Global(Block):
    """What one block does differently is told by no attribute."""

    def __init__(self, index: int) -> None:
        super().__init__(0)
        SCALES[id(self)] = 1.0 + (index == 2)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * SCALES[id(self)]


class Chooses(Block):
    """One of two modules that ask torch for the same: the operators are named after it."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.even, self.odd = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward((self.odd if self.index % 2 else self.even)(x))


class SameForward(Stack):
    """One block's forward is another function, which computes the same."""

    def __init__(self) -> None:
        super().__init__([Block(i) for i in range(4)])
        block = self.blocks[2]
        block.forward = lambda x: Block.forward(block, x)  # type: ignore[method-assign,assignment,arg-type]


CALLS = 0


class Counts(Block):
    """The third call of any block is another one."""

    def forward(self, x: torch.Tensor) -> Any:
        global CALLS
        CALLS += 1
        return super().forward(x) * (2.0 if CALLS == 3 else 1.0)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class Custom(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(Square.apply(x))


def caches() -> nn.Module:
    kept: dict[str, torch.Tensor] = {}
    model = Stack([Caches(i) for i in range(3)])
    for block in model.blocks:
        block.kept = kept  # type: ignore[assignment]
    return model


def appended() -> nn.Module:
    """Blocks that give their output to a list, too."""

    class Collects(Block):
        def forward(self, x: torch.Tensor, into: list[torch.Tensor]) -> Any:  # type: ignore[override]
            y = super().forward(x)
            into.append(y)
            return y

    class Collected(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            into: list[torch.Tensor] = []
            for block in self.blocks:
                x = block(x, into)
            return self.last(torch.stack(into).sum(0))

    return Collected([Collects(i) for i in range(4)])


def outer() -> nn.Module:
    """Blocks that use a parameter of the model's without having it."""

    class Uses(Block):
        def __init__(self, index: int, bias: list[torch.Tensor]) -> None:
            super().__init__(index)
            self.bias = bias

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) + self.bias[0]

    class Has(Stack):
        def __init__(self, holder: list[torch.Tensor]) -> None:
            super().__init__([Uses(i, holder) for i in range(4)])
            self.holder = holder
            self.bias = nn.Parameter(torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.holder[:] = [self.bias]
            return super().forward(x)

    return Has([])


# (module, folded calls): where it isn't told to be alike, none.
TRAPS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "drop path": (stack(DropPath), 0),
    "a tuple": (stack(Pair, around=lambda block, x: block(x)[0]), 3),
    "a shared tensor": (SharedTensor, 1),
    "a shared module": (SharedModule, 0),
    "a buffer written": (stack(Counter), 0),
    "statistics written": (stack(Normed), 0),
    "a constant made": (stack(Made), 0),
    "no_grad inside": (stack(NoGrad), 0),
    "writes its input": (stack(WritesInput, around=lambda block, x: block(x * 1)), 0),
    "writes inside": (stack(InPlaceInside), 3),
    "gives a view": (stack(ViewOut), 3),
    "gives a view of its input": (stack(ViewOfInput, around=lambda block, x: block(x)[0] + block(x)[1].flatten(1)), 0),
    "its output is written": (stack(Block, around=lambda block, x: block(x).mul_(2)), 0),
    "a cache": (caches, 0),
    "keeps its result": (stack(Keeps), 0),
    "another call, caught": (stack(Catches), 0),
    "a hook on a block": (HookOnBlock, 3),
    "a hook in a block": (ManyHooks, 0),
    "a forward of its own": (OwnForward, 0),
    "the same forward": (SameForward, 3),
    "another module inside": (stack(Chooses), 0),
    "a mode of its own": (OneInEval, 2),
    "another bias": (OtherWidth, 2),
    "a global": (stack(Global), 0),
    "a custom function": (stack(Custom), 0),
    "a list appended": (appended, 0),
    "an outer parameter": (outer, 3),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str) -> None:
    make, folded = TRAPS[name]
    assert copies(both(make, X)) == folded


def test_calls_counted_in_a_global() -> None:
    """A trace that is given up leaves the count as it was."""
    global CALLS
    targets = []
    for fold in (True, False):
        CALLS = 0
        captured = capture(stack(Counts)(), (X,), check=False, fold=fold)
        targets.append([(n.target, n.args) for n in graphs(captured)[0].nodes])
        assert copies(captured) == 0
    assert targets[0] == targets[1]
