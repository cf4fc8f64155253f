"""Counter-based random numbers: known answers, tiles of the whole, statistics, a plain module against its graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_soap import random
from torch_soap.random import CounterState, RandomKey
from torch_soap.random_ops import RANDOM_KERNELS, counter_rng, is_random

KEY = RandomKey(seed=2**64 - 5, call=3, op_index=7)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- numbers ---


def test_known_answers() -> None:
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # philox4x32-10 of counter 0, key 0
    key = RandomKey(0, 0, 0)
    assert random.rand([4], key=key).tolist() == [(w >> 8) / 2**24 for w in words]
    assert random.rand([4], dtype=torch.bfloat16, key=key).tolist() == [(w >> 24) / 2**8 for w in words]
    assert random.rand([4], dtype=torch.float16, key=key).tolist() == [(w >> 21) / 2**11 for w in words]
    assert torch.equal((random.rand([4], dtype=torch.float64, key=key) * 2**32).long(), torch.tensor(words))
    assert random.randint(-5, 995, [4], key=key).tolist() == [(w * 1000 >> 32) - 5 for w in words]
    assert random.bernoulli(torch.empty(4), words[2] / 2**32, key=key).tolist() == [1, 0, 0, 1]


DRAWS: dict[str, Callable[..., torch.Tensor]] = {
    "uniform": lambda sizes, **w: random.rand(sizes, **w),
    "uniform64": lambda sizes, **w: random.rand(sizes, dtype=torch.float64, **w),
    "normal": lambda sizes, **w: random.randn(sizes, **w),
    "bernoulli": lambda sizes, **w: random._draw("counter_bernoulli", 0.3, sizes=sizes, dtype=torch.bool, **w),
    "randint": lambda sizes, **w: random.randint(-3, 2**40, sizes, **w),
}


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[int], list[list[list[tuple[int, int]]]]]:
    """Sizes, and for each dim an ordered partition into index sets, in any order of runs."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    parts = []
    for size in sizes:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        runs = draw(st.permutations(list(itertools.pairwise(cuts))))
        owners = draw(st.lists(st.integers(0, 2), min_size=len(runs), max_size=len(runs)))
        parts.append([[r for r, o in zip(runs, owners, strict=True) if o == owner] for owner in range(3)])
    return sizes, parts


@pytest.mark.parametrize("name", DRAWS)
@settings(max_examples=60, deadline=None)
@given(tiling=tilings(), data=st.data())
def test_a_tile_is_its_part_of_the_whole(name: str, tiling: Any, data: st.DataObject) -> None:
    sizes, parts = tiling
    whole = DRAWS[name](sizes, key=KEY)
    assert list(whole.shape) == sizes
    tile = [data.draw(st.sampled_from(p)) for p in parts]
    expected = whole
    for d, runs in enumerate(tile):
        expected = expected.index_select(d, torch.tensor([i for b, e in runs for i in range(b, e)], dtype=torch.int64))
    assert torch.equal(DRAWS[name](sizes, key=KEY, tile=tile, global_sizes=sizes), expected)


@pytest.mark.parametrize("name", DRAWS)
def test_large_tiles_and_threads(name: str) -> None:
    sizes = [3, 70001, 2]
    whole = DRAWS[name](sizes, key=KEY)
    torch.set_num_threads(2)
    tile = [[(0, 3)], [(5, 40003), (60000, 70001)], [(1, 2)]]
    expected = torch.cat([whole[:, 5:40003, 1:], whole[:, 60000:, 1:]], 1)
    assert torch.equal(DRAWS[name](sizes, key=KEY, tile=tile, global_sizes=sizes), expected)


@pytest.mark.parametrize("name", DRAWS)
def test_every_part_of_the_key_counts(name: str) -> None:
    base = DRAWS[name]([64], key=KEY)
    assert torch.equal(base, DRAWS[name]([64], key=KEY))
    for other in (RandomKey(1, 3, 7), RandomKey(KEY.seed, 4, 7), RandomKey(KEY.seed, 3, 8), RandomKey(KEY.seed, 7, 3)):
        assert not torch.equal(base, DRAWS[name]([64], key=other))


def test_statistics() -> None:
    n = 1 << 18
    sigma = 6 / math.sqrt(n)
    for dtype in (torch.float32, torch.float64):
        u = random.rand([n], dtype=dtype, key=KEY).double()
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 0.3 * sigma and abs(u.var() - 1 / 12) < 0.1 * sigma
        counts = torch.histc(u, 256, 0, 1)
        assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 6 * math.sqrt(2 * 255)
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < sigma
        z = random.randn([n], dtype=dtype, key=KEY).double()
        assert abs(z.mean()) < sigma and abs(z.var() - 1) < 1.5 * sigma and abs((z**4).mean() - 3) < 10 * sigma
        assert abs((z[0::2] * z[1::2]).mean()) < 1.5 * sigma  # the two of a Box-Muller pair
    for p in (0.0, 0.1, 0.5, 1.0):
        assert abs(random.bernoulli(torch.empty(n), p, key=KEY).mean() - p) <= math.sqrt(p * (1 - p)) * sigma
    dice = torch.bincount(random.randint(0, 6, [n], key=KEY), minlength=6)
    assert dice.numel() == 6 and ((dice - n / 6) ** 2 / (n / 6)).sum() < 40
    mean = torch.stack([random.rand([64], key=RandomKey(0, call, 0)) for call in range(4096)]).mean(0)
    assert (mean - 0.5).abs().max() < 0.3 * 6 / 64


def test_dtypes_agree() -> None:
    u = random.rand([1000], dtype=torch.float64, key=KEY)
    for dtype, bits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        assert torch.equal(random.rand([1000], dtype=dtype, key=KEY).double(), (u * 2**bits).floor() / 2**bits)
    z = random.randn([1000], dtype=torch.float64, key=KEY)
    assert torch.equal(random.randn([1000], key=KEY), z.float())
    masks = [random.bernoulli(torch.empty(1000, dtype=d), 0.3, key=KEY).bool() for d in (torch.float64, torch.float16)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(random.bernoulli(torch.empty(1000), torch.full((1000,), 0.3, dtype=torch.float64), key=KEY).bool(), masks[0])


def test_fake_and_meta_tensors_have_the_shape() -> None:
    assert random.rand([4, 5], device="meta", key=KEY, tile=[[(0, 1), (3, 4)], [(2, 5)]], global_sizes=[4, 5]).shape == (2, 3)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 5)
        assert random.dropout(x, 0.5, True, key=KEY).shape == (4, 5)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match=r"run \[2,6\) of dim 0 leaves \[0,5\)"):
        random.rand([5], key=KEY, tile=[[(2, 6)]], global_sizes=[5])
    with pytest.raises(ValueError, match="low < high"):
        random.randint(3, 3, [5], key=KEY)
    with pytest.raises(ValueError, match="between 0 and 1"):
        random.dropout(torch.ones(3), 1.5, True, key=KEY)
    with pytest.raises(RuntimeError, match=r"shape \[1, 5\], its tensor \[5, 5\]"):
        random.dropout(torch.ones(5, 5), 0.5, True, key=KEY, tile=[[(0, 1)], [(0, 5)]], global_sizes=[9, 5])


# --- operators ---


@pytest.mark.parametrize("fn", [random.dropout, random.alpha_dropout, random.feature_dropout, random.feature_alpha_dropout])
def test_dropout_keeps_moments_and_cuts(fn: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(64, 48, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = fn(x, 0.3, True, key=KEY)
    assert abs(y.mean()) < 0.1
    if "alpha" in fn.__name__:
        assert abs(y.var() - 1) < 0.1
    runs = [[(3, 9), (40, 64)], [(0, 1), (7, 48)], [(0, 4)]]
    part = torch.cat([torch.cat([t[3:9], t[40:]]) for t in (x[:, :1], x[:, 7:])], 1)
    expected = torch.cat([torch.cat([t[3:9], t[40:]]) for t in (y[:, :1], y[:, 7:])], 1)
    assert torch.equal(fn(part, 0.3, True, key=KEY, tile=runs, global_sizes=x.shape), expected)
    assert fn(x, 0.3, False, key=KEY) is x and fn(x, 0.0, True, key=KEY) is x
    assert not fn(x, 1.0, True, key=KEY).any()
    if "feature" in fn.__name__:
        dropped = y == y[:, :, :1]
        assert torch.equal(dropped.all(-1), dropped[:, :, 1])  # a channel is dropped as a whole


def test_attention_dropout_by_heads_and_causal_rows() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sizes = [2, 4, 6, 6]
    whole = random.scaled_dot_product_attention(q, k, v, None, 0.4, True, key=KEY)
    tile = [[(0, 2)], [(1, 3)], [(2, 3), (5, 6)], [(0, 6)]]
    part = random.scaled_dot_product_attention(q[:, 1:3, [2, 5]], k[:, 1:3], v[:, 1:3], None, 0.4, True, key=KEY, tile=tile, global_sizes=sizes)
    torch.testing.assert_close(part, whole[:, 1:3, [2, 5]], rtol=1e-12, atol=1e-12)
    assert random.scaled_dot_product_attention(q, k, v, key=KEY) is NotImplemented
    # With a tiny p nothing is dropped: torch's own attention is the reference, for masks, biases, scale, groups.
    grouped = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    seen = torch.rand(6, 6) < 0.6
    seen[3] = False
    for mask in (None, seen, torch.randn(2, 1, 6, 6, dtype=torch.float64)):
        expected = F.scaled_dot_product_attention(q, grouped, grouped, mask, scale=0.3, enable_gqa=True)
        actual = random.scaled_dot_product_attention(q, grouped, grouped, mask, 1e-14, scale=0.3, enable_gqa=True, key=KEY)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers_have_dropout_between_them(make: Any, batch_first: bool) -> None:
    stack = make(5, 4, 3, dropout=0.5, bidirectional=True, batch_first=batch_first).double()
    x = torch.randn(7, 2, 5, dtype=torch.float64)
    with counter_rng(stack, seed=1):
        actual, _ = stack(x.transpose(0, 1) if batch_first else x)
    h = x
    for layer in range(3):
        one = make(h.shape[-1], 4, 1, bidirectional=True).double()
        names = [f"{kind}_l{{}}{side}" for side in ("", "_reverse") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        one.load_state_dict({name.format(0): stack.state_dict()[name.format(layer)] for name in names})
        h = one(h)[0]
        if layer < 2:
            tile = [[(layer, layer + 1)], [(0, 7)], [(0, 2)], [(0, 8)]]
            h = random.dropout(h[None], 0.5, True, key=RandomKey(1, 1, 0), tile=tile, global_sizes=[2, 7, 2, 8])[0]
    torch.testing.assert_close(actual.transpose(0, 1) if batch_first else actual, h)


def test_packed_sequences() -> None:
    lstm = nn.LSTM(3, 4, 2, dropout=0.5)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    with counter_rng(lstm, seed=1):
        first, (h, c) = lstm(packed)
        assert h.shape == c.shape == (2, 2, 4)
        assert not torch.equal(first.data, lstm(packed)[0].data)
    first.data.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lstm.parameters())


# --- the plain module and its graph ---


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.0), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2)])
        self.channels = nn.ModuleList([nn.Dropout1d(0.3), nn.Dropout2d(0.3), nn.Dropout3d(0.3, inplace=True)])
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.4, batch_first=True)
        self.gru = nn.GRU(8, 8, 2, dropout=0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for drop in self.drops:
            x = drop(x)
        y = x
        for i, drop in enumerate(self.channels):
            y = y + drop(x[(..., *[None] * i)] + 0).reshape(x.shape)
        torch.rand(2)  # unused, and still a draw
        y = y + torch.rand_like(x) + torch.randn(x.shape) + torch.rand(8) + torch.randint(0, 5, x.shape) + torch.randint(5, (8,))
        y = y + torch.bernoulli(torch.sigmoid(x)) + torch.bernoulli(x.detach(), 0.3) + torch.empty_like(x).bernoulli_(0.3)
        y = y + torch.empty_like(x).bernoulli_(torch.sigmoid(x)) + torch.randn_like(x) + torch.randint_like(x, 3)
        y = y + torch.normal(0.0, 1.0, x.shape) + torch.empty_like(x).uniform_(-1, 1) + torch.normal(x.detach(), 2.0)
        y = y + F.gumbel_softmax(x) + F.rrelu(x, training=self.training) + torchvision.ops.stochastic_depth(x, 0.5, "row", self.training)
        y = y + self.attention(y, y, y)[0] + self.attention(y, y, y, need_weights=False)[0] + self.gru(y)[0]
        y = y + F.scaled_dot_product_attention(y, y, y, dropout_p=0.2 * self.training)
        return F.dropout(self.lstm(y)[0], training=self.training)


def run_graph(program: torch.export.ExportedProgram, state: CounterState, *args: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The captured graph with our draws: the n-th random operator of the graph has op_index n."""
    draws = 0

    class Run(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            nonlocal draws
            if not is_random(target):
                return super().call_function(target, args, kwargs)
            result = RANDOM_KERNELS[target](*args, key=state.key(draws), **kwargs)
            draws += 1
            return super().call_function(target, args, kwargs) if result is NotImplemented else result

    state.next_call()
    return Run(program.module()).run(*args), draws


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_graph_and_module_draw_alike(train: bool, grad: bool) -> None:
    torch.manual_seed(5)
    model, x = Everything().train(train), torch.rand(2, 3, 8, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), strict=False)
        state = CounterState(seed=11)
        with counter_rng(model, seed=11) as rng:
            for _ in range(2):
                eager = model(x)
                graph, draws = run_graph(program, state, x)
                assert draws == rng.op_index > 25
                assert torch.equal(eager, graph)
                if grad:
                    leaves = [x, *model.parameters()]
                    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (eager, graph)]
                    torch.testing.assert_close(*grads)
        assert state.call == rng.state.call == 2


@pytest.mark.filterwarnings("ignore")
def test_inactive_operators_take_an_index() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    counts = set()
    for train in (True, False):
        for grad in (True, False):
            model.train(train)
            with torch.set_grad_enabled(grad), counter_rng(model) as rng:
                model(torch.rand(2, 3, 8))
                counts.add(rng.op_index)
    assert counts == {2 + 1 + 3}  # two dropouts; attention, and the layer's three


def test_the_gradient_goes_through_the_same_mask() -> None:
    x = torch.ones(50, requires_grad=True)
    with counter_rng(seed=0) as rng:
        rng.next_call()
        y = F.dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and set(y.tolist()) == {0.0, 2.0}


def test_only_forwards_of_the_module_are_counted() -> None:
    model, x = nn.Dropout(0.5), torch.ones(100)
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    with counter_rng(model) as rng:
        a, b = model(x), model(x)
        assert torch.equal(torch.rand(5), expected)  # torch's generator, not touched by the model
        assert not torch.equal(a, b) and rng.state.call == 2
        saved = rng.state.state_dict()
        c = model(x)
        rng.state.load_state_dict(saved)
        assert torch.equal(model(x), c)
        torch.manual_seed(1)
        d = model(x)
        assert rng.state.state_dict() == {"seed": 1, "call": 1} and not torch.equal(a, d)
        rng.state.restart(0)
        assert torch.equal(model(x), a)
    torch.manual_seed(0)
    assert torch.equal(F.dropout(x), (F.dropout(x), torch.manual_seed(0), F.dropout(x))[2])  # torch's own again
    with counter_rng(model), pytest.raises(TypeError):
        model(None)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_what_it_cannot_follow_is_told() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.rrelu_with_noise.default(x, torch.empty_like(x), 0.1, 0.3, True)

    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(F.dropout, x, 0.5, self.training, use_reentrant=False)

    noisy, checkpointed = Noisy(), Checkpointed()
    with counter_rng(noisy), pytest.raises(NotImplementedError, match="rrelu_with_noise"):
        noisy(torch.rand(3))
    for module in (checkpointed, None):
        with counter_rng(module), pytest.raises(RuntimeError, match="activation checkpointing"):
            checkpointed(torch.rand(3, requires_grad=True)).sum().backward()

    with counter_rng(checkpointed.eval()):  # recomputing what draws nothing is fine
        checkpointed(torch.rand(3, requires_grad=True)).sum().backward()


def test_an_explicit_generator_stays_the_users() -> None:
    x = torch.empty(20)
    expected = x.clone().bernoulli_(0.5, generator=torch.Generator().manual_seed(3))
    with counter_rng(seed=0) as rng:
        assert torch.equal(x.clone().bernoulli_(0.5, generator=torch.Generator().manual_seed(3)), expected)
        assert rng.op_index == 0
