"""The table of what benchmarks/gpu_launch.py measured, the figures of `Machine.launch` that follow, and how near our prediction of its steps comes with them.

python -m benchmarks.gpu_launch_table benchmarks/results/gpu_launch_h200_2026-11-26.json      writes the .md beside it
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

import torch_soap
from benchmarks.gpu_launch import COUNT, STEPS, mean_loss, operands, table
from benchmarks.gpu_table import preset_of
from torch_soap import _C

# The graph's name of what was measured; others count by their family alone.
NAMES = {
    "linear": "linear", "conv2d": "conv2d", "layer norm": "layer_norm", "batch norm": "batch_norm", "softmax": "softmax", "log softmax": "log_softmax",
    "gelu": "gelu", "relu": "relu", "add": "add", "multiply": "mul", "dropout": "dropout", "max pool": "max_pool2d", "cross entropy": "ce_rows",
}  # fmt: skip
# The script gives these one operand for all in a row, so that each backward adds to its gradient, this many times. So does an addition, as a residual's does
# in a model: one sum is what it takes beyond a view.
SUMS = {"matmul": 1, "multiply": 1, "attention": 2}
LEFT_OUT = ("concatenation",)  # of two selections, whose backward is most of it
# In the graph of their own, in torch within the call of another.
WITHIN = ("running_average", "ce_count")

Times = dict[str, tuple[float, float]]


def launch_times(found: dict[str, Any], way: str = "foreach") -> Times:
    """`Machine.launch` in ns, to a tenth of a microsecond: means over the types of an operator, medians over the operators of a family."""
    measured: dict[str, list[tuple[float, float]]] = {}
    families: dict[str, set[str]] = {}
    for o in found["operators"]:
        if o["name"] not in LEFT_OUT:
            measured.setdefault(o["name"], []).append((o["forward"]["s"], o["backward"]["s"]))
            families.setdefault(o["family"], set()).add(o["name"])
    means = {name: [statistics.mean(part) for part in zip(*times, strict=True)] for name, times in measured.items()}
    one_sum = means["add"][1] - means["view"][1]
    for name, count in SUMS.items():
        means[name][1] -= count * one_sum
    out = {NAMES[name]: means[name] for name in means if name in NAMES}
    for family, names in families.items():
        if family in (*_C.OP_FAMILIES, "view"):
            out[family] = [statistics.median(means[n][i] for n in names) for i in range(2)]
    out |= {name: [0.0, 0.0] for name in WITHIN}
    updates = {u["parameters"]: u["step"]["s"] + u["zero_grad"]["s"] for u in found["updates"] if u["way"] == way}
    few, many = min(updates), max(updates)
    each = (updates[many] - updates[few]) / (many - few)
    out["update"] = [updates[few] - few * each, each]
    out["collective"] = [statistics.median(c["s"] for c in found["collectives"]), 0.0]
    return {name: (round(forward * 1e7) * 100.0, round(backward * 1e7) * 100.0) for name, (forward, backward) in sorted(out.items())}


def predicted(machine: torch_soap.Machine, found: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """For one device of the machine, with the figures of that way of the optimizer."""
    _, make, _, dtype, _ = STEPS[step["name"]]
    with torch.device("meta"):
        module = make().to(getattr(torch, dtype))
    machine.tf32 = True
    machine.launch = {**machine.launch, "update": launch_times(found, step["way"])["update"]}
    return torch_soap.manual_plan(module, operands(step["name"], "meta"), loss=mean_loss, machine=machine).predicted


def steps_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "Our prediction for one device of the preset (`manual_plan`): a step is as long as the longer of what its device and its host take. Its figures of the",
        f"host are those above, each of {COUNT} operators in a row; nothing is fitted to these steps. Measured: steps in a row, and their quartiles.",
        "",
        "| training step | AdamW | measured ms | predicted ms | error | its device alone | its host alone | of one step alone, measured host |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for step in found["steps"]:
        p, took = predicted(preset_of(found["card"]), found, step), step["step"]
        times = f"{took['s'] * 1e3:.1f} ({took['q1'] * 1e3:.1f}-{took['q3'] * 1e3:.1f}) | {p['step_time_ns'] / 1e6:.1f}"
        parts = f"{p['device_step_ns'] / 1e6:.1f} | {max(p['host_ns']) / 1e6:.1f} | {step['host']['s'] * 1e3:.1f}"
        lines.append(f"| {step['name']} | {step['way']} | {times} | {p['step_time_ns'] / 1e9 / took['s'] - 1:+.0%} | {parts} |")
    return lines


def main() -> None:
    path = Path(sys.argv[1])
    found = json.loads(path.read_text())
    lines = ["", "| Machine.launch | forward us | backward us |", "|---|---|---|"]
    lines += [f"| {name} | {forward / 1e3:.1f} | {backward / 1e3:.1f} |" for name, (forward, backward) in launch_times(found).items()]
    text = table(found) + "\n".join(lines + steps_table(found)) + "\n"
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
