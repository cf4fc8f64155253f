"""ATen's random operators in terms of torch_soap.random: one table for the captured graph and for the plain module.

`RANDOM_KERNELS[overload](*args, key=..., tile=..., global_sizes=..., **kwargs)` takes the operator's own arguments.
`counter_rng` puts the table under a plain module, at torch's dispatcher, so that it also sees what C++ draws. An
operator that comes by there is a node of the exported graph, in the same order, so both count op_index alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import torch

from torch_soap import random
from torch_soap.random import CounterState, RandomKey

aten = torch.ops.aten
GENERATOR = threading.RLock()  # torch's own generator has one user at a time


def _options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A factory's keyword arguments, less those that don't change values."""
    return {k: v for k, v in kwargs.items() if k not in ("layout", "pin_memory", "memory_format", "requires_grad")}


def _factory(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: fn(*args, **_options(kwargs))


def _inplace(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fill(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = fn(x, *args, **kwargs)
        return x if result is x else x.copy_(result)

    return fill


def _uniform(x: torch.Tensor, low: float = 0.0, high: float = 1.0, **where: Any) -> torch.Tensor:
    unit: torch.Tensor = random.rand_like(x, **where)
    return unit * (high - low) + low


def _normal(x: torch.Tensor, mean: Any = 0.0, std: Any = 1.0, **where: Any) -> torch.Tensor:
    standard: torch.Tensor = random.randn_like(x, **where)
    return standard * std + mean


def _normal_of(mean: Any, std: Any = 1.0, **where: Any) -> torch.Tensor:
    shape = torch.broadcast_shapes(*(t.shape for t in (mean, std) if isinstance(t, torch.Tensor)))
    like = mean if isinstance(mean, torch.Tensor) else std
    return _normal(like.new_empty(shape), mean, std, **where)


def _exponential(x: torch.Tensor, rate: float = 1.0, **where: Any) -> torch.Tensor:
    unit = random.rand_like(x, dtype=torch.float64, **where)
    return torch.log1p(-unit).div(-rate).to(x.dtype)


def _rrelu(x: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, **where: Any) -> Any:
    if not training:
        return NotImplemented
    return torch.where(x <= 0, x * _uniform(x.detach(), lower, upper, **where), x)


def _rnn_input(op: Any) -> Callable[..., Any]:
    def run(x: Any, hx: Any, *args: Any, key: RandomKey, **kwargs: Any) -> Any:
        return random.rnn(op, x, None, [hx] if isinstance(hx, torch.Tensor) else hx, *args, key=key, **kwargs)

    return run


def _rnn_data(op: Any) -> Callable[..., Any]:
    def run(x: Any, batch_sizes: Any, hx: Any, *args: Any, key: RandomKey, **kwargs: Any) -> Any:
        return random.rnn(op, x, batch_sizes, [hx] if isinstance(hx, torch.Tensor) else hx, *args, key=key, **kwargs)

    return run


def _seeded(op: Any) -> Callable[..., Any]:
    def run(*args: Any, key: RandomKey, **kwargs: Any) -> Any:
        with GENERATOR, torch.random.fork_rng(devices=[]):
            torch.manual_seed(((key.seed * 1_000_003 + key.call) * 1_000_003 + key.op_index) % 2**63)
            return op(*args, **kwargs)

    return run


# Composed of other operators in torch, with a gradient through autograd: replaced above autograd.
COMPOSITE: dict[Any, Callable[..., Any]] = {
    aten.dropout.default: random.dropout,
    aten.dropout_.default: _inplace(random.dropout),
    aten.feature_dropout.default: random.feature_dropout,
    aten.feature_dropout_.default: _inplace(random.feature_dropout),
    aten.alpha_dropout.default: random.alpha_dropout,
    aten.alpha_dropout_.default: _inplace(random.alpha_dropout),
    aten.feature_alpha_dropout.default: random.feature_alpha_dropout,
    aten.feature_alpha_dropout_.default: _inplace(random.feature_alpha_dropout),
    aten.scaled_dot_product_attention.default: random.scaled_dot_product_attention,
    aten.rrelu.default: _rrelu,
    **{op.input: _rnn_input(op.input) for op in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)},
    **{op.data: _rnn_data(op.data) for op in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)},
}

# Replaced below autograd, which gives their arguments zero gradients or none.
DRAWS: dict[Any, Callable[..., Any]] = {
    aten.bernoulli.default: lambda p, **where: random.bernoulli(p, p, **where),
    aten.bernoulli.p: random.bernoulli,
    aten.bernoulli_.float: _inplace(lambda x, p=0.5, **where: random.bernoulli(x, p, **where)),
    aten.bernoulli_.Tensor: _inplace(random.bernoulli),
    aten.rand.default: _factory(random.rand),
    aten.randn.default: _factory(random.randn),
    aten.rand_like.default: _factory(random.rand_like),
    aten.randn_like.default: _factory(random.randn_like),
    aten.randint.default: _factory(lambda high, size, **rest: random.randint(0, high, size, **rest)),
    aten.randint.low: _factory(random.randint),
    aten.randint_like.default: _factory(lambda x, high, **rest: random.randint_like(x, 0, high, **rest)),
    aten.randint_like.low_dtype: _factory(random.randint_like),
    aten.normal.float_float: _factory(lambda mean, std, size, **rest: random.randn(size, **rest) * std + mean),
    aten.normal.Tensor_float: _normal_of,
    aten.normal.float_Tensor: _normal_of,
    aten.normal.Tensor_Tensor: _normal_of,
    aten.uniform_.default: _inplace(_uniform),
    aten.normal_.default: _inplace(_normal),
    aten.exponential_.default: _inplace(_exponential),
    # What capture makes of the in-place ones.
    aten.bernoulli.Tensor: lambda x, p, **where: random.bernoulli(x, p, **where),
    aten.uniform.default: _uniform,
    aten.normal_functional.default: _normal,
    aten.exponential.default: _exponential,
}

# Only as wholes: numbers of torch's generator, which the key seeds.
SEEDED = (
    aten.native_dropout.default, aten.multinomial.default, aten.randperm.default, aten.poisson.default, aten.binomial.default,
    aten._standard_gamma.default, aten._sample_dirichlet.default,
    *(op for name in ("random", "random_") for op in (getattr(aten, name).default, getattr(aten, name).to, getattr(getattr(aten, name), "from"))),
    *(op.default for name in ("geometric", "cauchy", "log_normal") for op in (getattr(aten, name), getattr(aten, f"{name}_"))),
)  # fmt: skip
RANDOM_KERNELS = COMPOSITE | DRAWS | {op: _seeded(op) for op in SEEDED}

# Would draw from torch's generator unnoticed, so a forward that meets one under counter_rng is told.
UNSUPPORTED = (aten.rrelu_with_noise.default,)


def is_random(target: Any) -> bool:
    """Whether a call of this ATen overload takes an op_index. It does when inactive (eval, p = 0) too."""
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return tagged or target in RANDOM_KERNELS


class _NoKey:
    """The key where nothing may be drawn: whoever reads it is told."""

    def __init__(self, op: Any) -> None:
        self.op = op

    @property
    def seed(self) -> int:
        raise RuntimeError(f"{self.op} drew in backward: counter_rng can't follow activation checkpointing")


class _CountedKey:
    """A key that counts how often it is read: an operator that is inactive takes one, but draws nothing."""

    def __init__(self, rng: CounterRng, key: RandomKey) -> None:
        self.rng, self.key = rng, key
        self.call, self.op_index = key.call, key.op_index

    @property
    def seed(self) -> int:
        self.rng.num_draws += 1
        return self.key.seed


class CounterRng:
    """What `counter_rng` returns; entered once. `state` may be saved, loaded, and shared with a parallel run's."""

    def __init__(self, module: torch.nn.Module | None, seed: int | None) -> None:
        self.module = module
        self.state = CounterState.from_torch() if seed is None else CounterState(seed)
        self.op_index = 0
        self.num_draws = 0  # by operators that were active
        self._active = module is None  # in a forward
        self._nested = False  # in one of our kernels
        self._library: torch.library.Library | None = None
        self._hooks: list[Any] = []
        self._mha_fastpath = True

    def next_call(self) -> None:
        """Before each forward; done by a hook where a module was given."""
        self.state.next_call()
        self.op_index = 0

    def __enter__(self) -> Self:
        if self._library is not None:
            raise RuntimeError("this counter_rng is entered already")
        self._library = torch.library.Library("aten", "IMPL")
        kernels: list[tuple[Any, str, Callable[..., Any]]] = []
        for backend in ["CPU", *(["CUDA"] if torch.cuda.is_available() else [])]:
            kernels += [(op, backend, self._kernel(op, fn, backend)) for op, fn in RANDOM_KERNELS.items()]
            kernels += [(op, "Autograd" + backend, self._kernel(op, fn, "Autograd" + backend)) for op, fn in COMPOSITE.items()]
            kernels += [(op, backend, self._kernel(op, None, backend)) for op in UNSUPPORTED]
        # Only now: a kernel for the backend changes what torch computes as the original for autograd.
        for op, key, kernel in kernels:
            self._library.impl(op, kernel, key, with_keyset=True)
        # The fused encoder layer of eval mode would hide the attention that the graph has.
        self._mha_fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        if self.module is not None:
            self._hooks = [
                self.module.register_forward_pre_hook(lambda *_: self._begin(), prepend=True),
                self.module.register_forward_hook(lambda *_: self._end(), always_call=True),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        torch.backends.mha.set_fastpath_enabled(self._mha_fastpath)
        assert self._library is not None
        self._library._destroy()
        self._library = None

    def _next_key(self) -> _CountedKey:
        self.op_index += 1
        return _CountedKey(self, self.state.key(self.op_index - 1))

    def _begin(self) -> None:
        self.next_call()
        self._active = True

    def _end(self) -> None:
        self._active = False

    def _kernel(self, op: Any, fn: Callable[..., Any] | None, key: str) -> Callable[..., Any]:
        """`fn` while active, else (or where it declines) the operator's present kernel; None raises while active."""
        original = torch.library.get_kernel(op, key)

        def kernel(keyset: Any, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
            if generator is not None:
                return original.call_boxed(keyset, *args, generator=generator, **kwargs)
            in_backward = torch._C._current_graph_task_id() != -1
            if self._nested or not (self._active or in_backward):
                return original.call_boxed(keyset, *args, **kwargs)
            if fn is None:
                raise NotImplementedError(f"{op} has no counter-based form, so under counter_rng the module can't run it")
            self._nested = True  # what `fn` is made of takes no op_index of its own
            try:
                result = fn(*args, key=_NoKey(op) if in_backward else self._next_key(), **kwargs)
                return original.call_boxed(keyset, *args, **kwargs) if result is NotImplemented else result
            finally:
                self._nested = False

        return kernel


def counter_rng(module: torch.nn.Module | None = None, seed: int | None = None) -> CounterRng:
    """Context in which a plain module draws what its parallel plan draws.

        with torch_soap.counter_rng(model):
            loss = model(x).sum()

    With a module, its top-level forwards count the calls and only they draw through the counter. Without one,
    everything does, and `next_call()` goes before each forward. The seed is torch's (`torch.manual_seed`) unless given.
    """
    return CounterRng(module, seed)
