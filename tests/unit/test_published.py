"""The table of published throughputs and how its rows are priced (benchmarks/published.py)."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import published
from benchmarks.published import CLUSTERS, Cluster, Row, module_of, predict, read_rows, rows

HEAD = "machine,model,length,gpus,sequences,micro_batches,tp,zero,recompute,tokens_per_s,source"
LINE = "h100-mosaic,mpt-7b,2048,128,6,1,1,3,none,10475,llm-foundry"


def test_every_machine_has_its_row_and_every_row_its_source() -> None:
    table = rows()
    assert len(table) > 100 and {r.machine for r in table} == set(CLUSTERS)
    for name, cluster in CLUSTERS.items():
        assert len([r for r in table if r.machine == name and (r.model, r.length, r.gpus) == cluster.fixed_by]) == 1


def test_a_row_by_hand() -> None:
    (row,) = read_rows([HEAD, LINE])
    assert (row.dp, row.batch) == (128, 768)
    assert row.step_s == pytest.approx(6 * 2048 / 10475)
    halved = dataclasses.replace(row, tp=2, micro_batches=3)
    assert (halved.dp, halved.batch) == (64, 64 * 6 * 3) and halved.step_s == pytest.approx(64 * 6 * 3 * 2048 / 128 / 10475)


@pytest.mark.parametrize("change", [("h100-mosaic", "h100-else"), ("llm-foundry", "memory"), (",3,none", ",1,none"), ("none", "some"), ("10475", "-1")])
def test_lines_that_make_no_sense_are_named(change: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="line 3: "):
        read_rows([HEAD, LINE, LINE.replace(*change)])


@pytest.mark.parametrize(
    ("model", "length", "published_parameters"),
    [("mpt-125m", 2048, 125311488), ("mpt-1b", 8192, 1328533504), ("mpt-7b", 2048, 6658859008)],
)
def test_models_have_the_published_number_of_parameters(model: str, length: int, published_parameters: int) -> None:
    """MPT has no biases, our GPT has: a thousandth."""
    assert sum(p.numel() for p in module_of(model, length).parameters()) == pytest.approx(published_parameters, rel=2e-3)


def test_one_row_fixes_the_scale_and_the_other_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows made from our own prices with efficiencies of 0.6: the scale is found again, and the row that didn't fix it is met."""
    cluster = Cluster("made up", "a100", ("mpt-125m", 256, 8))
    monkeypatch.setitem(CLUSTERS, "made-up", cluster)
    made = [Row("made-up", "mpt-125m", 256, gpus, 4, micro, 1, 3, recompute, 1.0, "ours") for gpus, micro, recompute in ((8, 1, "none"), (16, 2, "selective"))]
    pricer = published.pricer_for("mpt-125m", 256, tuple(sorted(r.batch for r in made)))
    steps = [pricer.step_s(r, cluster.machine(r.gpus, 0.6)) for r in made]
    made = [dataclasses.replace(r, tokens_per_s=r.batch * r.length / r.gpus / s) for r, s in zip(made, steps, strict=True)]
    scale, predictions = predict("made-up", made)
    assert scale == pytest.approx(0.6, rel=1e-3)
    first, second = predictions
    assert first.fixed and not second.fixed
    assert abs(first.error) < 1e-3 and abs(second.error) < 1e-3
