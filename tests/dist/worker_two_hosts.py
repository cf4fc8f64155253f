"""On each rank of two hosts: a halo, a cut layer and a placed one, against one process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tests.dist.launch import report
from tests.dist.training import alone, difference, in_dtype, rows_of, together
from tests.models import case


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name in ("unet", "gpt_loss"):
        example = case(name).example()
        rows = rows_of(len(example.inputs[0]), dist.get_world_size())
        got = together(in_dtype(example, torch.float64), case(name).plans[0], rows, 2)
        error, where = difference(got, alone(in_dtype(example, torch.float64), rows, 2), 2)
        results[name] = {"error": error, "where": where, "host": os.environ["SOAP_TEST_HOST"]}
    report(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
