"""On each rank: one model of the demo under several plans and under DDP, in turns; reports step times and predictions.

torchrun --nproc-per-node=2 -m benchmarks.worker_step_time MODEL STEPS
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist

import torch_soap
from examples.demo import ROWS, Training, make_task, one_step, optimizer_of
from tests.dist.launch import report
from torch_soap import _C

# By model, plans that people write by hand; `searched` comes on top.
PLANS = {
    "alexnet": {
        "data parallel": "* n=fed",
        "zero-3": "* n=fed store=shard keep=use",
        "one weird trick": "classifier.1 o=2 store=o\nclassifier.4 i=2 store=i\n* n=fed",
        "first layers by rows of the image": "features.0 h=2\nfeatures.2 h=2\n* n=fed",
    },
    "gpt": {
        "data parallel": "* n=fed",
        "zero-3": "* n=fed store=shard keep=use",
        "megatron": "blocks.*.proj i=2 store=i\nblocks.*.up o=2 store=o\nblocks.*.down i=2 store=i\n* n=fed",
    },
}


def main(name: str, steps: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(ROWS * rank, ROWS * (rank + 1))
    tasks, trainings, predicted = {}, {}, {}
    cost = None
    for label, text in {"searched": None, **PLANS[name]}.items():
        task = make_task(name, ROWS * world)
        batch = tuple(t[mine] for t in task.batch(0))
        model = torch_soap.parallelize(task.model, batch, loss=task.loss, plan=text)
        if text is None:
            cost = model.plan.cost if rank == 0 else None
        if cost is not None:  # rank 0 priced the search
            engine = next(iter(model._soap.engines.values()))[0]
            predicted[label] = _C.simulate(engine.program, cost).step_time_ns / 1e6
        optimizer = optimizer_of(model, task)
        tasks[label] = (task, optimizer, model)
    task = make_task(name, ROWS * world)
    under_ddp = torch.nn.parallel.DistributedDataParallel(task.model)
    tasks["DDP (torch)"] = (task, optimizer_of(under_ddp, task), lambda x, y, loss=task.loss: loss(under_ddp(x), y))
    for step in range(steps):
        for label, (task, optimizer, model) in tasks.items():
            inputs, targets = (t[mine] for t in task.batch(step))
            one_step(trainings.setdefault(label, Training()), optimizer, lambda m=model, x=inputs, y=targets: m(x, y))
    report({label: {"measured_ms": [1e3 * s for s in t.seconds], "predicted_ms": predicted.get(label), "losses": t.losses} for label, t in trainings.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
