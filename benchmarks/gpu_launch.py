"""How long a host takes to queue what a GPU computes: the source of `Machine.launch` of csrc/machine/presets.cpp. Needs torch alone.

python -m benchmarks.gpu_launch --out gpu_launch.json [--budget 100]        on the GPU; benchmarks/gpu_launch_table.py adds our predictions

Operators on operands so small that the GPU waits for the host, forward with autograd's graph and backward; AdamW; collectives of a group of one rank,
which move nothing; then training steps of three models, small ones that the host bounds and large ones that the GPU bounds. The time of the host is that
until the last call has returned, begun with nothing queued, since a full queue (about a thousand kernels) holds the host up. --device cpu is a trial of the
script, without the large steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from examples.gpt import GPT

COUNT, REPEATS = 48, 9  # operators in a row, few enough for a queue to hold them; how often
WIDTH = 64
Chain = Callable[[int, torch.Tensor], torch.Tensor]  # (which of COUNT, input) -> output


class Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True),
            nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner),
        )  # fmt: skip
        same = stride == 1 and channels == 4 * inner
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.short(x), inplace=True)


class ResNet50(nn.Module):
    """He and others, arXiv:1512.03385, table 1, with the stride in the 3x3 convolution."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        blocks, channels = [], 64
        for stage, count in enumerate((3, 4, 6, 3)):
            for i in range(count):
                blocks.append(Bottleneck(channels, 64 << stage, 2 if i == 0 and stage > 0 else 1))
                channels = 256 << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class MLP(nn.Sequential):
    def __init__(self, width: int, layers: int = 24) -> None:
        super().__init__(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())))


def mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


VOCABULARY = 50304
# name -> (bounded by, module, shape of the input, of which what it counts to is the last entry where it is tokens, type, classes)
STEPS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], str, int]] = {
    "gpt, 12 layers of 768, 1 x 128 tokens": ("host", lambda: GPT(VOCABULARY, 12, 768, 12, 128), (1, 128), "bfloat16", VOCABULARY),
    "gpt, 12 layers of 768, 16 x 1024 tokens": ("GPU", lambda: GPT(VOCABULARY, 12, 768, 12, 1024), (16, 1024), "bfloat16", VOCABULARY),
    "resnet-50, 1 image of 64 x 64": ("host", ResNet50, (1, 3, 64, 64), "float32", 1000),
    "resnet-50, 64 images of 224 x 224": ("GPU", ResNet50, (64, 3, 224, 224), "float32", 1000),
    "24 linears of 256, 32 rows": ("host", lambda: MLP(256), (32, 256), "bfloat16", 256),
    "24 linears of 4096, 16384 rows": ("GPU", lambda: MLP(4096), (16384, 4096), "bfloat16", 4096),
}


def operands(name: str, device: str | None = None, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step; with fewer rows for a trial."""
    _, _, shape, dtype, classes = STEPS[name]
    shape = (min(shape[0], rows or shape[0]), *shape[1:])
    if len(shape) == 2 and classes == VOCABULARY:
        return torch.randint(classes, shape, device=device), torch.randint(classes, shape, device=device)
    return torch.randn(shape, device=device, dtype=getattr(torch, dtype)), torch.randint(classes, shape[:1], device=device)


def operators(device: str, dtype: torch.dtype) -> Iterator[tuple[str, str, torch.Tensor, Chain]]:
    """(name, family, input, what is done to it COUNT times in a row)."""
    like: dict[str, Any] = {"device": device, "dtype": dtype}

    def layers(make: Callable[[], nn.Module]) -> Chain:
        all_ = [make().to(**like) for _ in range(COUNT)]
        return lambda i, x: all_[i](x)

    x = torch.randn(2, 16, WIDTH, **like, requires_grad=True)
    square = torch.randn(WIDTH, WIDTH, **like, requires_grad=True)
    heads = torch.randn(2, 4, 16, 16, **like, requires_grad=True)
    image = torch.randn(1, 16, 8, 8, **like, requires_grad=True)
    ids, targets = torch.randint(WIDTH, (2, 16), device=device), torch.randint(WIDTH, (2,), device=device)
    yield "linear", "matmul", x, layers(lambda: nn.Linear(WIDTH, WIDTH))
    yield "linear without bias", "matmul", x, layers(lambda: nn.Linear(WIDTH, WIDTH, bias=False))
    yield "matmul", "matmul", square, lambda i, t: t @ square
    yield "conv2d", "convolution", image, layers(lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False))
    yield "conv2d with bias", "convolution", image, layers(lambda: nn.Conv2d(16, 16, 3, padding=1))
    yield "layer norm", "normalization", x, layers(lambda: nn.LayerNorm(WIDTH))
    yield "batch norm", "normalization", image, layers(lambda: nn.BatchNorm2d(16))
    yield "softmax", "normalization", x, lambda i, t: t.softmax(-1)
    yield "log softmax", "normalization", x, lambda i, t: t.log_softmax(-1)
    yield "gelu", "pointwise", x, lambda i, t: F.gelu(t)
    yield "relu", "pointwise", x, lambda i, t: F.relu(t)
    yield "add", "pointwise", x, lambda i, t: t + x
    yield "multiply", "pointwise", x, lambda i, t: t * x
    yield "dropout", "pointwise", x, lambda i, t: F.dropout(t, 0.1)
    yield "attention", "attention", heads, lambda i, t: F.scaled_dot_product_attention(t, heads, heads, is_causal=True)
    yield "max pool", "other", image, lambda i, t: F.max_pool2d(t, 3, 1, 1)
    yield "mean over rows", "other", x, lambda i, t: t.mean(0, keepdim=True).expand_as(t)
    yield "concatenation", "other", x, lambda i, t: torch.cat([t[:1], x[1:]])
    yield "copy of a transposition", "other", square, lambda i, t: t.t().contiguous()
    yield "transposition", "view", square, lambda i, t: t.t()
    yield "view", "view", x, lambda i, t: t.view(-1, WIDTH) if i % 2 == 0 else t.view(2, 16, WIDTH)
    yield "lstm", "recurrent", x, (lambda steps: lambda i, t: steps(i, t)[0])(layers(lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True)))
    # Not in a row: their results are of another kind than their input.
    yield "embedding", "embedding", ids, layers(lambda: nn.Embedding(WIDTH, WIDTH))
    yield "cross entropy", "loss", torch.randn(2, WIDTH, device=device, requires_grad=True), lambda i, t: F.cross_entropy(t, targets)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kernels(device: str, fn: Callable[[], Any]) -> tuple[int, float]:
    """How many kernels and copies it queues, and their seconds on the GPU."""
    if device != "cuda":
        return 0, 0.0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as p:
        fn()
        wait(device)
    events = [e for e in p.key_averages() if e.self_device_time_total > 0]
    return sum(e.count for e in events), sum(e.self_device_time_total for e in events) / 1e6


def middle(times: list[float]) -> dict[str, float]:
    quarters = statistics.quantiles(times, n=4)
    return {"s": statistics.median(times), "q1": quarters[0], "q3": quarters[2]}


def operator_times(device: str, name: str, family: str, start: torch.Tensor, fn: Chain) -> dict[str, Any]:
    chained = start.is_floating_point() and family != "loss"
    made: list[torch.Tensor] = []

    def forward() -> None:
        made.clear()
        if not chained:
            made.extend(fn(i, start) for i in range(COUNT))
            return
        t = start
        for i in range(COUNT):
            t = fn(i, t)
        made.append(t)

    def plain() -> None:
        with torch.no_grad():
            forward()

    forward()
    gradients = [torch.ones_like(t) for t in made]

    def backward() -> None:
        torch.autograd.backward(made, gradients)

    def clear() -> None:
        for p in parameters:
            p.grad = None

    parameters = [t for t in leaves(made) if t.requires_grad]
    backward()
    clear()
    taken: dict[str, list[float]] = {"without graph": [], "forward": [], "backward": []}
    for _ in range(REPEATS):
        for key, what in (("without graph", plain), ("forward", forward), ("backward", backward)):
            wait(device)
            begin = time.perf_counter()
            what()
            taken[key].append((time.perf_counter() - begin) / COUNT)
        clear()
    out: dict[str, Any] = {"name": name, "family": family, **{key: middle(times) for key, times in taken.items()}}
    out["kernels"] = [kernels(device, forward)[0] / COUNT, kernels(device, backward)[0] / COUNT]
    return out


def leaves(made: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that gradients arrive at."""
    found, seen, todo = [], set(), [t.grad_fn for t in made]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(before for before, _ in node.next_functions)
    return found


def update_times(device: str) -> Iterator[dict[str, Any]]:
    """The optimizer's step and zero_grad by how it is run and how many small parameters it has."""
    for way in ("fused", "foreach", "each"):
        for count in (8, 64, 512):
            parameters = [nn.Parameter(torch.randn(WIDTH, device=device)) for _ in range(count)]
            gradients = [torch.ones_like(p) for p in parameters]
            flags = {"foreach": False} if way == "each" else {way: True}
            optimizer = torch.optim.AdamW(parameters, **flags)
            taken: dict[str, list[float]] = {"step": [], "zero_grad": []}
            for _ in range(REPEATS):
                for p, g in zip(parameters, gradients, strict=True):
                    p.grad = g
                wait(device)
                begin = time.perf_counter()
                optimizer.step()
                stepped = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                taken["step"].append(stepped - begin)
                taken["zero_grad"].append(time.perf_counter() - stepped)
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            queued = kernels(device, optimizer.step)[0]
            yield {"way": way, "parameters": count, **{k: middle(t[1:]) for k, t in taken.items()}, "kernels": queued}


def collective_times(device: str) -> Iterator[dict[str, Any]]:
    """What c10d and the library take to queue a collective; among one rank, so that nothing has to move."""
    import torch.distributed as dist

    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    x, y = (torch.ones(1024, device=device) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(x, async_op=True),
        "all_gather": lambda: dist.all_gather_into_tensor(y, x, async_op=True),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(y, x, async_op=True),
        "all_to_all": lambda: dist.all_to_all_single(y, x, async_op=True),
    }
    for name, call in calls.items():
        taken = []
        for _ in range(REPEATS + 1):
            wait(device)
            begin = time.perf_counter()
            works = [call() for _ in range(COUNT)]
            taken.append((time.perf_counter() - begin) / COUNT)
            for work in works:
                work.wait()
        yield {"name": name, **middle(taken[1:]), "kernels": kernels(device, lambda call=call: [call().wait() for _ in range(COUNT)])[0] / COUNT}  # type: ignore[misc]
    dist.destroy_process_group()


def step_times(device: str, name: str, way: str) -> dict[str, Any]:
    """Seconds of a step by steps in a row, and of the host by single ones."""
    bound, make, _, dtype, _ = STEPS[name]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    with torch.device(device):
        module = make().to(getattr(torch, dtype))
    x, y = operands(name, device, None if device == "cuda" else 1)
    optimizer = torch.optim.AdamW(module.parameters(), **{way: True})
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}

    def step() -> None:
        times = [time.perf_counter()]
        loss = mean_loss(module(x), y)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        for key, (a, b) in zip(parts, itertools.pairwise(times), strict=True):
            parts[key].append(b - a)

    in_a_row = 20 if device == "cuda" else 1
    for _ in range(3 if device == "cuda" else 1):
        step()
    walls = []
    for _ in range(5 if device == "cuda" else 2):
        wait(device)
        begin = time.perf_counter()
        for _ in range(in_a_row):
            step()
        wait(device)
        walls.append((time.perf_counter() - begin) / in_a_row)
    for times in parts.values():
        times.clear()
    alone = []
    for _ in range(REPEATS if device == "cuda" else 2):
        wait(device)
        begin = time.perf_counter()
        step()
        alone.append(time.perf_counter() - begin)
    out: dict[str, Any] = {"name": name, "bound": bound, "way": way, "parameters": len(list(module.parameters())), "step": middle(walls), "host": middle(alone)}
    out["host by part"] = {key: statistics.median(times) for key, times in parts.items()}
    out["kernels"], out["GPU_s"] = kernels(device, step)
    return out


def table(found: dict[str, Any]) -> str:
    us = lambda times: f"{times['s'] * 1e6:.1f}"  # noqa: E731
    lines = [
        f"# What the host takes to queue work for {found['card']}",
        "",
        f"`python -m benchmarks.gpu_launch` with torch {found['torch']}, {found['processor']}; medians. Times of one operator of {COUNT} in a row, in us.",
        "",
        "| operator | family | type | without graph | forward | backward | kernels forward, backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in found["operators"]:
        f, b = o["kernels"]
        lines.append(f"| {o['name']} | {o['family']} | {o['type']} | {us(o['without graph'])} | {us(o['forward'])} | {us(o['backward'])} | {f:.1f}, {b:.1f} |")
    lines += ["", "| AdamW | parameters | step us | zero_grad us | kernels |", "|---|---|---|---|---|"]
    lines += [f"| {u['way']} | {u['parameters']} | {us(u['step'])} | {us(u['zero_grad'])} | {u['kernels']} |" for u in found["updates"]]
    lines += ["", "| collective among one rank | us | kernels |", "|---|---|---|"]
    lines += [f"| {c['name']} | {us(c)} | {c['kernels']:.1f} |" for c in found["collectives"]]
    head = "| training step | AdamW | step ms | host ms: | forward | backward | update | GPU busy ms | kernels |"
    lines += ["", head, "|---|---|---|---|---|---|---|---|---|"]
    for s in found["steps"]:
        times = [s["step"]["s"], s["host"]["s"], *s["host by part"].values(), s["GPU_s"]]
        lines.append(f"| {s['name']} | {s['way']} | " + " | ".join(f"{t * 1e3:.2f}" for t in times) + f" | {s['kernels']} |")
    if found["left out"]:
        lines += ["", "Left out: " + "; ".join(found["left out"]) + "."]
    return "\n".join(lines) + "\n"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON; the table is written beside it")
    parser.add_argument("--budget", type=float, default=100, help="seconds after which nothing further is begun")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device, start = options.device, time.perf_counter()
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "processor": processor()}
    found |= {"operators": [], "updates": [], "collectives": [], "steps": [], "left out": []}

    def kept(key: str, name: str, what: Callable[[], list[dict[str, Any]]]) -> None:
        """What fails or comes too late is named; the rest goes on."""
        if time.perf_counter() - start > options.budget:
            found["left out"].append(f"{name}: no time left")
            return
        try:
            found[key] += what()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found["left out"].append(f"{name}: {str(error).splitlines()[0]}")
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    for name, (bound, *_) in STEPS.items():
        if device == "cpu" and bound == "GPU":
            continue
        for way in ("fused", "foreach") if bound == "host" else ("fused",):
            kept("steps", f"{name} {way}", lambda name=name, way=way: [step_times(device, name, way)])  # type: ignore[misc]
        if device == "cuda":
            torch.cuda.empty_cache()
    kept("updates", "updates", lambda: list(update_times(device)))
    for dtype in (torch.bfloat16, torch.float32):
        for name, family, x, fn in operators(device, dtype):
            label = str(dtype)[6:]
            kept("operators", f"{name} {label}", lambda n=name, f=family, x=x, fn=fn, d=label: [operator_times(device, n, f, x, fn) | {"type": d}])  # type: ignore[misc]
    kept("collectives", "collectives", lambda: list(collective_times(device)))
    text = table(found)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    print(f"{card}: done after {time.perf_counter() - start:.0f} s; left out: {found['left out']}", file=sys.stderr)


if __name__ == "__main__":
    main()
