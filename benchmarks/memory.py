"""Predicted and measured memory of the models of benchmarks/fidelity.py, plan by plan: every rank a thread of this process, one step of each plan.

python -m benchmarks.memory [--models lstm,unet] [--ranks 2,4] [--plans gpipe,1f1b]

"found" is what a search for processes on this kind of host finds without measuring anything. The table goes to benchmarks/results/memory.md, the rows of all
plans to memory.json; models and ranks that aren't run keep their rows. Bytes are counted as tests/unit/test_memory.py does: deterministic, so that no
quiet machine is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity_models import MODELS, Case
from benchmarks.worker_fidelity import SIMULATIONS, plans_of
from tests.unit.test_memory import peaks
from torch_soap import Machine
from torch_soap.capture import capture
from torch_soap.plan import as_plan
from torch_soap.planner import search_plan
from torch_soap.rewrite.graph_import import to_op_graph

RESULTS = Path(__file__).parent / "results"
BAR = 0.03


def rows_of(model: str, num_ranks: int, only: list[str] | None) -> dict[str, dict[str, list[int]]]:
    """By plan: bytes of each rank."""
    torch.manual_seed(0)
    case: Case = MODELS[model]()
    batch = case.batch(case.rows * num_ranks)
    captured = capture(case.module, tuple(t[: case.rows].contiguous() for t in batch), {}, loss=case.loss, check=False)
    graph = captured.instantiate(captured._signature_of(list(batch)))
    op_graph, rows = to_op_graph(graph), [case.rows] * num_ranks
    machine = Machine.preset("cpu-10g", devices_per_host=num_ranks)
    found = search_plan(op_graph, graph, rows, comm=None, machine=machine, simulations=SIMULATIONS)
    out = {}
    for label, text in plans_of(op_graph, found, rows).items():
        if only is None or label in only:
            predicted, measured = peaks(captured, graph, op_graph, as_plan(text, op_graph, num_ranks).strategy, rows, batch)
            out[label] = {"predicted": predicted, "measured": measured}
            print(f"{model:<13} {num_ranks} {label:<11} {error(out[label]):+7.2%}  {max(measured) / 1e6:8.2f} MB", flush=True)
    return out


def error(plan: dict[str, list[int]]) -> float:
    """Of the fullest rank, relative: below 0 where more was held than predicted."""
    return max(plan["predicted"]) / max(plan["measured"]) - 1


def table(every: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "# Predicted and measured memory",
        "",
        f"`python -m benchmarks.memory`, torch {torch.__version__}: tensor bytes of the fullest rank, predicted over measured; bar {BAR:.0%}.",
        "",
        "| model, ranks | plans | mean error | largest | of plan | plans within the bar |",
        "|---|---|---|---|---|---|",
    ]
    for name, plans in every.items():
        errors = {label: error(p) for label, p in plans.items()}
        worst = max(errors, key=lambda label: abs(errors[label]))
        within = sum(abs(e) <= BAR for e in errors.values())
        mean = statistics.mean(map(abs, errors.values()))
        lines.append(f"| {name} | {len(plans)} | {mean:.1%} | {errors[worst]:+.1%} | {worst} | {within} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--plans", help="only these; nothing is written then")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = RESULTS / "memory.json"
    every = json.loads(path.read_text()) if path.exists() else {}
    for num_ranks in map(int, options.ranks.split(",")):
        for model in options.models.split(","):
            rows = rows_of(model, num_ranks, options.plans.split(",") if options.plans else None)
            if not options.plans:
                every[f"{model}, {num_ranks}"] = rows
                path.write_text(json.dumps(every) + "\n")
                (RESULTS / "memory.md").write_text("\n".join(table(every)) + "\n")
    if not options.plans:
        print("\n".join(table(every)))


if __name__ == "__main__":
    main()
