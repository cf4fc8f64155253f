"""Real models: how each is captured, whether random plans of it are exact, what of it can't be cut, what plan is found. `make zoo`.

python -m benchmarks.zoo [PATTERN ...]      writes benchmarks/results/zoo.md and .json: only what ran is replaced there
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import multiprocessing
import queue
import re
import time
import traceback
import unittest.mock
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

from benchmarks.zoo_models import zoo
from torch_soap import _C
from torch_soap.capture import Captured, capture
from torch_soap.planner import search_plan
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.testing import random_plan_of
from torch_soap.verify import RankResult, as_arguments, even_rows, run_rank, run_reference, verify_captured

RESULTS = Path(__file__).parent / "results"
PLANS = ((2, 0), (3, 1))  # (ranks, seed)
STEPS = 2
LARGE = 400  # operators: one plan only


class InDouble(TorchFunctionMode):
    """Code that asks for float32 gets float64, so that errors show: many models compute their norms and softmaxes in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def run_rank_in_double(*arguments: Any) -> RankResult:
    """A rank's thread: what is opaque runs the model's own code."""
    with InDouble():
        return run_rank(*arguments)


def captured_model(name: str) -> Captured:
    torch.manual_seed(0)
    module, inputs, loss = zoo()[name]()
    torch.set_default_dtype(torch.float64)
    args, kwargs = as_arguments(inputs)
    args, kwargs = pytree.tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs))
    return capture(module.train().double(), args, kwargs, loss=loss)


def rung(captured: Captured) -> str:
    if captured.opaque:
        return "one operator" if captured.opaque == [""] else "opaque children"
    return "dynamic" if captured.dynamic else "static"


def conditioning(captured: Captured, inputs: list[torch.Tensor]) -> float:
    """How far one process' gradients move when its weights move by a unit in the last place: no run can be closer than that."""
    saved = {n: t.clone() for n, t in captured.module.state_dict().items()}
    runs = []
    for ulps in (0, 1):
        captured.module.load_state_dict({n: t * (1 + ulps * 2.0**-52) if t.is_floating_point() else t for n, t in saved.items()})
        runs.append(run_reference(captured, inputs, STEPS, 0).grads)
    captured.module.load_state_dict(saved)
    moved = 0.0
    for before, after in zip(*runs, strict=True):
        sizes = {n: float(g.abs().max()) for n, g in before.items() if g is not None}
        for n, size in sizes.items():
            moved = max(moved, float((after[n] - before[n]).abs().max()) / max(size, 1e-2 * max(sizes.values()), 1e-300))  # type: ignore[operator]
    return moved


def whole_operators(graph: _C.OpGraph) -> tuple[int, dict[str, int]]:
    """How many operators there are that make more than a number, and which of them no plan can cut."""
    total, whole = 0, collections.Counter[str]()
    for node in graph.nodes:
        if node.kind != _C.NodeKind.op or all(max(graph.tensors[o].shape, default=1) <= 1 for o in (*node.inputs, *node.outputs)):
            continue
        total += 1
        factors = [f for f in _C.make_rule(graph, node, 2).factors if f.cut != _C.Cuttable.whole and f.size > 1]
        whole[node.target] += not factors
    return total, {k: n for k, n in whole.items() if n}


def examine(name: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with warnings.catch_warnings(), InDouble(), unittest.mock.patch("torch_soap.verify.run_rank", run_rank_in_double):
        warnings.simplefilter("ignore")
        begin = time.perf_counter()
        captured = captured_model(name)
        result |= {
            "rung": rung(captured),
            "opaque": captured.opaque,
            "reasons": captured.reasons,
            "promised": captured.exact,
            "capture_s": time.perf_counter() - begin,
        }
        inputs = [captured.leaves[i] for i in captured.tensor_slots]
        captured_graph = captured.instantiate(captured._signature_of(inputs))
        graph = to_op_graph(captured_graph)
        result["operators"], result["whole"] = whole_operators(graph)
        worst = 0.0
        result["failures"] = []
        for ranks, seed in PLANS if result["operators"] < LARGE else PLANS[:1]:
            try:
                report = verify_captured(captured, random_plan_of(captured, ranks, seed), steps=STEPS, dtype=torch.float64, seed=seed)
            except Exception:
                result["failures"].append(f"{ranks} ranks, seed {seed}: {traceback.format_exc(limit=-4)}")
                continue
            worst = max(worst, report.worst.error if report.worst else 0.0)
            if not report.ok and not report.failures and worst <= 10 * conditioning(captured, inputs):
                result["conditioned"] = True
            elif not report.ok:
                result["failures"].append(f"{ranks} ranks, seed {seed}: {str(report)[:1500]}")
        result["worst"], result["exact"] = worst, not result["failures"]
        begin = time.perf_counter()
        try:
            total = next((t.shape[d] for t, d in zip(inputs, captured.batch_dims, strict=True) if d is not None), 2)
            plan = search_plan(graph, captured_graph, even_rows(total, 2), comm=None, machine=_C.Machine(2))
            result["plan"] = plan.predicted["chosen"]
            result["lines"] = len(plan.text.splitlines())
        except Exception:
            result["failures"].append(f"plan: {traceback.format_exc(limit=-4)}")
        result["plan_s"] = time.perf_counter() - begin
    return result


def child(name: str, out: Any) -> None:
    torch.set_num_threads(1)
    try:
        result = examine(name)
    except Exception:
        result = {"error": traceback.format_exc(limit=-4)}
    out.put(pytree.tree_map(without_folders, result))


def without_folders(item: Any) -> Any:
    return re.sub(r"/[^ \"]*/(?=[^/ \"]+\.py)", "", item) if isinstance(item, str) else item


def examined(name: str, limit_s: float) -> dict[str, Any]:
    """In a process of its own, which may die or take too long."""
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=child, args=(name, out))
    process.start()
    end = time.monotonic() + limit_s
    try:
        while time.monotonic() < end:
            try:
                return dict(out.get(timeout=1))
            except queue.Empty:
                if not process.is_alive():
                    return {"error": f"the process ended with {process.exitcode}"}
        return {"error": f"took more than {limit_s:.0f} s"}
    finally:
        process.kill()
        process.join()


def report(results: dict[str, dict[str, Any]]) -> str:
    ran = {n: r for n, r in results.items() if "rung" in r}
    rungs = collections.Counter(r["rung"] for r in ran.values())
    whole = collections.Counter[str]()
    for r in ran.values():
        whole.update(r["whole"].keys())
    lines = [
        "# Real models",
        "",
        f"`make zoo`: {len(results)} of its {len(zoo())} models so far, with random weights: "
        f"{len(ran)} captured ({', '.join(f'{n} {k}' for k, n in rungs.most_common())}), "
        f"{sum(r['exact'] for r in ran.values())} exact in float64 under {len(PLANS)} random plans, {STEPS} steps each "
        "(their own float32 computations in float64 too). Where more than 1e-10 differs, so does one process whose weights moved by a unit in "
        "the last place: few rows and 1 x 1 images before batch norms.",
        "",
        "Operators that no plan can cut, by the number of models that have one: " + ", ".join(f"{k} {n}" for k, n in whole.most_common()) + ".",
        "",
        "| model | capture | s | exact | worst error | operators | run whole | plan for 2 | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in sorted(results.items()):
        if name not in ran:
            lines.append(f"| {name} | - | | no: {r['error'].strip().splitlines()[-1][:100]} | | | | | |")
            continue
        share = sum(r["whole"].values()) / max(r["operators"], 1)
        exact = ("yes, as far as it is conditioned" if "conditioned" in r else "yes") if r["exact"] else "no" if r["promised"] else "no, as said"
        lines.append(
            f"| {name} | {r['rung']} | {r['capture_s']:.0f} | {exact} | {r['worst']:.0e} | {r['operators']} "
            f"| {share:.0%} | {r.get('plan', '-')} | {r['plan_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument("--missing", action="store_true", help="only models that have not been captured yet")
    options = parser.parse_args()
    path = RESULTS / "zoo.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in dict.fromkeys(n for p in options.patterns for n in fnmatch.filter(zoo(), p)):
        if options.missing and "rung" in results.get(name, {}):
            continue
        begin = time.perf_counter()
        results[name] = r = examined(name, options.limit)
        print(f"{name}: {json.dumps(r)} ({time.perf_counter() - begin:.0f} s)", flush=True)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        (RESULTS / "zoo.md").write_text(report(results))


if __name__ == "__main__":
    main()
