"""What one changed line costs, and what two plans differ in: sums that agree with the simulator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.planning import graph_of
from torch_soap import _C, Plan, diff, manual_plan
from torch_soap.cli import main
from torch_soap.plan import as_plan


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(16, 64), torch.arange(16) % 8


def factory() -> tuple[nn.Module, tuple[torch.Tensor, ...], nn.Module]:
    return module(), inputs(), nn.CrossEntropyLoss()


def machine(memory: int = 1 << 30) -> _C.Machine:
    out = _C.Machine(2)
    out.intra = _C.Link(latency_ns=50e3, bytes_per_s=1e8)
    out.memory_bytes = memory
    return out


def ddp(memory: int = 1 << 30) -> Plan:
    return manual_plan(module(), inputs(), loss=nn.functional.cross_entropy, dp=2, machine=machine(memory))


def simulated(plan: Plan, text: str) -> _C.Simulation:
    assert plan.context is not None
    graph = plan.context.graph
    return _C.simulate(_C.lower(graph, _C.parse_plan(graph, text, 2), plan.context.rows), plan.context.cost)


def test_a_changed_line_is_priced_as_the_whole_plan_with_it() -> None:
    plan = ddp()
    change = plan.why_not("0", "o=2")
    lines = [line for line in plan.text.splitlines() if line.split()[0] != "0"]
    wanted = simulated(plan, "\n".join(["0 o=2", *lines]))
    assert change.after is not None and change.after.step_ns == wanted.step_ns != change.before.step_ns
    assert change.before.step_ns == plan.predicted["step_time_ns"]
    assert change.step_ns == wanted.step_ns - plan.predicted["step_time_ns"]
    assert change.after.memory_bytes == list(wanted.memory_bytes)


def test_parts_add_up_to_the_step() -> None:
    change = ddp().why_not("2 i=2")
    assert change.after is not None
    for price in (change.before, change.after):
        assert sum(price.parts.values()) == price.step_ns and price.parts["communication"] > 0
        assert sum(ns for ns, _ in price.operators.values()) > 0
    text = str(change)
    assert text.startswith("2 i=2: ") and "communication" in text and "memory" in text


def test_several_operators_a_parameter_and_a_setting_at_once() -> None:
    plan = ddp()
    assert plan.why_not("param:0.weight d0=2").legal
    stored = plan.why_not("? n=fed store=shard keep=use").after
    assert stored is not None and stored.configurations["param:0.weight"] == "d0=2 keep=use"
    assert max(stored.memory_bytes) < max(plan.predicted["memory_bytes"])
    buckets = plan.why_not("set bucket_bytes=1").after
    assert buckets is not None and buckets.step_ns > plan.predicted["step_time_ns"]  # a message for each parameter
    assert plan.why_not("edge 0 -> 1 via=exchange").legal


def test_no_configuration_means_it_follows() -> None:
    change = ddp().why_not("2")
    assert change.after is not None and "2" not in change.after.configurations


def test_storing_alone_leaves_the_operator_as_it_is() -> None:
    change = ddp().why_not("0 store=shard keep=use")
    assert change.after is not None and change.after.configurations["0"] == "n=fed"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 q=2", "no factor"),
        ("9 n=2", "there is no operator or parameter 9; there are 0"),
        ("0 o=2 @ [0,7]", "device 7"),
        ("param:0.weight d0=2 @ [0,0]", "two parts"),
    ],
)
def test_what_is_not_legal_says_why(line: str, words: str) -> None:
    change = ddp().why_not(line)
    assert not change.legal and change.step_ns is None
    assert "not legal" in str(change) and words in str(change)


def test_what_does_not_fit_says_so() -> None:
    plan = ddp(memory=1 << 19)
    fits = plan.why_not("2 n=fed")
    assert not fits.fits and "does not fit" in str(fits)


def test_a_plan_that_was_written_is_bound_first(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = ddp()
    plan.save(path)
    loss = nn.functional.cross_entropy
    graph = graph_of(module(), *inputs(), loss=loss)
    loaded = as_plan(path, graph)
    with pytest.raises(ValueError, match=r"why_not.*plan\.bind\(module, example_inputs\)"):
        loaded.why_not("0 o=2")
    loaded.bind(module(), inputs(), loss=loss, machine=machine())
    assert str(loaded.why_not("0 o=2")) == str(plan.why_not("0 o=2"))
    with pytest.raises(ValueError, match="another model"):
        as_plan(path, graph).bind(nn.Linear(64, 8), inputs()[:1], machine=machine())


def test_diff_says_what_differs_and_what_it_costs() -> None:
    a = ddp()
    b = manual_plan(module(), inputs(), loss=nn.functional.cross_entropy, tp=2, machine=machine())
    difference = diff(a, b)
    assert (difference.a.step_ns, difference.b.step_ns) == (a.predicted["step_time_ns"], b.predicted["step_time_ns"])
    row = next(r for r in difference.rows if r.name == "0")
    assert row.configurations == ("n=fed", "o=2")
    for side, plan in ((0, a), (1, b)):
        assert plan.context is not None
        program = _C.lower(plan.context.graph, plan.strategy, plan.context.rows)
        simulation = _C.simulate(program, plan.context.cost)
        node = next(n for n in program.graph.nodes if n.name == "0")
        assert (row.ns[side], row.moved_bytes[side]) == (simulation.node_ns[node.id], simulation.moved_bytes[node.id])
        total = sum(simulation.moved_bytes)
        assert sum(m for _, m in (difference.a, difference.b)[side].operators.values()) == total > 0
    text = str(difference)
    assert "o=2" in text and "step " in text and "memory" in text
    assert difference.rows == sorted(difference.rows, key=lambda r: (-abs(r.ns[1] - r.ns[0]), -abs(r.moved_bytes[1] - r.moved_bytes[0]), r.name))


def test_a_plan_differs_from_itself_in_nothing() -> None:
    plan = ddp()
    assert not diff(plan, plan).rows and str(diff(plan, plan)) == "the plans are the same"


def test_expanded_operators_count_as_the_one_that_was_written() -> None:
    a = ddp()
    assert a.context is not None
    text = "3 n=1 d=2\n3/centre n=2\n* n=fed"
    cut = as_plan(text, a.context.graph, 2)
    cut.context = a.context
    row = next(r for r in diff(a, cut).rows if r.name == "3")
    assert row.configurations == ("n=fed", "n=1 d=2; 3/centre n=2")
    assert row.moved_bytes[1] > row.moved_bytes[0]
    assert sum(moved for _, moved in diff(a, cut).b.operators.values()) == sum(simulated(a, text).moved_bytes)
    assert sum(ns for ns, _ in diff(a, cut).b.operators.values()) == sum(simulated(a, text).node_ns)
    assert not any("/" in r.name for r in diff(a, cut).rows if r.name.startswith("3"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "tests.unit.test_why_not:factory"
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    ddp().save(a)
    main(["why-not", name, "--plan", str(a), "0 o=2"])
    assert capsys.readouterr().out.startswith("0 o=2: ")
    main(["why-not", name, "--plan", str(a), "0", "q=2"])
    assert "not legal" in capsys.readouterr().out
    manual_plan(module(), inputs(), loss=nn.functional.cross_entropy, tp=2, machine=machine()).save(b)
    main(["diff", str(a), str(b), "--module", name])
    text = capsys.readouterr().out
    assert "n=fed" in text and "o=2" in text and "step " in text
