"""On each rank: trains the cases named on the command line and reports the worst difference of each."""

from __future__ import annotations

import sys
import time
import traceback

import torch
import torch.distributed as dist

from tests.dist.launch import report
from tests.dist.training import alone, difference, in_dtype, rows_of, together
from tests.models import case

STEPS = 3


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, dict[str, object]] = {}
    for name in names:
        start = time.perf_counter()
        example = case(name).example()
        rows = rows_of(len(example.inputs[0]), dist.get_world_size())
        try:
            got = together(in_dtype(example, torch.float64), case(name).plans[0], rows, STEPS)
        except Exception:  # told to the test by name; the other ranks of this launch stop at their timeout
            report(results | {name: {"failure": traceback.format_exc()[-3000:]}})
            raise
        wanted = alone(in_dtype(example, torch.float64), rows, STEPS)
        error, where = difference(got, wanted, STEPS)
        results[name] = {"error": error, "where": where, "losses": got.losses, "seconds": time.perf_counter() - start}
        report(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
