"""What part of a GPU's rates each family of operators reaches: the source of the efficiencies of csrc/machine/presets.cpp. Needs torch alone.

python -m benchmarks.gpu_efficiency --out gpu.json [--budget 200]        on the GPU; benchmarks/gpu_table.py makes the table

Operators have the shapes of AlexNet, VGG-16, ResNet-50, GPT-2 and Llama 3, their operations and bytes are counted as csrc/cost/work.h says
(tests/unit/test_gpu_efficiency.py holds them against it). Times are of CUDA events around a queue that was filled while the GPU was kept busy, so the
host's launches don't count; those are measured by themselves. Inputs are random: on zeros a GPU clocks higher.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Shape = tuple[int, ...]
TYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}  # tf32: float32 with products in TF32
MEASURED_S, REPEATS, MOST = 0.08, 7, 40  # of one measurement: seconds in all, how many, calls in each at most


@dataclass(frozen=True)
class Case:
    """An operator: module and inputs, and what forward does. Integer inputs: (highest, shape)."""

    name: str
    family: str
    module: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    flops: float = 0.0
    table: bool = False  # of the weight no more is read than is given
    reads: int = 1  # of the inputs: 2 where statistics are an operator of their own
    types: tuple[str, ...] = ("float32", "bfloat16")


class Apply(nn.Module):
    def __init__(self, fn: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.fn(*inputs)


class FirstOf(nn.Module):
    """Of an operator with several results."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)[0]


ALL = ("float32", "tf32", "bfloat16")


def conv(name: str, rows: int, channels: int, size: int, out: int, kernel: int, stride: int = 1, padding: int | None = None) -> Case:
    pad = kernel // 2 if padding is None else padding
    after = (size + 2 * pad - kernel) // stride + 1
    flops = 2.0 * rows * out * after**2 * channels * kernel**2
    module = lambda: nn.Conv2d(channels, out, kernel, stride, pad, bias=False)  # noqa: E731
    return Case(f"{name} {channels}-{out} {kernel}x{kernel} at {size}, {rows} images", "convolution", module, ((rows, channels, size, size),), flops, types=ALL)


def linear(name: str, rows: Shape, width: int, out: int, types: tuple[str, ...] = ALL) -> Case:
    flops = 2.0 * math.prod(rows) * width * out
    return Case(f"{name} {math.prod(rows)}x{width}x{out}", "matmul", lambda: nn.Linear(width, out, bias=False), ((*rows, width),), flops, types=types)


def attention(name: str, batch: int, heads: int, key_heads: int, length: int, width: int, causal: bool = True) -> Case:
    pairs = length * (length + 1) / 2 if causal else float(length) ** 2
    grouped = heads != key_heads
    module = lambda: Apply(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped))  # noqa: E731
    shapes = ((batch, heads, length, width), *2 * ((batch, key_heads, length, width),))
    types = ("bfloat16",) if grouped else ("float32", "bfloat16")
    label = f"{name} {batch}x{heads}/{key_heads} heads, {length} tokens, {width} wide{', causal' if causal else ''}"
    return Case(label, "attention", module, shapes, 4.0 * batch * heads * pairs * width, types=types)


def simple(name: str, family: str, module: Callable[[], nn.Module], *inputs: Any, table: bool = False, reads: int = 1, flops: float = 0.0) -> Case:
    return Case(name, family, module, inputs, flops, table, reads)


def cases() -> list[Case]:
    hidden, ffn, tokens = 4096, 14336, (1, 8192)
    lstm_rows, lstm_width, steps = 64, 1024, 40
    lstm = lambda: FirstOf(nn.LSTM(lstm_width, lstm_width, batch_first=True))  # noqa: E731
    return [
        conv("AlexNet", 128, 3, 224, 64, 11, 4, 2),
        conv("AlexNet", 128, 64, 27, 192, 5),
        conv("AlexNet", 128, 192, 13, 384, 3),
        conv("VGG-16", 64, 64, 224, 64, 3),
        conv("VGG-16", 64, 128, 112, 128, 3),
        conv("VGG-16", 64, 256, 56, 256, 3),
        conv("VGG-16", 64, 512, 28, 512, 3),
        conv("VGG-16", 64, 512, 14, 512, 3),
        conv("ResNet-50", 64, 3, 224, 64, 7, 2),
        conv("ResNet-50", 64, 64, 56, 64, 3),
        conv("ResNet-50", 64, 64, 56, 256, 1),
        conv("ResNet-50", 64, 128, 28, 128, 3),
        conv("ResNet-50", 64, 1024, 14, 256, 1),
        conv("ResNet-50", 64, 256, 14, 256, 3),
        conv("ResNet-50", 64, 512, 7, 512, 3),
        conv("ResNet-50", 64, 512, 7, 2048, 1),
        linear("AlexNet", (128,), 9216, 4096),
        linear("AlexNet", (128,), 4096, 1000),
        linear("VGG-16", (64,), 25088, 4096),
        linear("GPT-2", (8, 1024), 768, 2304),
        linear("GPT-2", (8, 1024), 768, 768),
        linear("GPT-2", (8, 1024), 768, 3072),
        linear("GPT-2", (8, 1024), 3072, 768),
        linear("GPT-2", (8, 1024), 768, 50257),
        linear("Llama 8B q", tokens, hidden, hidden),
        linear("Llama 8B k", tokens, hidden, 1024),
        linear("Llama 8B gate", tokens, hidden, ffn),
        linear("Llama 8B down", tokens, ffn, hidden),
        linear("Llama 8B gate, two sequences", (2, 8192), hidden, ffn, ("bfloat16",)),
        linear("Llama 8B head", tokens, hidden, 128256, ("bfloat16",)),
        linear("Llama 8B gate, an eighth", tokens, hidden, ffn // 8, ("bfloat16",)),
        linear("Llama 70B gate, an eighth", tokens, 8192, 3584, ("bfloat16",)),
        linear("Llama 70B down, an eighth", tokens, 3584, 8192, ("bfloat16",)),
        attention("GPT-2", 8, 12, 12, 1024, 64),
        attention("BERT", 8, 16, 16, 512, 64, causal=False),
        attention("Llama 8B", 1, 32, 8, 8192, 128),
        attention("Llama 8B, two sequences", 2, 32, 8, 8192, 128),
        attention("Llama 70B, an eighth", 2, 8, 1, 8192, 128),
        attention("Llama 8B", 1, 32, 8, 2048, 128),
        simple("batch norm 64x64x112x112", "normalization", lambda: nn.BatchNorm2d(64), (64, 64, 112, 112), reads=2),
        simple("batch norm 64x256x56x56", "normalization", lambda: nn.BatchNorm2d(256), (64, 256, 56, 56), reads=2),
        simple("batch norm 64x2048x7x7", "normalization", lambda: nn.BatchNorm2d(2048), (64, 2048, 7, 7), reads=2),
        simple("layer norm 8x1024x768", "normalization", lambda: nn.LayerNorm(768), (8, 1024, 768)),
        simple("RMS norm 8192x4096", "normalization", lambda: nn.RMSNorm(hidden, eps=1e-5), (*tokens, hidden)),
        simple("softmax 96x1024x1024", "normalization", lambda: nn.Softmax(-1), (96, 1024, 1024)),
        simple("relu 64x256x56x56", "pointwise", lambda: Apply(torch.relu), (64, 256, 56, 56)),
        simple("add 64x256x56x56", "pointwise", lambda: Apply(torch.add), *2 * ((64, 256, 56, 56),)),
        simple("gelu 8x1024x3072", "pointwise", lambda: Apply(F.gelu), (8, 1024, 3072)),
        simple("silu 8192x14336", "pointwise", lambda: Apply(F.silu), (*tokens, ffn)),
        simple("product 8192x14336", "pointwise", lambda: Apply(torch.mul), *2 * ((*tokens, ffn),)),
        simple("sum 8192x4096", "pointwise", lambda: Apply(torch.add), *2 * ((*tokens, hidden),)),
        simple("embedding 50257x768, 8x1024", "embedding", lambda: nn.Embedding(50257, 768), (50257, (8, 1024)), table=True),
        simple("embedding 128256x4096, 8192", "embedding", lambda: nn.Embedding(128256, hidden), (128256, tokens), table=True),
        simple("LSTM 64x40x1024", "recurrent", lstm, (lstm_rows, steps, lstm_width), flops=2.0 * lstm_rows * steps * 8 * lstm_width**2),
        simple("max pool 64x64x112x112", "other", lambda: nn.MaxPool2d(3, 2, 1), (64, 64, 112, 112)),
        simple("halves joined 32x8192x64", "other", lambda: Apply(lambda a, b: torch.cat((a, b), -1)), *2 * ((1, 32, 8192, 64),)),
        simple("cross entropy 8192x128256", "other", lambda: Apply(lambda x, t: F.cross_entropy(x.float(), t)), (8192, 128256), (128256, (8192,))),
    ]


def made(case: Case, kind: str, device: str) -> tuple[nn.Module, list[torch.Tensor]]:
    dtype = TYPES[kind]
    with torch.device(device):
        module = case.module().to(dtype)
        tensors = [
            torch.randint(i[0], i[1]) if isinstance(i[-1], tuple) else torch.randn(i, dtype=torch.float32).to(dtype).requires_grad_() for i in case.inputs
        ]
    return module, tensors


def bytes_of(case: Case, module: nn.Module, tensors: list[torch.Tensor], result: torch.Tensor) -> int:
    """Operands read and results written once, as the simulator counts its operators."""
    size = lambda t: t.numel() * t.element_size()  # noqa: E731
    weights = size(result) if case.table else sum(size(t) for t in module.parameters())
    return weights + case.reads * sum(size(t) for t in tensors) + size(result)


@dataclass
class Clock:
    """Seconds of GPU time of one call, by events around calls that were queued while the GPU was busy. On a CPU, for trials, the wall clock."""

    cuda: bool
    ticks_per_s: float = 1.0

    def __post_init__(self) -> None:
        if self.cuda:
            torch.cuda._sleep(1_000_000)
            self.ticks_per_s = 20_000_000 / self.events(lambda: torch.cuda._sleep(20_000_000))

    @staticmethod
    def events(fn: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wall(self, fn: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        fn()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def queued(self, fn: Callable[[], Any]) -> float:
        """How long the host takes to queue it."""
        begin = time.perf_counter()
        fn()
        spent = time.perf_counter() - begin
        if self.cuda:
            torch.cuda.synchronize()
        return spent

    def times(self, fn: Callable[[], Any]) -> list[float]:
        for _ in range(2):
            self.wall(fn)
        one = self.wall(fn)
        calls = max(1, min(MOST, int(MEASURED_S / REPEATS / max(one, 1e-6))))
        out = []
        for _ in range(REPEATS):

            def repeated() -> None:
                for _ in range(calls):
                    fn()

            if not self.cuda:
                out.append(self.wall(repeated) / calls)
                continue
            torch.cuda._sleep(int(min(calls * one * 1.2 + 2e-4, 0.05) * self.ticks_per_s))
            out.append(self.events(repeated) / calls)
        return sorted(out)


def summary(times: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(times, n=4)
    return {"s": statistics.median(times), "q1": quarters[0], "q3": quarters[2]}


def short_products(kind: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"


def measure(case: Case, kind: str, clock: Clock, device: str) -> dict[str, Any]:
    short_products(kind)
    module, tensors = made(case, kind, device)
    with torch.no_grad():
        result = module(*tensors)
        num_bytes = bytes_of(case, module, tensors, result)
        forward = clock.times(lambda: module(*tensors))
    wanted = [t for t in tensors if t.requires_grad] + list(module.parameters())
    gradient = torch.randn_like(result)

    def both() -> None:
        torch.autograd.grad(module(*tensors), wanted, gradient)

    return {
        "name": case.name,
        "family": case.family,
        "type": kind,
        "flops": case.flops,
        "bytes": num_bytes,
        "forward": summary(forward),
        "both": summary(clock.times(both)),
    }


def launches(clock: Clock, device: str, count: int = 300) -> dict[str, float]:
    """Seconds of host time that one small operator takes: queued alone, with autograd's graph, and of its backward; and of GPU time."""
    small = torch.ones(16, device=device)
    tracked = small.clone().requires_grad_()
    layer = nn.Linear(16, 16).to(device)

    def plain() -> None:
        for _ in range(count):
            torch.add(small, small)

    def chain(x: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        for _ in range(count):
            x = fn(x)
        return x

    out = {"add": statistics.median(clock.queued(plain) for _ in range(5)) / count}
    for name, fn in (("sine", torch.sin), ("linear", layer)):
        taken = []
        for _ in range(5):
            begin = time.perf_counter()
            end = chain(tracked, fn)
            middle = time.perf_counter()
            end.sum().backward()
            taken.append((middle - begin, time.perf_counter() - middle))
            clock.wall(lambda: None)
        out[f"{name} with graph"], out[f"{name} backward"] = (statistics.median(t) / count for t in zip(*taken, strict=True))
    out["GPU time of one"] = statistics.median(clock.times(plain)) / count
    return out


def updates(clock: Clock, device: str, scale: int) -> Iterator[dict[str, Any]]:
    """AdamW of few large and of many small parameters, by how it is run."""
    sets = {"8 of 16M": [2**24 // scale] * 8, "160 of 160k": [160_000 // scale] * 160}
    for label, sizes in sets.items():
        for dtype in (torch.float32, torch.bfloat16):
            for way in ("foreach", "fused"):
                parameters = [nn.Parameter(torch.randn(n, device=device, dtype=dtype)) for n in sizes]
                for p in parameters:
                    p.grad = torch.randn_like(p)
                optimizer = torch.optim.AdamW(parameters, **{way: True})
                optimizer.step()
                num_bytes = sum(p.numel() * p.element_size() for p in parameters)
                yield {"parameters": label, "type": str(dtype)[6:], "way": way, "bytes": num_bytes, **summary(clock.times(optimizer.step))}


def ceilings(clock: Clock, device: str, scale: int) -> dict[str, float]:
    """Bytes/s of a copy (read and written), FLOP/s of a large product of each type."""
    source = torch.randn(2**28 // scale, device=device)
    out = {"copy": 2 * source.numel() * 4 / statistics.median(clock.times(source.clone))}
    size = 8192 // min(scale, 64)
    for kind, dtype in TYPES.items():
        short_products(kind)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out[kind] = 2 * size**3 / statistics.median(clock.times(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    return out


def main() -> None:
    from benchmarks.gpu_steps import steps

    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=200, help="seconds after which no further operator or step is begun")
    options = parser.parse_args()
    begin = time.perf_counter()
    clock, device = Clock(torch.cuda.is_available()), "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "left out": []}
    torch.manual_seed(0)

    def kept(key: str, name: str, what: Callable[[], Any]) -> None:
        """An operator that fails or comes too late is named; the rest goes on."""
        if time.perf_counter() - begin > options.budget:
            found["left out"].append(f"{name}: no time left")
            return
        try:
            found.setdefault(key, []).append(what())
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found["left out"].append(f"{name}: {str(error).splitlines()[0]}")
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    scale = 1 if device == "cuda" else 4096
    place = device if device == "cuda" else "meta"  # a trial without a GPU computes no operator
    kept("ceilings", "ceilings", lambda: ceilings(clock, device, scale))
    kept("launches", "launches", lambda: launches(clock, device))
    kept("updates", "updates", lambda: list(updates(clock, device, scale)))
    for name, step in steps(clock, device, compiled=False):
        kept("steps", name, step)
    for case in cases():
        for kind in case.types:
            kept("operators", f"{case.name} {kind}", lambda case=case, kind=kind: measure(case, kind, clock, place))  # type: ignore[misc]
            if device == "cuda":
                torch.cuda.empty_cache()
    print(f"operators done after {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    for name, step in steps(clock, device, compiled=True):
        kept("steps", name, step)
    print(f"{card}: done after {time.perf_counter() - begin:.0f} s; left out: {found['left out']}", file=sys.stderr)


if __name__ == "__main__":
    main()
