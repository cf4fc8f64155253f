"""Training steps of whole models on one GPU, for benchmarks/gpu_efficiency.py: what the simulator's prediction for one device is held against."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT
from examples.llama import Llama, Sizes

STEPS, ALONE = 11, 3  # that are timed; the last ones, whose host time is, begin with nothing queued

GPT2 = {"vocabulary": 50257, "layers": 12, "hidden": 768, "heads": 12, "context": 1024}
TINY = {"vocabulary": 512, "layers": 2, "hidden": 64, "heads": 2, "context": 64}


def llama_sizes(layers: int, small: bool) -> Sizes:
    """Of Llama 3 8B's width."""
    return Sizes(layers, 64, 192, 4, 2, 512) if small else Sizes(layers, 4096, 14336, 32, 8)


def image_model(name: str) -> nn.Module:
    import torchvision

    module: nn.Module = getattr(torchvision.models, name)()
    return module


def timed(clock: Any, forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Medians over steps in a row, seconds by events: forward, backward and update; and how long the host took to queue a step."""
    cuda = clock.cuda
    rows, hosts = [], []

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if cuda else b - a

    for step in range(3 + STEPS):
        if step == 3 and cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if step >= 3 + STEPS - ALONE and cuda:
            torch.cuda.synchronize()  # else a full queue holds the host up
        begin = time.perf_counter()
        marks = [mark()]
        loss = forward()
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(mark())
        hosts.append(time.perf_counter() - begin)
        rows.append(marks)
    if cuda:
        torch.cuda.synchronize()
    parts = [[between(a, b) for a, b in itertools.pairwise(m)] for m in rows[3:]]
    whole = [between(m[0], m[-1]) for m in rows[3:-ALONE]]
    quarters = statistics.quantiles(whole, n=4)
    out = dict(zip(("forward_s", "backward_s", "update_s"), (statistics.median(p) for p in zip(*parts[:-ALONE], strict=True)), strict=True))
    out |= {"step_s": statistics.median(whole), "q1": quarters[0], "q3": quarters[2], "host_s": statistics.median(hosts[-ALONE:])}
    if cuda:
        out["peak_bytes"] = torch.cuda.max_memory_allocated()
        out["kernels"] = profiled(forward, optimizer)
    return out


def profiled(forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, most: int = 25) -> list[tuple[str, int, float]]:
    """The kernels of a step that take longest: name, calls, seconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as p:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    kernels = [(e.key[:100], e.count, e.self_device_time_total / 1e6) for e in p.key_averages() if e.self_device_time_total > 0]
    return sorted(kernels, key=lambda k: -k[2])[:most] + [("all", sum(k[1] for k in kernels), sum(k[2] for k in kernels))]


def images(clock: Any, device: str, name: str, kind: str, rows: int) -> dict[str, Any]:
    small = device == "cpu"
    torch.backends.cudnn.allow_tf32 = kind != "float32"
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    module = image_model(name).to(device)
    size, rows = (64, 2) if small else (224, rows)
    x, y = torch.randn(rows, 3, size, size, device=device), torch.randint(1000, (rows,), device=device)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=True)

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=kind == "autocast"):
            return F.cross_entropy(module(x), y)

    return timed(clock, forward, optimizer)


def tokens(clock: Any, device: str, module: nn.Module, batch: int, length: int, vocabulary: int, way: str, compiled: bool) -> dict[str, Any]:
    t, y = (torch.randint(vocabulary, (batch, length), device=device) for _ in range(2))
    optimizer = torch.optim.AdamW(module.parameters(), **{way: True})
    if compiled:
        for layer in module.layers:  # type: ignore[union-attr]
            layer.compile()
    loss = torch.compile(F.cross_entropy) if compiled else F.cross_entropy

    def forward() -> torch.Tensor:
        return loss(module(t).flatten(0, 1).float(), y.flatten())

    return timed(clock, forward, optimizer)


def gpt(clock: Any, device: str) -> dict[str, Any]:
    sizes = TINY if device == "cpu" else GPT2
    module = GPT(**sizes).to(device, torch.bfloat16)  # type: ignore[arg-type]
    return tokens(clock, device, module, 8, sizes["context"], sizes["vocabulary"], "foreach", False)


def llama(clock: Any, device: str, layers: int, batch: int, compiled: bool) -> dict[str, Any]:
    sizes, length = llama_sizes(layers, device == "cpu"), 64 if device == "cpu" else 8192
    torch._dynamo.reset()
    with torch.device(device):
        module = Llama(sizes, length).to(torch.bfloat16)
    return tokens(clock, device, module, batch, length, sizes.vocabulary, "fused", compiled)


def steps(clock: Any, device: str, compiled: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(name, what measures it). The names are those of benchmarks/gpu_table.py."""

    def named(name: str, fn: Callable[..., dict[str, Any]], *arguments: Any) -> tuple[str, Callable[[], dict[str, Any]]]:
        def run() -> dict[str, Any]:
            out = {"name": name, **fn(clock, device, *arguments)}
            if device == "cuda":
                torch.cuda.empty_cache()
            return out

        return name, run

    if compiled:
        yield named("llama 2 layers, compiled", llama, 2, 1, True)
        yield named("llama 4 layers, compiled", llama, 4, 1, True)
        yield named("llama 4 layers, two sequences, compiled", llama, 4, 2, True)
        return
    for name, rows in (("alexnet", 128), ("vgg16", 64), ("resnet50", 64)):
        for kind in ("float32", "tf32", "autocast"):
            yield named(f"{name} {kind}", images, name, kind, rows)
    yield named("gpt-2 bfloat16", gpt)
    for layers in (2, 4):
        yield named(f"llama {layers} layers", llama, layers, 1, False)
    yield named("llama 4 layers, two sequences", llama, 4, 2, False)
