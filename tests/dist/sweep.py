"""`make test-processes`: every model on 2, 3 and 4 real processes under random plans, against one process.

Writes benchmarks/results/processes.md and .json. Random delays come before the collectives of random ranks.

    python tests/dist/sweep.py [--models a,b] [--worlds 2,3,4] [--plans 6]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.dist.launch import revision, torchrun  # noqa: E402
from tests.models import CASES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("float64", "float32")


def run_model(name: str, world: int, runs: list[str]) -> dict[str, Any]:
    """Results by run; a launch that failed is started again with what comes after the failure."""
    results: dict[str, Any] = {}
    left = list(runs)
    while left:
        outcome = torchrun(world, "tests.dist.worker_sweep", name, *left, timeout_s=900 * len(left))
        parts = [r or {} for r in outcome.results]
        done = [run for run in left if any(run in p for p in parts)] or left[:1]
        for run in done:
            reports = [p.get(run, {"failure": outcome.output[-2000:].replace(str(ROOT), ".")}) for p in parts]
            failed = next((r for r in reports if "failure" in r and "plan" in r), next((r for r in reports if "failure" in r), None))
            results[run] = failed or max(reports, key=lambda r: r["error"])
        left = [run for run in left if run not in done]
    return results


def is_ok(result: dict[str, Any]) -> bool:
    return "error" in result and result["error"] <= result["allowed"]


def write_report(everything: dict[str, dict[str, Any]], seconds: float, worlds: list[int], plans: int, of: str) -> str:
    import torch

    flat = [(key, run, r) for key, runs in everything.items() for run, r in runs.items()]
    bad = [(key, run, r) for key, run, r in flat if not is_ok(r)]
    used = sorted({u for _, _, r in flat for u in r.get("used", [])})
    lines = [
        "# Real processes against one process",
        "",
        f"`make test-processes`: {len(flat)} trainings of 3 steps ({plans} random plans a model, {', '.join(map(str, worlds))} ranks, float64 and float32, random delays), "
        f"{len(bad)} failures, {seconds / 60:.0f} minutes. Revision {of}, torch {torch.__version__}, gloo, {platform.machine()}.",
        "",
        f"The plans used: {', '.join(used)}.",
        "",
        "Worst difference over all plans: in float64 of any loss, parameter or buffer (bound 1e-10), in float32 of the losses and of the state as one\nvector (1e-3, or ten times what one unit in the last place of the weights moves in one process, where that is more; then it is in brackets).",
        "",
        "| model | " + " | ".join(f"{w} ranks {t}" for w in worlds for t in ("fp64", "fp32")) + " |",
        "|---|" + "---|" * (2 * len(worlds)),
    ]
    for name in dict.fromkeys(key.split("@")[0] for key in everything):
        cells = []
        for w in worlds:
            for dtype in DTYPES:
                runs = {run: r for run, r in everything.get(f"{name}@{w}", {}).items() if run.endswith(dtype)}
                failures = sum(not is_ok(r) for r in runs.values())
                worst = max((r for r in runs.values() if "error" in r), key=lambda r: r["error"], default=None)
                text = "-" if worst is None else f"[{worst['error']:.0e}]" if worst["allowed"] > 1e-3 else f"{worst['error']:.0e}"
                cells.append(text + (f", {failures} of {len(runs)} failed" if failures else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for key, run, r in bad:
        lines_of = r.get("failure", f"{r.get('where')} differs by {r.get('error', 0):.2e}").strip().splitlines()
        what = next((line for line in reversed(lines_of) if "Error" in line), lines_of[-1])
        lines.append(f"\n- {key} seed {run}: {what}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "processes.md").write_text("\n".join(lines) + "\n")
    rows = [json.dumps({"model": key.split("@")[0], "ranks": int(key.split("@")[1]), "run": run, **r}) for key, run, r in flat]
    (RESULTS / "processes.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")
    return "\n".join(lines)


def finished() -> dict[str, dict[str, Any]]:
    """What the report in benchmarks/results has, by model and ranks, by run."""
    out: dict[str, dict[str, Any]] = {}
    for row in json.loads((RESULTS / "processes.json").read_text()):
        out.setdefault(f"{row.pop('model')}@{row.pop('ranks')}", {})[row.pop("run")] = row
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(c.name for c in CASES))
    parser.add_argument("--worlds", default="2,3,4")
    parser.add_argument("--plans", type=int, default=6)
    parser.add_argument("--resume", action="store_true", help="keep what the last, interrupted sweep has finished")
    options = parser.parse_args()
    worlds = [int(w) for w in options.worlds.split(",")]
    runs = [f"{seed}:{dtype}" for seed in range(options.plans) for dtype in DTYPES]
    start = time.perf_counter()
    everything: dict[str, dict[str, Any]] = finished() if options.resume else {}
    for name in options.models.split(","):
        for world in worlds:
            if f"{name}@{world}" in everything:
                continue
            results = everything[f"{name}@{world}"] = run_model(name, world, runs)
            good = sum(map(is_ok, results.values()))
            print(f"{name} on {world} ranks: {good} of {len(results)} ok ({time.perf_counter() - start:.0f} s)", flush=True)
            text = write_report(everything, time.perf_counter() - start, worlds, options.plans, revision())
    print("\n" + text)
    return 0 if all(is_ok(r) for runs in everything.values() for r in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
