"""The HTML report: its data agrees with the simulator and with why_not, and a real browser shows it."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit import browser
from tests.unit.planning import p100
from torch_soap import _C, Plan, cli
from torch_soap.compare import Context, price
from torch_soap.health import Health, Row
from torch_soap.plan import as_plan
from torch_soap.planner import graph_for
from torch_soap.report.alternatives import alternatives
from torch_soap.report.data import report_data
from torch_soap.report.page import page
from torch_soap.trace import Event, simulated_events

# All four letters: samples, an image's rows, channels, and one device; 3 is expanded.
TEXT = "block.0 n=4\nblock.3 h=4\nhead.0 o=4\nhead.2 @ [1]\nnorm d=2 replicas=2\n* n=fed"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.norm = nn.LayerNorm(512)
        self.head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.flatten(self.block(x), 1)))


def factory() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], Any]:
    torch.manual_seed(0)
    return Model(), (torch.randn(8, 3, 16, 16), torch.arange(8)), nn.functional.cross_entropy


@pytest.fixture(scope="module")
def plan() -> Plan:
    module, inputs, loss = factory()
    graph, _, _ = graph_for(module, inputs, loss, 4)
    return as_plan(TEXT, graph, 4).bind(module, inputs, loss=loss, machine=p100(4))


def lowered(plan: Plan) -> tuple[_C.Program, _C.Simulation]:
    assert plan.context is not None
    program = _C.lower(plan.context.graph, plan.strategy, plan.context.rows)
    return program, _C.simulate(program, plan.context.cost, record=True)


@pytest.fixture(scope="module")
def real(plan: Plan) -> list[Event]:
    """A recorded step: the simulated one, a tenth slower."""
    return [Event(e.name, e.stream, e.device, e.start_ns * 11 // 10, e.duration_ns * 11 // 10) for e in simulated_events(lowered(plan)[0], plan)]


@pytest.fixture(scope="module")
def data(plan: Plan, real: list[Event]) -> dict[str, Any]:
    return report_data(plan, lowered(plan)[0], title="a <model>", timeline=real, step_seconds=[0.002, 0.004, 0.003], seconds=30)


def operators(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {n["name"]: n for n in data["nodes"] if n["kind"] == "op"}


def test_operators_have_what_the_simulator_says(plan: Plan, data: dict[str, Any]) -> None:
    _, simulation = lowered(plan)
    assert data["step_ns"] == simulation.step_ns
    of_operators = sum(simulation.node_ns)
    assert sum(n["ns"] for n in data["nodes"]) == of_operators > 0
    moved = sum(n["moved"] for n in data["nodes"]) + sum(p["moved"] for n in data["nodes"] for p in n["parameters"])
    assert moved == sum(simulation.moved_bytes)
    ops = operators(data)
    assert [ops[name]["degrees"] for name in ("block.0", "block.3", "head.0")] == [[4, 1, 1], [1, 4, 1], [1, 1, 4]]
    assert ops["head.2"]["devices"] == [1] and ops["head.2"]["config"] == "@ [1]"
    assert ops["norm"]["parts"] and ops["norm"]["replicas"] == 2
    stored = {p["name"]: p for p in ops["head.0"]["parameters"]}["head.0.weight"]
    assert stored["bytes"] == 64 * 512 * 4 == 4 * stored["stored"]
    assert [data["nodes"][i]["name"] for i in ops["head.1"]["inputs"]] == ["head.0"]
    assert (ops["head.0"]["bytes"], ops["head.0"]["shape"]) == (8 * 64 * 4 // 4, "8 x 64 float32")


def test_memory_goes_up_to_the_peak(plan: Plan, data: dict[str, Any]) -> None:
    _, simulation = lowered(plan)
    for device, peak in enumerate(simulation.memory_bytes):
        curve = data["memory"][str(device)]
        assert max(sum(held) for _, *held in curve) == peak
        assert [t for t, *_ in curve] == sorted(t for t, *_ in curve) and curve[-1][0] <= simulation.step_ns
        assert all(h >= 0 for _, *held in curve for h in held)
    program = lowered(plan)[0]
    coarse = _C.memory_over_time(program, simulation, plan.known_context("test").cost.machine, 5)  # the peak is never thinned away
    assert [max(sum(p.bytes) for p in c) for c in coarse] == list(simulation.memory_bytes) and all(len(c) <= 6 for c in coarse)


def test_alternatives_are_what_why_not_says(plan: Plan, data: dict[str, Any]) -> None:
    ops, legal, refused = operators(data), 0, 0
    assert not data["left_out"]
    for name in ("block.3", "head.0", "norm", "head.2"):
        for choice in ops[name]["alternatives"]:
            change = plan.why_not(name, choice["words"])
            assert change.step_ns == choice.get("ns"), (name, choice)
            if change.after is None:
                assert choice["reason"] and "ns" not in choice
                refused += 1
                continue
            assert choice["fits"] == change.fits and sum(choice["parts"].values()) == choice["ns"]
            assert choice["memory"] == max(change.after.memory_bytes) - max(change.before.memory_bytes)
            legal += 1
    assert legal >= 15
    assert ops["head.2"]["alternatives"][0]["said"] and "@ [1]" not in [c["words"] for c in ops["head.2"]["alternatives"]]


def test_times_alone_are_those_of_the_whole_simulation(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What delta simulation says before memory and parts are known."""
    monkeypatch.setattr("torch_soap.report.alternatives.priced", lambda *_: {})
    assert plan.context is not None
    found = alternatives(plan.context, plan.strategy, price(plan.context, plan.strategy), 30, [])
    compared = [(name, c["words"], c["ns"]) for name in list(found)[:4] for c in found[name] if "ns" in c]
    assert len(compared) >= 12 and all("memory" not in c for choices in found.values() for c in choices)
    assert [(name, words, plan.why_not(name, words).step_ns) for name, words, _ in compared] == compared


def test_what_there_was_no_time_for_is_said(plan: Plan) -> None:
    found = report_data(plan, lowered(plan)[0], title="", timeline=(), step_seconds=(), seconds=0)
    assert any(text.startswith("alternatives of") for text in found["left_out"]) and any("a person would write" in text for text in found["left_out"])
    assert not any("alternatives" in n for n in found["nodes"])


def test_the_seeds_stand_beside_the_plan(plan: Plan, data: dict[str, Any]) -> None:
    assert plan.context is not None
    priced = {c["name"]: c for c in data["candidates"]}
    ddp = dict(_C.seeds(plan.context.graph, 4))["ddp"]
    assert priced["ddp"]["step_ns"] == price(plan.context, ddp).step_ns and len(priced) > 8
    assert data["candidates"][0]["mine"] and data["candidates"][0]["step_ns"] == data["step_ns"]
    rows = {r["what"]: r for r in data["measured"]}
    assert rows["step, median of 3"] == {"what": "step, median of 3", "predicted": data["step_ns"], "measured": 3e6}
    one = rows["device 0: compute"]
    assert one["measured"] == pytest.approx(1.1 * one["predicted"], rel=0.01)


def trained(step: float, matmul: float) -> Health:
    """What `plan.health()` finds where the step and the products in it take so many times as long as predicted."""
    families = [Row("matmul", 2_000_000, int(2_000_000 * matmul)), Row("pointwise", 500_000, 600_000)]
    return Health(Row("step", 4_000_000, int(4_000_000 * step)), families, [Row("all_reduce of 4 ranks within a host", 300_000, 310_000)], 20, 4)


def test_what_health_found_is_in_the_data(plan: Plan, data: dict[str, Any]) -> None:
    assert data["health"] is None
    plan.measured["health"] = trained(1.7, 2.5).as_data()
    try:
        found = report_data(plan, lowered(plan)[0], title="", timeline=(), step_seconds=(), seconds=0)["health"]
    finally:
        del plan.measured["health"]
    assert [(r["what"], r["part"], r["off"]) for r in found["rows"]] == [
        ("step", "step", False),
        ("matmul", "family", True),
        ("pointwise", "family", False),
        ("all_reduce of 4 ranks within a host", "link", False),
    ]
    assert (found["rows"][1]["predicted"], found["rows"][1]["measured"]) == (2_000_000, 5_000_000)
    assert not found["ok"] and trained(1.0, 1.0).as_data()["ok"]


def test_counters_of_batches_are_not_drawn() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    inputs = torch.randn(8, 3, 8, 8)
    graph, _, _ = graph_for(module, inputs, None, 2)
    plan = as_plan("* n=fed", graph, 2).bind(module, inputs, machine=p100(2))
    found = report_data(plan, lowered(plan)[0], title="", timeline=(), step_seconds=(), seconds=5)
    names = [n["name"] for n in found["nodes"]]
    assert "1/add" not in names and "1" in names and not any(n.startswith("write:") for n in names)
    assert any("buffers only" in text for text in found["left_out"])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.html"
    cli.main(["report", "tests.unit.test_report:factory", "--plan", TEXT, "--world-size", "4", "--out", str(out), "--seconds", "1"])
    assert "r.html" in capsys.readouterr().out
    events = json.loads((tmp_path / "r.trace.json").read_text())["traceEvents"]
    assert any(e["ph"] == "X" for e in events)
    text = out.read_text()
    assert "<title>factory" in text and "@@" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "http" not in re.sub(r"http://www\.w3\.org/\S+", "", text.split('id="data">')[0])


# -- in a browser --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Page]:
    executable = browser.find()
    if executable is None:
        assert os.geteuid() != 0, "no browser: `make test` installs chromium where root; apt-get install chromium"
        pytest.skip("no browser is installed, and we are not root to install one: apt-get install chromium")
    with browser.page(executable) as made:
        made.size(1400, 1000)
        yield made


def shown(tab: browser.Page, data: dict[str, Any], path: Path) -> None:
    path.write_text(page(data))
    tab.open(path)
    assert tab.errors == []


def click(tab: browser.Page, selector: str) -> None:
    tab.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
    x, y = tab.value(
        f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
    )
    tab.click(x, y)


OVERLAPS = """(() => {
  const boxes = visible(), bad = [];
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
    if (Math.abs(a.x - b.x) < (a.w + b.w) / 2 - 1 && Math.abs(a.y - b.y) < (a.h + b.h) / 2 - 1) bad.push(a.key + " " + b.key);
  }));
  return bad;
})()""".replace("visible()", "(draw(true), [...new Set(nodes.map((n) => n.box))])")


FIRST_EVENT = """(() => {
  byId("timeline").scrollIntoView({block: "center"});
  const box = byId("timeline").getBoundingClientRect(), lane = lanes[0], event = lane.events[0];
  return [box.x + toX((event[3] + event[4]) / 2), box.y + lane.y + 5];
})()"""


def test_a_browser_shows_it(tab: browser.Page, data: dict[str, Any], tmp_path: Path) -> None:
    shown(tab, data, tmp_path / "report.html")
    assert tab.value("document.title") == "a <model> · torch_soap"
    assert tab.value("document.querySelectorAll('#graph .node').length") == len(data["nodes"])  # few enough to be all open
    edges = sum(len(n["inputs"]) for n in data["nodes"])
    assert tab.value("document.querySelectorAll('#graph .edge').length") == edges
    fills = tab.value("[...document.querySelectorAll('#graph .node rect')].map((r) => r.getAttribute('fill'))")
    assert {"var(--S)", "var(--O)", "var(--A)", "var(--P)"} <= set(fills)
    assert tab.value(OVERLAPS) == []
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    assert tab.value("document.querySelectorAll('#memory .area').length") == 5
    assert tab.value("document.querySelectorAll('#candidates tr').length") >= 10
    assert "3.00 ms" in tab.value("document.querySelector('#measured').textContent")
    pixels = (
        "(() => { const c = byId('timeline'); return new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size; })()"
    )
    assert tab.value(pixels) > 20
    assert tab.errors == []


@pytest.mark.parametrize(("step", "matmul", "said"), [(1.7, 2.5, "off: matmul"), (1.3, 1.0, "no part of it stands out"), (1.0, 1.0, "as predicted")])
def test_a_browser_shows_health(tab: browser.Page, data: dict[str, Any], tmp_path: Path, step: float, matmul: float, said: str) -> None:
    shown(tab, data, tmp_path / "report.html")
    assert tab.value("document.querySelector('#health').textContent") == ""  # nobody asked
    shown(tab, {**data, "health": trained(step, matmul).as_data()}, tmp_path / "health.html")
    assert said in tab.value("document.querySelector('#health h3').textContent")
    rows = tab.value("[...document.querySelectorAll('#health tr')].map((r) => [r.className, r.innerText])")
    assert len(rows) == 5 and ["off" in kind for kind, _ in rows[1:]] == [False, matmul > 2, False, False]
    assert rows[2][1].split()[:2] == ["operators:", "matmul"] and rows[2][1].split()[-1] == f"{matmul:.2f}"
    assert tab.errors == []


def test_a_click_shows_why(tab: browser.Page, data: dict[str, Any], tmp_path: Path) -> None:
    shown(tab, data, tmp_path / "report.html")
    for name in ("head.0", "block.3"):
        click(tab, f"[data-name='{name}'] .box")
        text = tab.value("byId('inspector').innerText")
        assert text.splitlines()[0] == name and "Why not otherwise?" in text
        rows = tab.value("document.querySelectorAll('#inspector .why tr').length")
        assert rows == 1 + len(operators(data)[name]["alternatives"])
    assert "Attribute \u00d7 4" in text and "cut k (channels) over 4 devices" in text
    x, y = tab.value(FIRST_EVENT)
    tab.click(x, y)
    first = tab.value("nodes[data.timeline.steps[lanes[0].events[0][0]][1]].name")
    assert tab.value("byId('inspector').innerText").splitlines()[0] == first
    assert tab.errors == []


def test_dark_and_narrow(tab: browser.Page, data: dict[str, Any], tmp_path: Path) -> None:
    try:
        tab.size(700, 900, dark=True)
        shown(tab, data, tmp_path / "report.html")
        assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    finally:
        tab.size(1400, 1000)


def test_a_thousand_operators_in_modules(tab: browser.Page, data: dict[str, Any], tmp_path: Path) -> None:
    """Blocks with a branch that is added again: collapsed at first, laid out without overlaps when all are open."""
    large = copy.deepcopy(data)
    proto = next(n for n in large["nodes"] if n["name"] == "head.0")
    large["nodes"] = [{**proto, "name": "in:0", "kind": "edge", "inputs": []}]
    for block in range(100):
        base = len(large["nodes"])
        for i in range(10):
            inputs = [base - 1] if i in (0, 5) else [base + i - 1] if i < 9 else [base + 4, base + 8]
            large["nodes"].append({**proto, "name": f"blocks.{block}.part{i}", "inputs": inputs})
    large["timeline"]["steps"] = {k: [name, -1, kind] for k, (name, _, kind) in large["timeline"]["steps"].items()}
    large["timeline"]["names"] = [[name, -1] for name, _ in large["timeline"]["names"]]
    shown(tab, large, tmp_path / "large.html")
    assert tab.value("document.querySelectorAll('#graph .node').length") <= 102
    click(tab, "#expand")
    assert tab.value("document.querySelectorAll('#graph .node').length") == 1001
    assert tab.value(OVERLAPS) == []
    click(tab, "#collapse")
    assert tab.value("document.querySelectorAll('#graph .node').length") <= 102
    tab.value("(byId('find').value = 'blocks.42.part3', byId('find').dispatchEvent(new Event('input')))")
    assert tab.value("byId('inspector').innerText").splitlines()[0] == "blocks.42.part3"
    assert tab.errors == []


def test_the_browser_tells_what_is_wrong(tab: browser.Page, tmp_path: Path) -> None:
    """An exception, a console error and a request are seen: the other tests would fail for them."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('said'); fetch('https://127.0.0.1:9/x').catch(() => 0); undefinedFunction()</script>")
    tab.open(bad)
    tab.value("new Promise((done) => setTimeout(done, 100))")
    text = "\n".join(tab.errors)
    assert "undefinedFunction" in text and "console.error" in text and "https://127.0.0.1:9/x" in text


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x) + self.v(x)


def test_a_rewritten_plan_has_the_alternatives_of_the_operators_that_it_runs() -> None:
    graph, _, rows = graph_for(Siblings(), (torch.randn(8, 16),), None, 2)
    plan = as_plan("rewrite fuse_linears q k v\n* n=2", graph, 2)
    context = Context(graph, rows, _C.CostModel(p100(2)))
    found = alternatives(context, plan.strategy, price(context, plan.strategy), 5.0, [])
    after = _C.rewritten(graph, plan.strategy.rewrites)
    assert set(found) == {n.name for n in after.nodes if n.kind == _C.NodeKind.op} != {n.name for n in graph.nodes if n.kind == _C.NodeKind.op}
    assert any("ns" in choice and "memory" in choice for choices in found.values() for choice in choices)
