"""Published throughputs of training runs whose setup is stated, and what we predict for them (docs/scaling.md).

benchmarks/published.csv has a line for each row: `sequences` of `length` tokens in a micro-batch of each replica, `micro_batches` of them, `tp` ranks to a
tensor parallel group, `zero` 3 (FULL_SHARD) or 2 (SHARD_GRAD_OP), the kernel of its attention, tokens per second and GPU.

One row for each machine, its `fixed_by`, fixes one number: all efficiencies of the preset times `scale`, so that this row's step is as long as published.
All other rows are predicted. What a kernel of attention reached on the very card is known from a source and isn't scaled.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu_table import curves
from examples.gpt import GPT
from examples.llama import llama
from torch_soap import _C, Machine
from torch_soap.planner import graph_for

TABLE = Path(__file__).parent / "published.csv"
FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/8c8dd48f/scripts/train/benchmarking/README.md"
TITAN = "https://github.com/pytorch/torchtitan/blob/b5bcd76c/benchmarks/"
SOURCES = {
    "llm-foundry": FOUNDRY + ": tables by GPU, rows of 2,048 and 8,192 tokens in 16-bit types without offloading (model sizes: scripts/train/yamls/pretrain)",
    "torchtitan-2024": TITAN + "llama3_h100_202412_torchtitan.md: tables 1 and 3 without float8",
    "torchtitan-2025": TITAN + "asyncTP_llama3_h100_2025-06_torchtitan.md: bfloat16, vanilla TP",
}
# MPT: width, heads, layers. It is GPT-2's architecture without biases; vocabulary 50,368, positions learned.
MPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 16, 24),
    "760m": (1536, 12, 24),
    "1b": (2048, 16, 24),
    "3b": (2560, 20, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}
GIGA = 10**9
VOCABULARY = 50368
# What each kernel of attention reaches of FlashAttention-2, forward and backward. FlashAttention in Triton: "around 1.3-1.5x" and "around 2x" slower
# (arXiv:2307.08691, section 4.1).
KERNEL_SOURCE = "arXiv:2307.08691, figures 4 and 5 (A100) and section 4.1 (Triton); benchmarks/results/gpu_shapes_h100_2026-11-26.md (H100)"
KERNELS = {"flash-2": (1.0, 1.0), "triton": (1 / 1.4, 1 / 2)}
# FlashAttention-2 on an H100: torch's flash backend, in a file that benchmarks/gpu_shapes.py wrote. On an A100 it is the preset's.
H100_SHAPES = Path(__file__).parent / "results" / "gpu_shapes_h100_2026-11-26.json"
# Composer evaluates its two training metrics in each micro-batch, both the cross entropy in float32 (v0.16.4, composer/trainer/trainer.py,
# _eval_train_metrics; llm-foundry, ComposerMPTCausalLM): for each logit 2 bytes read and 4 written by the cast, 4 read and 4 written by log_softmax.
METRICS, METRIC_BYTES = 2, 14


@dataclass(frozen=True)
class Row:
    machine: str
    model: str
    length: int
    gpus: int
    sequences: int
    micro_batches: int
    tp: int
    zero: int
    recompute: str  # "none", "all" blocks, or "selective": operators, about half of their work
    attention: str  # one of KERNELS
    tokens_per_s: float
    source: str

    @property
    def dp(self) -> int:
        return self.gpus // self.tp

    @property
    def batch(self) -> int:
        return self.dp * self.sequences * self.micro_batches

    @property
    def step_s(self) -> float:
        return self.batch * self.length / self.gpus / self.tokens_per_s


@dataclass(frozen=True)
class Cluster:
    """A preset, and what the publication says that is different. Hosts of 8."""

    what: str
    preset: str
    fixed_by: tuple[str, int, int]  # model, length, GPUs
    memory_bytes_per_s: float | None = None
    memory_bytes: int | None = None
    other_card: bool = False  # than that which kernels of attention were measured on: their parts are scaled as all others
    composer: bool = False  # the program is MosaicML's: METRICS, and a loss that is one kernel (llm-foundry's fused_crossentropy)

    def machine(self, gpus: int, scale: float, attention: str) -> Machine:
        out = Machine.preset(self.preset, hosts=max(gpus // 8, 1), devices_per_host=min(gpus, 8))
        out.memory_bytes_per_s = self.memory_bytes_per_s or out.memory_bytes_per_s
        out.memory_bytes = self.memory_bytes or out.memory_bytes
        out.efficiency = {family: part * scale for family, part in out.efficiency.items()}
        if self.composer:  # all that is "other" in a GPT is its loss: one pass over the logits forward and two backward
            out.efficiency = {**out.efficiency, "other": out.efficiency["pointwise"]}
        forward, backward = KERNELS[attention]
        of_attention = scale if self.other_card else 1.0
        out.curves = scaled(out.curves, scale, scale) | scaled(flash_2(self.preset), forward * of_attention, backward * of_attention)
        return out

    def metrics_s(self, row: Row, machine: Machine) -> float:
        """What the program computes beside its step, in each micro-batch."""
        elements = row.micro_batches * row.sequences * row.length * VOCABULARY
        return METRICS * METRIC_BYTES * elements / machine.memory_bytes_per_s / machine.efficiency["pointwise"] if self.composer else 0.0


Curves = dict[str, list[tuple[float, float, float]]]


def scaled(by_key: Curves, forward: float, backward: float) -> Curves:
    return {key: [(size, f * forward, b * backward) for size, f, b in points] for key, points in by_key.items()}


@cache
def flash_2(preset: str) -> Curves:
    machine = Machine.preset(preset)
    found = curves(machine, json.loads(H100_SHAPES.read_text()), "flash") if preset == "h100" else machine.curves
    return {key: points for key, points in found.items() if key.startswith("attention/bfloat16")}


CLUSTERS = {
    "h100-mosaic": Cluster("H100 80 GB, MosaicML", "h100", ("mpt-7b", 2048, 128), composer=True),
    "a100-80-mosaic": Cluster("A100 80 GB, MosaicML, 1,600 Gb/s for a host", "a100", ("mpt-7b", 2048, 8), composer=True),
    # NVIDIA A100 data sheet (2021): 1,555 GB/s of the 40 GB card
    "a100-40-mosaic": Cluster("A100 40 GB, MosaicML, 1,600 Gb/s for a host", "a100", ("mpt-7b", 2048, 128), 1555 * GIGA, 40 * GIGA, composer=True),
    # "96GB HBM2e with 2.4 TB/sec", 500 W
    "h100-titan-eager": Cluster("H100 96 GB at 500 W, torchtitan", "h100", ("llama-8b", 8192, 8), 2400 * GIGA, 96 * GIGA, other_card=True),
    "h100-titan-compiled": Cluster("H100 96 GB at 500 W, torchtitan, torch.compile", "h100", ("llama-8b", 8192, 8), 2400 * GIGA, 96 * GIGA, other_card=True),
}


def read_rows(lines: Iterable[str]) -> list[Row]:
    """Of a table in the form of published.csv. Raises ValueError naming the line that makes no sense."""
    out = []
    for number, found in enumerate(csv.DictReader(lines), 2):
        whole = {k: int(found[k]) for k in ("length", "gpus", "sequences", "micro_batches", "tp", "zero")}
        text = {k: found[k] for k in ("machine", "model", "recompute", "attention", "source")}
        row = Row(**text, **whole, tokens_per_s=float(found["tokens_per_s"]))
        if row.machine not in CLUSTERS or row.source.split()[0] not in SOURCES or row.attention not in KERNELS:
            raise ValueError(f"line {number}: no such machine, source or attention: {row.machine}, {row.source}, {row.attention}")
        if row.gpus % row.tp or row.zero not in (2, 3) or row.recompute not in ("none", "all", "selective") or row.tokens_per_s <= 0:
            raise ValueError(f"line {number}: {row}")
        out.append(row)
    return out


def rows() -> list[Row]:
    return read_rows(TABLE.read_text().splitlines())


def module_of(model: str, length: int) -> nn.Module:
    family, size = model.split("-")
    if family == "llama":
        return llama(size, length)
    width, heads, layers = MPT[size]
    with torch.device("meta"):
        return GPT(VOCABULARY, layers, width, heads, length).to(torch.bfloat16)


class Pricer:
    """Rows of one model and length, captured once with a batch of which all of theirs are parts."""

    def __init__(self, model: str, length: int, batches: Iterable[int]) -> None:
        self.batch = math.lcm(*batches)
        tokens = torch.zeros(self.batch, length, dtype=torch.long, device="meta")
        self.graph = graph_for(module_of(model, length), (tokens, tokens), None, 1)[0]
        self.of_batch = cache(lambda batch: _C.replica_graph(self.graph, self.batch // batch))

    def price(self, row: Row, machine: Machine, recompute: bool, fsdp: bool) -> _C.GridPrice:
        options = _C.ManualOptions()
        options.dp, options.tp, options.zero, options.micro_batches = row.dp, row.tp, row.zero, row.micro_batches
        options.sequence, options.recompute, options.fsdp = row.tp > 1, recompute, fsdp
        options.order = _C.Order.interleaved if row.micro_batches > 1 else options.order
        return _C.grid_price(self.of_batch(row.batch), row.gpus, _C.CostModel(machine), options)

    def step_s(self, row: Row, cluster: Cluster, scale: float, fsdp: bool = True) -> float:
        """Selective recomputation, which grids don't have, is half of that of whole blocks."""
        machine = cluster.machine(row.gpus, scale, row.attention)
        ways = {"none": (False,), "all": (True,), "selective": (False, True)}[row.recompute]
        return sum(self.price(row, machine, again, fsdp).step_ns for again in ways) / len(ways) / 1e9 + cluster.metrics_s(row, machine)


def scale_for(pricer: Pricer, row: Row, cluster: Cluster) -> float:
    """Of all efficiencies, so that this row's step is as long as published."""
    low, high = 0.2, 5.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pricer.step_s(row, cluster, middle) > row.step_s else (low, middle)
    return math.sqrt(low * high)


@dataclass(frozen=True)
class Predicted:
    row: Row
    fixed: bool
    step_s: float
    own_step_s: float  # with this runtime's own exchanges in place of FSDP's rings

    @property
    def error(self) -> float:
        """Of the time of a step; above 0 where it is predicted longer than it was."""
        return self.step_s / self.row.step_s - 1


def predict(cluster_name: str, table: list[Row]) -> tuple[float, Iterator[Predicted]]:
    cluster = CLUSTERS[cluster_name]
    mine = [r for r in table if r.machine == cluster_name]
    fixed = next(r for r in mine if (r.model, r.length, r.gpus) == cluster.fixed_by)

    def pricer(row: Row) -> Pricer:
        alike = {r.batch for r in table if r.model == row.model and r.length == row.length}
        return pricer_for(row.model, row.length, tuple(sorted(alike)))

    scale = scale_for(pricer(fixed), fixed, cluster)

    def each() -> Iterator[Predicted]:
        for row in mine:
            yield Predicted(row, row == fixed, pricer(row).step_s(row, cluster, scale), pricer(row).step_s(row, cluster, scale, fsdp=False))

    return scale, each()


@cache
def pricer_for(model: str, length: int, batches: tuple[int, ...]) -> Pricer:
    return Pricer(model, length, batches)
