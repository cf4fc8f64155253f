"""The table of published throughputs and how its rows are priced (benchmarks/published.py)."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import published
from benchmarks.published import CLUSTERS, Cluster, Row, module_of, predict, read_rows, rows
from torch_soap import Machine

HEAD = "machine,model,length,gpus,sequences,micro_batches,tp,zero,recompute,attention,tokens_per_s,source"
LINE = "h100-mosaic,mpt-7b,2048,128,6,1,1,3,none,flash-2,10475,llm-foundry"


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


@pytest.mark.parametrize(
    "change", [("h100-mosaic", "h100-else"), ("llm-foundry", "memory"), (",3,none", ",1,none"), ("none", "some"), ("flash-2", "flash-9"), ("10475", "-1")]
)
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
    cluster = Cluster("made up", "a100", ("mpt-125m", 2048, 8))
    monkeypatch.setitem(CLUSTERS, "made-up", cluster)
    setups = ((8, 1, "none", "flash-2"), (16, 2, "selective", "triton"))
    made = [Row("made-up", "mpt-125m", 2048, gpus, 4, micro, 1, 3, recompute, kernel, 1.0, "ours") for gpus, micro, recompute, kernel in setups]
    pricer = published.pricer_for("mpt-125m", 2048, tuple(sorted(r.batch for r in made)))
    steps = [pricer.step_s(r, cluster, 0.6) for r in made]
    made = [dataclasses.replace(r, tokens_per_s=r.batch * r.length / r.gpus / s) for r, s in zip(made, steps, strict=True)]
    scale, predictions = predict("made-up", made)
    assert scale == pytest.approx(0.6, rel=1e-3)
    first, second = predictions
    assert first.fixed and not second.fixed
    assert abs(first.error) < 1e-3 and abs(second.error) < 1e-3


def test_attention_is_that_of_the_row_and_of_its_card() -> None:
    """FlashAttention in Triton takes 1.4 times as long forward and twice as long backward; where it was measured on the very card, the scale leaves it."""
    mosaic = CLUSTERS["a100-80-mosaic"]
    first, second = (mosaic.machine(8, 0.5, kernel) for kernel in ("flash-2", "triton"))
    (forward, backward), (slower_forward, slower_backward) = (m.parts_of("attention", "bfloat16", 8192, 128) for m in (first, second))
    assert [forward, backward] == list(Machine.preset("a100").parts_of("attention", "bfloat16", 8192, 128))
    assert (slower_forward, slower_backward) == pytest.approx((forward / 1.4, backward / 2))
    assert first.efficiency["matmul"] == pytest.approx(Machine.preset("a100").efficiency["matmul"] / 2)
    assert first.efficiency["other"] == first.efficiency["pointwise"]  # the loss is one kernel
    other = CLUSTERS["h100-titan-eager"]
    scaled, whole = (other.machine(8, s, "flash-2").parts_of("attention", "bfloat16", 8192, 128) for s in (0.5, 1.0))
    assert scaled == pytest.approx([part / 2 for part in whole])


def test_metrics_by_hand() -> None:
    """Two cross entropies of 2 x 3 sequences of 2,048 tokens on an A100: 34.7 GB at 80 % of 2,039 GB/s."""
    cluster = CLUSTERS["a100-80-mosaic"]
    row = dataclasses.replace(read_rows([HEAD, LINE])[0], micro_batches=2, sequences=3)
    assert cluster.metrics_s(row, cluster.machine(8, 1.0, "flash-2")) == pytest.approx(2 * 14 * 2 * 3 * 2048 * 50368 / (0.8 * 2039e9))
    assert CLUSTERS["h100-titan-eager"].metrics_s(row, cluster.machine(8, 1.0, "flash-2")) == 0
