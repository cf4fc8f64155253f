"""The table of what benchmarks/gpu_efficiency.py or benchmarks/gpu_shapes.py measured, and how near our prediction for one device comes to its training steps.

python -m benchmarks.gpu_table benchmarks/results/gpu_h100_2026-11-26.json      writes the .md beside it
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import torch_soap
from benchmarks.gpu_shapes import KERNELS, LENGTHS, MODELS, TOKENS, VOCABULARY
from benchmarks.gpu_steps import GPT2, image_model, llama_sizes
from examples.gpt import GPT
from examples.llama import Llama
from torch_soap import Machine

CARDS = {"H100": "h100", "H200": "h200"}


def preset_of(card: str) -> Machine:
    (name,) = [preset for part, preset in CARDS.items() if part in card]
    return Machine.preset(name)


def rate(machine: Machine, family: str, kind: str) -> float:
    """The peak that the simulator counts with: convolutions and recurrent layers in float32 are those in TF32, as torch has it."""
    short = kind == "tf32" or (kind == "float32" and family in ("convolution", "recurrent"))
    return machine.flops_by_dtype["tf32" if short else kind]


def parts(machine: Machine, operator: dict[str, Any]) -> tuple[float, float]:
    """Of the preset's peak: forward, and forward with backward, which counts three times forward."""
    bound = max(operator["flops"] / rate(machine, operator["family"], operator["type"]), operator["bytes"] / machine.memory_bytes_per_s)
    return bound / operator["forward"]["s"], 3 * bound / operator["both"]["s"]


def counted(operator: dict[str, Any]) -> bool:
    """Convolutions without TF32 aren't how torch runs them unless it is told to."""
    return (operator["family"], operator["type"]) != ("convolution", "float32")


def efficiencies(machine: Machine, operators: list[dict[str, Any]]) -> dict[str, tuple[float, float, float, int]]:
    """By family: median part of forward; of forward with backward, its median and spread (largest over smallest); how many."""
    out = {}
    for family in dict.fromkeys(o["family"] for o in operators):
        found = [parts(machine, o) for o in operators if o["family"] == family and counted(o)]
        both = [b for _, b in found]
        out[family] = statistics.median(f for f, _ in found), statistics.median(both), max(both) / min(both), len(found)
    return out


def curves(machine: Machine, found: dict[str, Any], kernel: str = "as it comes") -> dict[str, list[tuple[float, float, float]]]:
    """Of what benchmarks/gpu_shapes.py measured, in the form of `Machine.curves`: medians of the parts that forward and backward alone reach, by size. The
    smallest of a product's three sizes, the keys of attention with this kernel by width of a head, the elements of a row that is normalized."""
    points: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for o in found["operators"]:
        if o["curve"] == "matmul":
            key, size = "matmul/bfloat16", min(o["rows"], o["in"], o["out"])
        elif o["curve"] == "attention" and o["kernel"] == kernel:
            key, size = f"attention/bfloat16/{o['width']}", o["length"]
        elif o["curve"] == "normalization":
            key, size = "normalization/bfloat16", o["width"]
        else:
            continue
        bound = max(o["flops"] / machine.flops_by_dtype["bfloat16"], o["bytes"] / machine.memory_bytes_per_s)
        backward = o["both"]["s"] - o["forward"]["s"]
        points.setdefault(key, {}).setdefault(size, []).append((bound / o["forward"]["s"], 2 * bound / backward))
    return {
        key: [(size, statistics.median(f for f, _ in parts), statistics.median(b for _, b in parts)) for size, parts in sorted(by_size.items())]
        for key, by_size in points.items()
    }


def token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def images(name: str, rows: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
    with torch.device("meta"):
        return image_model(name), (torch.randn(rows, 3, 224, 224), torch.zeros(rows, dtype=torch.long)), F.cross_entropy


def tokens(module: torch.nn.Module, batch: int, length: int) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
    t = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return module, (t, t), token_loss


def predicted(machine: Machine, name: str) -> dict[str, Any] | None:
    """Of a step of benchmarks/gpu_steps.py; None where we have no such prediction (autocast, torch.compile)."""
    words = name.split()
    if "autocast" in words or "compiled" in words:
        return None
    with torch.device("meta"):
        if words[0] == "gpt-2":
            module, batch, loss = tokens(GPT(**GPT2).to(torch.bfloat16), 8, GPT2["context"])
        elif words[0] == "gpt":
            h, heads, layers = MODELS[words[1].rstrip(",")]
            length = int(words[2])
            module, batch, loss = tokens(GPT(VOCABULARY, layers, h, heads, length).to(torch.bfloat16), TOKENS // length, length)
        elif words[0] == "llama":
            module, batch, loss = tokens(Llama(llama_sizes(int(words[1]), False), 8192).to(torch.bfloat16), 2 if "two" in words else 1, 8192)
        else:
            module, batch, loss = images(words[0], 128 if words[0] == "alexnet" else 64)
    machine.tf32 = "tf32" in words
    if "float32" in words:
        machine.flops_by_dtype = {k: v for k, v in machine.flops_by_dtype.items() if k != "tf32"}
    return torch_soap.manual_plan(module, batch, loss=loss, machine=machine).predicted


def shapes_table(found: dict[str, Any]) -> str:
    machine = preset_of(found["card"])
    lines = [
        f"# What {found['card']} reaches, by shape",
        "",
        f"`python -m benchmarks.gpu_shapes` with torch {found['torch']}, then `python -m benchmarks.gpu_table`. Parts of the preset's peak rates in bfloat16,",
        f"counted as csrc/cost/work.h counts, of forward and of backward alone (twice the work of forward); {TOKENS:,} tokens.",
        "",
        "| causal attention: heads | tokens | " + " | ".join(KERNELS) + " |",
        "|---|---|" + "---|" * len(KERNELS),
    ]
    by_kernel = {kernel: curves(machine, found, kernel) for kernel in KERNELS}
    for width in (64, 128):
        for i, length in enumerate(LENGTHS):
            points = [by_kernel[kernel][f"attention/bfloat16/{width}"][i] for kernel in KERNELS]
            lines.append(f"| {width} wide | {length:,} | " + " | ".join(f"{f:.2f}, {b:.2f}" for _, f, b in points) + " |")
    for key, head in (("matmul", "products by the smallest of rows, columns and contraction"), ("normalization", "norms and softmax by the elements of a row")):
        lines += ["", f"| {head} | forward | backward |", "|---|---|---|"]
        lines += [f"| {size:,} | {f:.2f} | {b:.2f} |" for size, f, b in by_kernel["as it comes"][f"{key}/bfloat16"]]
    lines += ["", "| host, us to queue one on small operands | forward with autograd's graph | backward |", "|---|---|---|"]
    lines += [f"| {name} | {f * 1e6:.0f} | {b * 1e6:.0f} |" for name, (f, b) in found["host"].items()]
    return "\n".join(lines + steps_table(found)) + "\n"


def steps_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "Training steps (AdamW) against our prediction for one device of this preset: `manual_plan`, nothing fitted to them.",
        "",
        "| step | measured ms | predicted ms | error | host ms | peak GiB | predicted GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in found["steps"]:
        ours = predicted(preset_of(found["card"]), step["name"])
        head = f"| {step['name']} | {step['step_s'] * 1e3:.1f} "
        tail = f"| {step['host_s'] * 1e3:.1f} | {step['peak_bytes'] / 2**30:.1f} "
        if ours is None:
            lines.append(head + "| | " + tail + "| |")
            continue
        s = ours["step_time_ns"] / 1e9
        lines.append(head + f"| {s * 1e3:.1f} | {s / step['step_s'] - 1:+.0%} " + tail + f"| {max(ours['memory_bytes']) / 2**30:.1f} |")
    return lines


def table(found: dict[str, Any]) -> str:
    machine = preset_of(found["card"])
    (ceilings,), (launches,), (updates,) = found["ceilings"], found["launches"], found["updates"]
    lines = [
        f"# What {found['card']} reaches",
        "",
        f"`python -m benchmarks.gpu_efficiency` with torch {found['torch']}, then `python -m benchmarks.gpu_table`. Parts of the preset's peak rates,",
        "counted as csrc/cost/work.h counts; medians over the shapes of each family, in float32, TF32 and bfloat16 (convolutions without TF32 are left out).",
        "",
        "| family | forward | forward and backward (three times forward) | largest over smallest | operators |",
        "|---|---|---|---|---|",
    ]
    for family, (forward, both, spread, count) in efficiencies(machine, found["operators"]).items():
        lines.append(f"| {family} | {forward:.2f} | {both:.2f} | {spread:.1f} | {count} |")
    lines += [
        "",
        f"A large copy {ceilings['copy'] / 1e12:.2f} TB/s, read and written; products of 8,192 x 8,192 "
        + ", ".join(f"{kind} {ceilings[kind] / 1e12:.0f}" for kind in ("float32", "tf32", "bfloat16"))
        + " TFLOP/s.",
        f"The host queues an addition in {launches['add'] * 1e6:.1f} us, a linear with autograd in {launches['linear with graph'] * 1e6:.1f} us and runs its "
        f"backward in {launches['linear backward'] * 1e6:.1f} us; the smallest kernel takes {launches['GPU time of one'] * 1e6:.1f} us.",
        "",
        "| AdamW | type | way | us | times the parameters' bytes at peak |",
        "|---|---|---|---|---|",
    ]
    for u in updates:
        lines.append(f"| {u['parameters']} | {u['type']} | {u['way']} | {u['s'] * 1e6:.0f} | {u['s'] * machine.memory_bytes_per_s / u['bytes']:.1f} |")
    lines += steps_table(found)
    lines += ["", "| operator | type | forward us | part | with backward us | part |", "|---|---|---|---|---|---|"]
    for o in found["operators"]:
        forward, both = parts(machine, o)
        lines.append(f"| {o['name']} | {o['type']} | {o['forward']['s'] * 1e6:.1f} | {forward:.2f} | {o['both']['s'] * 1e6:.1f} | {both:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        found = json.loads(path.read_text())
        text = shapes_table(found) if "host" in found else table(found)
        path.with_suffix(".md").write_text(text)
        print(text.split("\n| operator |")[0])
