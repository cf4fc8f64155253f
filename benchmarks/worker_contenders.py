"""On two ranks: every kind of contender but ours on a small model of its kind; reports how far its losses are from one process'.

torchrun --nproc-per-node=2 -m benchmarks.worker_contenders BACKEND
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import torch_soap  # registers the backend  # noqa: F401
from benchmarks.contenders import Contender, contenders
from benchmarks.fidelity_models import Batch, Case, LstmLanguageModel
from benchmarks.training_models import Timed, dlrm, make_batch, texts
from benchmarks.training_table import loss_errors
from benchmarks.worker_training_speed import build
from tests import models
from tests.dist.launch import report
from tests.models import Example


def small(make: Callable[[], Example]) -> Case:
    example = make()
    assert example.loss is not None
    return Case(example.module, example.loss, len(example.inputs[0]) // dist.get_world_size(), lambda total: example.inputs)


def mlp() -> Case:
    def batch(total: int) -> Batch:
        return torch.randn(total, 16), torch.randint(16, (total,))

    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return Case(nn.Sequential(*layers[:-1]), F.cross_entropy, 4, batch)


SMALL: dict[str, Timed] = {
    "alexnet": Timed(lambda: small(models.alexnet), hybrid="one weird trick"),
    "gpt": Timed(lambda: small(models.gpt_loss), "AdamW", hybrid="megatron", tensor_parallel="gpt"),
    "lstm": Timed(lambda: texts(LstmLanguageModel(64, 16), 64, 4, 6), hybrid="vocabulary", rate=10.0),
    "dlrm": Timed(lambda: dlrm(50, sparse=False), hybrid="tables", rate=0.01),
    "dlrm sparse": Timed(lambda: dlrm(50, sparse=True), hybrid="tables", sparse=True, rate=0.01),
    "mlp": Timed(mlp, hybrid="tensor parallel", tensor_parallel="mlp"),
    "vit": Timed(lambda: small(models.vit), "AdamW", tensor_parallel="encoder"),
    "bert": Timed(lambda: small(models.bert), "AdamW", tensor_parallel="encoder"),
    "nmt": Timed(lambda: small(models.nmt)),
    "moe": Timed(lambda: small(models.moe)),
}


def main(backend: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(backend)
    errors = {}
    for name, timed in SMALL.items():
        case = timed.make()
        whole = make_batch(case, dist.get_world_size())
        mine = slice(case.rows * dist.get_rank(), case.rows * (dist.get_rank() + 1))
        batch = tuple(t[mine].clone() for t in whole)
        built: dict[str, Contender] = {}
        rows = {label: build(label, make, built, batch) for label, make in contenders(timed, batch, whole).items() if label not in ("ours", "limit")}
        errors[name] = loss_errors({"contenders": rows})
    report(errors)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
