"""How the part of a GPU's rates that an operator reaches depends on its shape: the source of the curves of csrc/machine/presets.cpp. Needs torch alone.

python -m benchmarks.gpu_shapes --out gpu_shapes.json [--budget 150]        on the GPU; benchmarks/gpu_table.py makes the table

In bfloat16: products over the widths of GPT models and over rows, attention by width of the heads, sequence and kernel, norms and losses by width. Then what
the host takes to queue an operator, and training steps of GPT models, to which nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_efficiency import Apply, Case, Clock, attention, linear, measure, simple
from benchmarks.gpu_steps import tokens
from examples.gpt import GPT

TOKENS = 16384
WIDTHS = (512, 768, 1024, 1536, 2048, 2560, 4096, 5120, 7168, 8192)
LENGTHS = (512, 1024, 2048, 4096, 8192)
KERNELS = {"as it comes": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
VOCABULARY = 50368
# width, heads, layers and sequences of each length
MODELS = {"125m": (768, 12, 12), "350m": (1024, 16, 24), "1b": (2048, 16, 24)}


def with_kernel(case: Case, backend: SDPBackend | None) -> Case:
    if backend is None:
        return case

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.module()

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return self.inner(*inputs)

    return replace(case, module=Chosen)


def cases() -> Iterator[tuple[dict[str, Any], Case]]:
    """(what it is a point of, the operator)."""
    for width in (64, 128):
        for length in LENGTHS:
            case = attention("causal", TOKENS // length, 2048 // width, 2048 // width, length, width)
            for kernel, backend in KERNELS.items():
                yield {"curve": "attention", "kernel": kernel, "width": width, "length": length}, with_kernel(case, backend)
    for h in WIDTHS:
        for inner, out in ((h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)):
            yield {"curve": "matmul", "rows": TOKENS, "in": inner, "out": out}, linear("GPT", (TOKENS,), inner, out)
    for h in (768, 2048, 4096):
        yield {"curve": "matmul", "rows": TOKENS, "in": h, "out": VOCABULARY}, linear("GPT head", (TOKENS,), h, VOCABULARY)
    for h in (1024, 4096):
        for rows in (64, 256, 1024, 4096):
            yield {"curve": "matmul", "rows": rows, "in": h, "out": 4 * h}, linear("GPT", (rows,), h, 4 * h)
    for h in (768, 1024, 2048, 4096, 8192):
        norm = simple(f"layer norm {TOKENS}x{h}", "normalization", lambda h=h: nn.LayerNorm(h), (TOKENS, h))  # type: ignore[misc]
        yield {"curve": "normalization", "kernel": "layer norm", "width": h}, norm
        rms = simple(f"RMS norm {TOKENS}x{h}", "normalization", lambda h=h: nn.RMSNorm(h, eps=1e-5), (TOKENS, h))  # type: ignore[misc]
        yield {"curve": "normalization", "kernel": "RMS norm", "width": h}, rms
    yield (
        {"curve": "normalization", "kernel": "log_softmax", "width": VOCABULARY},
        simple(f"log_softmax {TOKENS}x{VOCABULARY}", "normalization", lambda: Apply(lambda x: F.log_softmax(x, -1)), (TOKENS, VOCABULARY)),
    )
    yield (
        {"curve": "loss", "kernel": "nll_loss", "width": VOCABULARY},
        simple(f"nll_loss {TOKENS}x{VOCABULARY}", "other", lambda: Apply(F.nll_loss), (TOKENS, VOCABULARY), (VOCABULARY, (TOKENS,))),
    )
    for h in (768, 2048):
        yield {"curve": "pointwise", "kernel": "gelu", "width": 4 * h}, simple(f"gelu {TOKENS}x{4 * h}", "pointwise", lambda: Apply(F.gelu), (TOKENS, 4 * h))
        yield (
            {"curve": "embedding", "width": h},
            simple(f"embedding {VOCABULARY}x{h}, {TOKENS}", "embedding", lambda h=h: nn.Embedding(VOCABULARY, h), (VOCABULARY, (8, TOKENS // 8)), table=True),
        )  # type: ignore[misc]


def host_times(clock: Clock, device: str, count: int = 200) -> dict[str, list[float]]:
    """Seconds of the host for one operator on small operands, in bfloat16: queueing forward with autograd's graph, and its backward."""
    h, dtype = 64, torch.bfloat16
    x = torch.randn(2, 16, h, device=device, dtype=dtype, requires_grad=True)
    heads = torch.randn(2, 4, 16, 16, device=device, dtype=dtype, requires_grad=True)
    layer, norm = nn.Linear(h, h, device=device, dtype=dtype), nn.LayerNorm(h, device=device, dtype=dtype)
    kinds: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {
        "linear": (x, layer),
        "layer norm": (x, norm),
        "gelu": (x, F.gelu),
        "add": (x, lambda t: t + x),
        "transpose": (heads, lambda t: t.transpose(1, 2)),
        "attention": (heads, lambda t: F.scaled_dot_product_attention(t, heads, heads, is_causal=True)),
    }
    out = {}
    for name, (start, fn) in kinds.items():
        taken = []
        for _ in range(5):
            t = start
            begin = time.perf_counter()
            for _ in range(count):
                t = fn(t)
            middle = time.perf_counter()
            t.sum().backward()
            taken.append((middle - begin, time.perf_counter() - middle))
            clock.wall(lambda: None)
        out[name] = [statistics.median(part) / count for part in zip(*taken, strict=True)]
    return out


def steps(clock: Clock, device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    small = device == "cpu"
    for name, (h, heads, layers) in MODELS.items():
        for length in (2048, 8192):
            for way in ("foreach", "fused"):
                if way == "fused" and name != "125m":
                    continue

                def run(h: int = h, heads: int = heads, layers: int = layers, length: int = length, way: str = way, name: str = name) -> dict[str, Any]:
                    sizes = (256, 2, 64, 2, 64) if small else (VOCABULARY, layers, h, heads, length)
                    with torch.device(device):
                        module = GPT(*sizes).to(torch.bfloat16)
                    out = tokens(clock, device, module, 1 if small else TOKENS // length, sizes[4], sizes[0], way, False)
                    return {"name": f"gpt {name}, {length} tokens, {way}", **out}

                yield f"gpt {name} {length} {way}", run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no further operator or step is begun")
    options = parser.parse_args()
    begin = time.perf_counter()
    cuda = torch.cuda.is_available()
    clock, device = Clock(cuda), "cuda" if cuda else "cpu"
    found: dict[str, Any] = {"card": torch.cuda.get_device_name() if cuda else "no GPU", "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {"left out": [], "host": {}, "operators": [], "steps": []}
    torch.manual_seed(0)

    def kept(name: str, what: Callable[[], None]) -> None:
        """What fails or comes too late is named; the rest goes on."""
        if time.perf_counter() - begin > options.budget:
            found["left out"].append(f"{name}: no time left")
            return
        try:
            what()
        except (RuntimeError, torch.OutOfMemoryError) as error:
            found["left out"].append(f"{name}: {str(error).splitlines()[0]}")
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        if cuda:
            torch.cuda.empty_cache()

    kept("host", lambda: found["host"].update(host_times(clock, device)))
    for point, case in cases():
        place = device if cuda else "meta"  # a trial without a GPU computes no operator
        kept(f"{case.name} {point}", lambda point=point, case=case, place=place: found["operators"].append(point | measure(case, "bfloat16", clock, place)))  # type: ignore[misc]
    print(f"operators done after {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    for name, step in steps(clock, device):
        kept(name, lambda step=step: found["steps"].append(step()))  # type: ignore[misc]
    print(f"{found['card']}: done after {time.perf_counter() - begin:.0f} s; left out: {found['left out']}", file=sys.stderr)


if __name__ == "__main__":
    main()
