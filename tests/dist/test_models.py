"""Real processes under torchrun with gloo against one process: every model on 2 ranks, one hybrid plan, float64, 3 steps; some on 3 and 4."""

from __future__ import annotations

import pytest

from tests.dist.launch import torchrun
from tests.large_models import IN_PROCESSES
from tests.models import CASES

# Several models share a launch: starting processes and importing torch costs more than most of them.
GROUPS = [
    ["alexnet", "vgg11", "unet"],
    ["resnet18", "mobilenet"],
    ["inception"],
    ["gpt_inside", "gpt_loss", "gpt_outside", "bert", "t5", "vit"],
    ["lstm", "nmt", "dlrm", "moe"],
]


def test_every_model_is_in_a_group() -> None:
    assert sorted(n for g in GROUPS for n in g) == sorted(c.name for c in CASES)


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: "-".join(names))
def test_same_as_one_process(names: list[str]) -> None:
    outcome = torchrun(2, "tests.dist.worker_models", *names)
    for rank, results in enumerate(outcome.results):
        for name in names:
            result = (results or {}).get(name)
            assert result is not None and "error" in result, f"{name} on rank {rank}: {(result or {}).get('failure', outcome.output)}"
            assert result["error"] <= 1e-10, f"{name} on rank {rank}: {result['where']} differs by {result['error']:.2e}"
            assert result["losses"][-1] != result["losses"][0]
    assert outcome.returncode == 0, outcome.output


def test_large_tensors_same_as_one_process() -> None:
    """Messages and gradients far above the sizes of the models here."""
    outcome = torchrun(2, "tests.dist.worker_large")
    for rank, results in enumerate(outcome.results):
        for name in (f"{c.model} {c.plan}" for c in IN_PROCESSES):
            assert results is not None and name in results, f"{name} on rank {rank}: {outcome.output}"
            assert results[name]["error"] <= 1e-10, f"{name} on rank {rank}: {results[name]['where']} differs by {results[name]['error']:.2e}"
            assert results[name]["losses"][-1] != results[name]["losses"][0]
    assert outcome.returncode == 0, outcome.output


@pytest.mark.parametrize(("ranks", "name", "seed"), [(3, "alexnet", 0), (4, "gpt_loss", 0)])
def test_random_plans_on_more_ranks(ranks: int, name: str, seed: int) -> None:
    """Ranks meet in groups of some of them, and come to these in different orders (alexnet's plan: {0,1}, {0,2}, all)."""
    run = f"{seed}:float64"
    outcome = torchrun(ranks, "tests.dist.worker_sweep", name, run)
    for results in outcome.results:
        assert results is not None and "error" in results.get(run, {}), outcome.output
        assert results[run]["error"] <= 1e-10, results[run]
