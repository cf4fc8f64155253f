"""One HTML file from the template, its style and scripts, and a plan's data as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch_soap import _C
from torch_soap.plan import Plan
from torch_soap.report.data import report_data
from torch_soap.trace import Event, chrome_trace, simulated_events

FOLDER = Path(__file__).parent
SCRIPTS = ("base.js", "layout.js", "graph.js", "inspector.js", "timeline.js", "charts.js", "main.js")


def write_report(
    plan: Plan, path: str | Path, *, title: str = "", timeline: Sequence[Event] = (), step_seconds: Sequence[float] = (), seconds: float = 10.0
) -> list[Path]:
    """Writes the page, and beside it `<name>.trace.json` for Perfetto; returns both paths. The arguments are those of `Plan.report`."""
    path = Path(path)
    context = plan.known_context("report")
    program = _C.lower(context.graph, plan.strategy, context.rows)
    data = report_data(plan, program, title=title or path.stem, timeline=timeline, step_seconds=step_seconds, seconds=seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(data))
    trace = path.with_suffix(".trace.json")
    trace.write_text(chrome_trace({"simulated": simulated_events(program, plan), **({"measured": timeline} if timeline else {})}))
    return [path, trace]


def page(data: dict[str, object]) -> str:
    """The template with everything in it. `</` never appears inside of the data: it would end the element that holds it."""
    parts = {
        "title": str(data["title"]).replace("&", "&amp;").replace("<", "&lt;"),
        "style": (FOLDER / "style.css").read_text(),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "script": "\n".join((FOLDER / name).read_text() for name in SCRIPTS),
    }
    out = []
    for number, piece in enumerate((FOLDER / "template.html").read_text().split("@@")):
        out.append(parts[piece] if number % 2 else piece)
    return "".join(out)
