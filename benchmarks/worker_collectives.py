"""On each rank: collectives on the backends soap and gloo by turns, seconds of each repetition. Arguments: seconds for each measurement."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import torch_soap  # noqa: F401  (registers the backend)
from tests.dist.launch import report

SIZES = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]
BACKENDS = ("soap", "gloo")
LEAST, MOST = 5, 400  # repetitions


def calls(num_bytes: int, ranks: int) -> dict[str, Callable[[Any], None]]:
    """For each collective a call on a group. `num_bytes`: of the tensor of an all-reduce or all-to-all, of what a rank brings to an all-gather, and of
    what it gets from a reduce-scatter."""
    count = num_bytes // 4
    one, other, all_of_them = torch.zeros(count), torch.empty(count), torch.zeros(count * ranks)
    # To every other rank three times as much as to the rest: uneven, and what goes there comes back.
    me = dist.get_rank()
    weights = [3 if (me + s) % 2 else 1 for s in range(ranks)]
    splits = [count * w // sum(weights) for w in weights]
    send, receive = torch.ones(sum(splits)), torch.empty(sum(splits))
    return {
        "all-reduce": lambda group: dist.all_reduce(one, group=group),
        "all-gather": lambda group: dist.all_gather_into_tensor(all_of_them, one, group=group),
        "reduce-scatter": lambda group: dist.reduce_scatter_tensor(other, all_of_them, group=group),
        "all-to-all": lambda group: dist.all_to_all_single(receive, send, splits, splits, group=group),
    }


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    budget_s, sizes = float(sys.argv[1]), [int(a) for a in sys.argv[2:]] or SIZES
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    groups = {name: dist.new_group(backend=name) for name in BACKENDS}
    out: list[dict[str, Any]] = []
    for num_bytes in sizes:
        for collective, call in calls(num_bytes, dist.get_world_size()).items():
            times: dict[str, list[float]] = {name: [] for name in BACKENDS}
            for name in BACKENDS:
                call(groups[name])
            enough = torch.zeros(1)
            begin = time.perf_counter()
            while enough == 0:
                for name in BACKENDS:
                    # Each repetition begins together, on shared memory: so that neither measures how late the other's threads were.
                    dist.barrier(groups["soap"])
                    start = time.perf_counter()
                    call(groups[name])
                    times[name].append(time.perf_counter() - start)
                done = len(times["soap"])
                enough.fill_(done >= MOST or (done >= LEAST and time.perf_counter() - begin > budget_s))
                dist.broadcast(enough, 0, group=groups["soap"])
            out.append({"collective": collective, "bytes": num_bytes, "times_s": times})
    report(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
