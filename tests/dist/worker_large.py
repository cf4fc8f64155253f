"""On each rank: trains the large cases (tests/large_models.py) and reports the worst difference of each."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.dist.launch import report
from tests.dist.training import History, alone, difference, in_dtype, rows_of, together
from tests.large_models import IN_PROCESSES

STEPS = 2


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, dict[str, object]] = {}
    references: dict[str, History] = {}
    for case in IN_PROCESSES:
        example = case.example()
        rows = rows_of(len(example.inputs[0]), dist.get_world_size())
        got = together(in_dtype(example, torch.float64), case.text(example), rows, STEPS)
        if case.model not in references:
            references[case.model] = alone(in_dtype(example, torch.float64), rows, STEPS)
        error, where = difference(got, references[case.model], STEPS)
        results[f"{case.model} {case.plan}"] = {"error": error, "where": where, "losses": got.losses}
        report(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
