"""The export isn't shown the parameters of copies: a model that needs them there is captured as if it were, and folded all the same."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_fold import Block, Stack, X, both, copies


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Plain(Stack):
    """Nobody but the copies reads their parameters."""


class Penalty(Stack):
    """Adds a sum over all parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(p.square().sum() for p in self.parameters())


class ReadsCopy(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.blocks[2].up.weight.detach()  # type: ignore[union-attr]
        return super().forward(x) + weight.sum()


class Backwards(Stack):
    """The last block is the first that is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in reversed(self.blocks):  # type: ignore[call-overload]
            x = block(x)
        return x


@pytest.mark.parametrize(("kind", "hides"), [(Plain, True), (Penalty, False), (ReadsCopy, False), (Backwards, False)])
def test_hidden_parameters(kind: type[Stack], hides: bool) -> None:
    captured = both(lambda: kind([Block(i) for i in range(4)]), X)
    assert copies(captured) == 3
    assert captured.hides == hides
    assert [n for n, _ in captured.module.named_parameters()] == [n for n, _ in kind([Block(i) for i in range(4)]).named_parameters()]


def test_the_export_does_not_have_them() -> None:
    captured = both(lambda: Plain([Block(i) for i in range(4)]), X)
    (trace,) = captured.traces.values()
    shown = [s.target for s in trace.program.graph_signature.input_specs if s.kind.name == "PARAMETER"]
    assert len(trace.parameters) - len(shown) == 3 * 6
