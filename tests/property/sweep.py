"""One case of the sweep: a module, a plan, rows and values, all from (name, seed). `python -m tests.property.sweep NAME SEED` runs it again."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

import torch

from tests.property import cases_compound, cases_modules  # noqa: F401  (their cases join CASES)
from tests.property.cases import CASES, build
from torch_soap import _C
from torch_soap.capture import Captured, capture
from torch_soap.plan import Plan, make_plan
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.testing import random_plan_of
from torch_soap.verify import Report, verify_captured

STEPS = 2
_captures: dict[str, Captured] = {}

# Values that break careless formulas; drawn for float inputs.
HOSTILE = {
    "negative": lambda t: -t.abs() - 0.5,
    "very negative": lambda t: t - 900.0,
    "zeros": torch.zeros_like,
    "ties": lambda t: torch.round(t),
    "inf in one row": lambda t: t.masked_fill(torch.arange(t.numel()).reshape(t.shape) == t.numel() // 2, float("inf")),
}
# Where one process with permuted rows already moves by more than the bound: variances of zero, scores of 1e5, products of many factors,
# equal distributions (every gradient is zero in mathematics).
ILL_CONDITIONED = {
    "zeros": {"conv_bn", "batch_norms", "running_norms", "divergences"},
    "very negative": {"batch_norms", "running_norms", "scans", "reductions", "products", "einsums", "causal", "chunked_qkv",
                      "gqa", "cross_attention", "hand_written_attention", "multihead", "encoder_layer", "attention_dropout", "masks"},
    # Whether inf becomes NaN hangs on the order of association, on 0 * inf in a padded border, on which NaN is the largest, on how
    # a mean is summed.
    "inf in one row": {"einsum_forms", "transposed", "transposed1d", "conv3d", "unet", "pools1d", "batch_norms", "running_norms"},
}  # fmt: skip


def captured_case(name: str) -> Captured:
    """Captured once for each process."""
    if name not in _captures:
        built = build(name)
        captured = capture(built.module, built.inputs, {}, train=built.train, loss=built.loss, sample_dims=built.sample_dims)
        captured.example = list(captured.leaves)
        _captures[name] = captured
    return _captures[name]


def split_rows(total: int, ranks: int, rng: random.Random) -> list[int]:
    """Uneven rows, some of them none."""
    cuts = sorted(rng.randint(0, total) for _ in range(ranks - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


class Setting:
    """What (name, seed) stands for."""

    def __init__(self, name: str, seed: int) -> None:
        rng = random.Random(f"{name}/{seed}")
        self.captured = captured_case(name)
        self.ranks = rng.choice([1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8])
        self.values = rng.choice(["", "", *HOSTILE])
        if name in ILL_CONDITIONED.get(self.values, ()):
            self.values = ""
        leaves = [HOSTILE[self.values](x.detach()).requires_grad_(x.requires_grad)
                  if self.values and isinstance(x, torch.Tensor) and x.is_floating_point() else x
                  for x in self.captured.example]  # fmt: skip
        self.captured.leaves = leaves
        inputs = [leaves[i] for i in self.captured.tensor_slots]
        total = next((t.shape[d] for t, d in zip(inputs, self.captured.batch_dims, strict=True) if d is not None), self.ranks)
        self.rows = split_rows(total, self.ranks, rng)
        self.plan = random_plan_of(self.captured, self.ranks, rng.randrange(1 << 30), self.rows)
        self.seed = seed

    def run(self, plan: Plan | None = None) -> Report:
        return verify_captured(self.captured, plan or self.plan, steps=STEPS, dtype=torch.float64, rows=self.rows, seed=self.seed)

    def failure(self, plan: Plan | None = None) -> str:
        """What is wrong, "" if nothing is."""
        try:
            report = self.run(plan)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "" if report.ok else str(report)

    def shrunk(self) -> Plan:
        """The same failure with as few lines as go."""
        inputs = [self.captured.leaves[i] for i in self.captured.tensor_slots]
        graph = to_op_graph(self.captured.instantiate(self.captured._signature_of(inputs)))
        strategy = self.plan.strategy
        for name in list(strategy.names):
            smaller = strategy.copy()
            smaller.remove(name)
            try:
                _C.lower(graph, smaller, self.rows)
            except ValueError:
                continue
            if self.failure(make_plan(graph, smaller)):
                strategy = smaller
        return make_plan(graph, strategy)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="runs seeded cases, prints the plans of those that fail, shrunk")
    parser.add_argument("name", help="a case, or all")
    parser.add_argument("seeds", nargs="*", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="seeds first..first+count")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    failures = 0
    for name in CASES if options.name == "all" else [options.name]:
        for seed in [*options.seeds, *range(options.first, options.first + options.count)]:
            setting = Setting(name, seed)
            wrong = setting.failure()
            if wrong:
                failures += 1
                plan = setting.shrunk()
                print(
                    f"== {name} {seed}: {setting.ranks} ranks, rows {setting.rows}, {setting.values or 'plain values'}\n{plan}{setting.failure(plan)[:1500]}",
                    flush=True,
                )
                break
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
