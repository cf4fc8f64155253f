"""Predicted against run step times: every model under a dozen plans or more, on two and four ranks, on one host and on two with 1 Gb/s between them.

python -m benchmarks.fidelity [--models gpt,lstm] [--ranks 2,4] [--networks loopback,1gbit] [--minutes 30] [--resume] [--rounds 2] [--steps 5]

Each (model, ranks, network) is one launch of processes, which writes one file of rows under out/fidelity/; `--resume` keeps the files that
are there. The table and all rows go to benchmarks/results/fidelity.{md,json}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.fidelity_models import MODELS
from tests.dist.hosts import NoHosts, torchrun_on, two_hosts
from tests.dist.launch import ROOT, Outcome, revision, torchrun

RESULTS = Path(__file__).parent / "results"
ROWS = ROOT / "out" / "fidelity"
NETWORKS = ("loopback", "1gbit")
RANKS = (2, 4)
LAUNCH_S = 900.0  # a launch that takes longer has failed
USUAL_S = 45.0  # of most, for the estimate
BARS = {"mean error": 0.05, "p95": 0.10, "tau": 0.9, "regret": 0.02, "memory": 0.03}


def launch(model: str, ranks: int, network: str, rounds: int, steps: int) -> Outcome:
    arguments = ("benchmarks.worker_fidelity", model, str(rounds), str(steps))
    if network == "loopback":
        return torchrun(ranks, *arguments, timeout_s=LAUNCH_S)
    with two_hosts(network) as hosts:
        return torchrun_on(hosts, ranks // 2, *arguments, timeout_s=LAUNCH_S)


def sweep(models: list[str], ranks: list[int], networks: list[str], rounds: int, steps: int, resume: bool, minutes: float = float("inf")) -> None:
    begin = time.monotonic()
    ROWS.mkdir(parents=True, exist_ok=True)
    every = [(*launch_of, ROWS / "{2}-{1}-{0}.json".format(*launch_of)) for launch_of in itertools.product(networks, ranks, models)]
    if resume:
        every = [x for x in every if not x[-1].exists() or "failed" in json.loads(x[-1].read_text())]
    print(f"{len(every)} launches, {len(every) * USUAL_S / 60:.0f} minutes at {USUAL_S:.0f} s each", flush=True)
    for network, world, model, path in tqdm(every, desc="launches", ncols=100):
        if time.monotonic() - begin > 60 * minutes:
            break
        started, at = time.monotonic(), revision()
        try:
            done = launch(model, world, network, rounds, steps)
            result = done.results[0] or {"failed": done.output[-3000:]}
        except NoHosts as error:
            result = {"failed": str(error)}
        except (subprocess.SubprocessError, OSError) as error:
            result = {"failed": f"{type(error).__name__}: {error}"}
        head = {"model": model, "ranks": world, "network": network, "revision": at, "launch_s": round(time.monotonic() - started, 1)}
        path.write_text(json.dumps({**head, **result}) + "\n")


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(ROWS.glob("*.json"))]


# -- figures ---------------------------------------------------------------------------------------------------------------
def kendall_tau(predicted: list[float], measured: list[float], noise: list[float] | None = None) -> float:
    """tau-b: 1 where both order all pairs alike; pairs that are equal in either count for neither (Kendall 1945). `noise`: of each that was measured; pairs
    that differ by no more than the larger of theirs are left out."""
    pairs = list(itertools.combinations(zip(predicted, measured, noise or [-1.0] * len(measured), strict=True), 2))
    signs = [(sign(a[0] - b[0]), sign(a[1] - b[1])) for a, b in pairs if abs(a[1] - b[1]) > max(a[2], b[2])]
    untied = [sum(s[i] != 0 for s in signs) for i in (0, 1)]
    return sum(p * m for p, m in signs) / max((untied[0] * untied[1]) ** 0.5, 1e-9)


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Of one launch."""
    plans = list(row["plans"].values())
    predicted = [p["predicted_ms"] for p in plans]
    measured = [statistics.median(p["measured_ms"]) for p in plans]
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    chosen = measured[predicted.index(min(predicted))]
    spreads = [iqr(p["measured_ms"]) for p in plans]
    noise = [spread / m for spread, m in zip(spreads, measured, strict=True)]
    drift = [statistics.mean(p["pace"]) for p in plans]
    memory = [abs(max(p["memory_bytes"]) / max(p["measured_bytes"]) - 1) for p in plans if "measured_bytes" in p]
    return {
        "plans": len(plans),
        "mean error": statistics.mean(errors),
        "p95": percentile(errors, 0.95),
        "tau": kendall_tau(predicted, measured),
        "tau beyond noise": kendall_tau(predicted, measured, spreads),
        "regret": chosen / min(measured) - 1,
        "memory": statistics.mean(memory) if memory else float("nan"),
        "noise": statistics.mean(noise),
        "drift": percentile(drift, 0.9) / percentile(drift, 0.1) - 1,
        "at its speed": statistics.mean(abs(p * d / m - 1) for p, m, d in zip(predicted, measured, drift, strict=True)),
        "bias": statistics.median(p / m for p, m in zip(predicted, measured, strict=True)),
    }


def iqr(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def table(rows: list[dict[str, Any]]) -> list[str]:
    whole = [r for r in rows if "plans" in r]
    measured = [(r, figures(r)) for r in whole]
    num_steps = max(len(p["measured_ms"]) for r in whole for p in r["plans"].values())
    lines = [
        "# Predicted and measured step times",
        "",
        "`python -m benchmarks.fidelity`: processes of one thread, shared memory within a host and TCP between hosts, AdamW; "
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
        f"the latest launch of each counts. Measured: median of up to {num_steps} steps, "
        "plan after plan, in rounds. Bars: mean error 5 %, p95 10 %, tau 0.9, regret 2 %, memory 3 % (tensor bytes of each plan's "
        "fullest device). Noise: quartiles' distance over the median, the mean of a launch's plans: where it is larger than the error, the error says "
        "little. Tau beyond noise: without the pairs of plans that differ by no more than the larger of their steps' quartiles' distances. "
        "Drift: what small operators took before and after each plan's steps, 90th over 10th percentile; the last column scales each prediction by how "
        "much slower they were then than in calm moments. Steps count while they take at most 1.2 times as long, and of visits to a "
        "plan the one with the least median, as what others do on the machine only adds; where no visit has half of its steps counted, those of the calmest "
        "moments, whichever visit they are of. AdamW's state is that of a training in progress: without zeros. Cores: ns "
        "that a cache line takes from one to the other and back when operators were measured, which a virtual machine's host "
        "changes every minute or so; predictions and steps of a launch are of one kind of "
        "moment (docs/decisions/0022).",
        "",
        "| model | ranks | network | plans | mean error | p95 | tau | tau beyond noise | regret | memory error | predicted / measured | noise | drift "
        "| error at its speed | cores | revision |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r, f in measured:
        shown = " | ".join(f"{f[k]:.1%}" for k in ("mean error", "p95"))
        memory = "-" if math.isnan(f["memory"]) else f"{f['memory']:.1%}"
        lines.append(
            f"| {r['model']} | {r['ranks']} | {r['network']} | {f['plans']} | {shown} | {f['tau']:.2f} | {f['tau beyond noise']:.2f} | {f['regret']:.1%} "
            f"| {memory} | {f['bias']:.2f} | {f['noise']:.1%} | {f['drift']:.0%} | {f['at its speed']:.1%} | {r.get('cores_ns', '-')} | {r['revision']} |"
        )
    for ranks, network in sorted({(r["ranks"], r["network"]) for r in whole}):
        lines += ["", of_all(f"{ranks} ranks, {network}", [r for r in whole if (r["ranks"], r["network"]) == (ranks, network)])]
    lines += ["", of_all("All", whole)]
    for r in rows:
        if "plans" not in r:
            lines += ["", f"{r['model']} on {r['ranks']} ranks, {r['network']}: {r['failed'].strip().splitlines()[-1]}"]
    return lines


def of_all(name: str, rows: list[dict[str, Any]]) -> str:
    """The bars over some launches."""
    errors = [abs(p["predicted_ms"] / statistics.median(p["measured_ms"]) - 1) for r in rows for p in r["plans"].values()]
    of_each = [figures(r) for r in rows]
    memory = [f["memory"] for f in of_each if not math.isnan(f["memory"])]
    return (
        f"{name}: {len(rows)} launches, {len(errors)} plans: mean error {statistics.mean(errors):.1%}, median {statistics.median(errors):.1%}, "
        f"p95 {percentile(errors, 0.95):.1%}; mean error <= 5 % in {sum(f['mean error'] <= BARS['mean error'] for f in of_each)} launches; "
        f"tau >= 0.9 in {sum(f['tau'] >= BARS['tau'] for f in of_each)}, "
        f"beyond noise in {sum(f['tau beyond noise'] >= BARS['tau'] for f in of_each)}; regret <= 2 % in "
        f"{sum(f['regret'] <= BARS['regret'] for f in of_each)}, mean {statistics.mean(f['regret'] for f in of_each):.1%}; "
        + (f"memory <= 3 % in {sum(m <= BARS['memory'] for m in memory)} of {len(memory)}." if memory else "memory as on one host.")
    )


def write(rows: list[dict[str, Any]]) -> list[str]:
    RESULTS.mkdir(exist_ok=True)
    lines = table(rows)
    (RESULTS / "fidelity.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "fidelity.json").write_text(json.dumps(rows) + "\n")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no launch after so many")
    parser.add_argument("--resume", action="store_true", help="keep the launches that have run")
    options = parser.parse_args()
    sweep(
        options.models.split(","),
        [int(n) for n in options.ranks.split(",")],
        options.networks.split(","),
        options.rounds,
        options.steps,
        options.resume,
        options.minutes,
    )
    print("\n".join(write(read_rows())))


if __name__ == "__main__":
    main()
