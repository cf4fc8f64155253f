"""Training steps of `torch_soap.parallelize(model)` against what one would train with otherwise, interleaved in one set of processes.

python -m benchmarks.training_speed [--models gpt,mlp] [--ranks 2,4] [--networks loopback,10gbit,1gbit] [--backends soap,gloo]
                                    [--rounds 30] [--minutes 30] [--resume]

Each (model, ranks, network, backend) is one launch of processes, which writes one file of rows under out/training_speed/; `--resume` keeps the files that
are there. Networks other than loopback join two namespaces with half of the ranks each (tests/dist/hosts.py). The table, all rows and a chart go to
benchmarks/results/training_speed.{md,json,png}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from typing import Any

from tqdm import tqdm

from benchmarks.training_models import MODELS
from benchmarks.training_table import write
from tests.dist.hosts import NoHosts, torchrun_on, two_hosts
from tests.dist.launch import ROOT, Outcome, revision, torchrun

ROWS = ROOT / "out" / "training_speed"
RANKS = (2, 4)
NETWORKS = ("loopback", "10gbit", "1gbit")
BACKENDS = ("soap", "gloo")
ROUNDS = 30
LAUNCH_S, ROUNDS_S = 1800.0, 600.0  # a launch that takes longer has failed; no round begins after so many seconds of them
USUAL_S = 300.0  # of most, for the estimate


def launch(model: str, ranks: int, network: str, backend: str, rounds: int, seconds: float) -> Outcome:
    arguments = ("benchmarks.worker_training_speed", model, backend, str(rounds), str(seconds))
    env = {"TORCH_SOAP_TRANSPORT": backend, "TORCH_SOAP_CHECK_REPLICAS_EVERY": "0"}
    if network == "loopback":
        return torchrun(ranks, *arguments, timeout_s=LAUNCH_S, env=env)
    with two_hosts(network) as hosts:
        return torchrun_on(hosts, ranks // 2, *arguments, timeout_s=LAUNCH_S, env=env)


def sweep(
    models: list[str],
    ranks: list[int],
    networks: list[str],
    backends: list[str],
    rounds: int,
    resume: bool,
    minutes: float = float("inf"),
    seconds: float = ROUNDS_S,
) -> None:
    begin = time.monotonic()
    ROWS.mkdir(parents=True, exist_ok=True)
    every = [(*of, ROWS / "{}-{}-{}-{}.json".format(*of).replace(" ", "_")) for of in itertools.product(networks, ranks, backends, models)]
    if resume:
        every = [x for x in every if not x[-1].exists() or "failed" in json.loads(x[-1].read_text())]
    print(f"{len(every)} launches, {len(every) * USUAL_S / 60:.0f} minutes at {USUAL_S:.0f} s each", flush=True)
    for network, world, backend, model, path in tqdm(every, desc="launches", ncols=100):
        if time.monotonic() - begin > 60 * minutes:
            break
        started = time.monotonic()
        try:
            done = launch(model, world, network, backend, rounds, seconds)
            result = done.results[0] or {"failed": done.output[-3000:]}
        except NoHosts as error:
            result = {"failed": str(error)}
        except (subprocess.SubprocessError, OSError) as error:
            result = {"failed": f"{type(error).__name__}: {error}"}
        head = {"model": model, "ranks": world, "network": network, "backend": backend, "revision": revision(), "machine": machine()}
        path.write_text(json.dumps({**head, "launch_s": round(time.monotonic() - started, 1), **result}) + "\n")


def machine() -> str:
    import torch

    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def read_rows() -> list[dict[str, Any]]:
    """In the order of models, ranks, networks and backends."""
    rows = [json.loads(p.read_text()) for p in ROWS.glob("*.json")]
    places = (list(MODELS), list(RANKS), list(NETWORKS), list(BACKENDS))

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        of = (row["model"], row["ranks"], row["network"], row["backend"])
        network, ranks, backend, model = 2, 1, 3, 0
        return tuple(places[i].index(of[i]) if of[i] in places[i] else len(places[i]) for i in (network, ranks, backend, model))

    return sorted(rows, key=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=ROUNDS_S, help="of a launch's rounds: none begins later")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no launch after so many")
    parser.add_argument("--resume", action="store_true", help="keep the launches that have run")
    parser.add_argument("--table", action="store_true", help="run nothing: write what has run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of a launch, and its namespaces, end with this one
    if not options.table:
        names = [getattr(options, kind).split(",") for kind in ("models", "ranks", "networks", "backends")]
        sweep(names[0], [int(n) for n in names[1]], names[2], names[3], options.rounds, options.resume, options.minutes, options.seconds)
    print("\n".join(write(read_rows())))


if __name__ == "__main__":
    main()
