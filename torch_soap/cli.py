"""`python -m torch_soap plan|explain|why-not|diff|verify|trace|info`: the planner and the exactness check from the command line.

A module is named `package.module:factory`; the factory returns (module, example_inputs) or (module, example_inputs, loss) for
the global batch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

import torch_soap
from torch_soap import _C
from torch_soap.compare import Context
from torch_soap.plan import Plan, as_plan, lower
from torch_soap.planner import graph_for
from torch_soap.trace import chrome_trace, simulated_events


def load(name: str) -> tuple[torch.nn.Module, Any, Any]:
    """The module, its example inputs and loss."""
    path, _, factory = name.partition(":")
    if not factory:
        raise ValueError(f'"{name}" is not package.module:factory')
    sys.path.insert(0, str(Path.cwd()))
    made = getattr(importlib.import_module(path), factory)()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ValueError(f"{name}() must return (module, example_inputs) or (module, example_inputs, loss)")
    return made[0], made[1], made[2] if len(made) == 3 else None


def machine(arguments: argparse.Namespace) -> _C.Machine:
    """A machine of --world-size devices on --hosts hosts, with the links named on the command line."""
    out = _C.Machine(arguments.world_size, arguments.hosts)
    if arguments.link_gbps is not None:
        out.inter = out.intra = _C.Link(latency_ns=50e3, bytes_per_s=arguments.link_gbps * 1e9 / 8)
    return out


def chosen(arguments: argparse.Namespace) -> tuple[Plan, _C.OpGraph, list[int]]:
    """The plan of --plan, or a searched one; with the graph that it is for and the rows of each process."""
    module, inputs, loss = load(arguments.module)
    graph, _, rows = graph_for(module, inputs, loss, arguments.world_size)
    if arguments.plan is not None:
        return as_plan(arguments.plan, graph, arguments.world_size), graph, rows
    return torch_soap.plan(module, inputs, loss=loss, world_size=arguments.world_size, machine=machine(arguments)), graph, rows


def run_plan(arguments: argparse.Namespace) -> str:
    plan, _, _ = chosen(arguments)
    if arguments.out is not None:
        plan.save(arguments.out)
    return plan.text


def run_explain(arguments: argparse.Namespace) -> str:
    plan, graph, rows = chosen(arguments)
    if plan.explanation:
        return plan.explain()
    program = lower(graph, plan, rows)
    return str(_C.explain(program, _C.simulate(program, _C.CostModel(machine(arguments)))))


def run_why_not(arguments: argparse.Namespace) -> str:
    plan, graph, rows = chosen(arguments)
    plan.context = plan.context or Context(graph, rows, _C.CostModel(machine(arguments)))
    return str(plan.why_not(" ".join(arguments.line)))


def run_diff(arguments: argparse.Namespace) -> str:
    module, inputs, loss = load(arguments.module)
    graph, _, rows = graph_for(module, inputs, loss, arguments.world_size)
    a, b = (as_plan(p, graph, arguments.world_size) for p in (arguments.a, arguments.b))
    a.context = b.context = Context(graph, rows, _C.CostModel(machine(arguments)))
    return str(torch_soap.diff(a, b))


def run_verify(arguments: argparse.Namespace) -> str:
    module, inputs, loss = load(arguments.module)
    plan = arguments.plan if arguments.plan is not None else chosen(arguments)[0]
    report = torch_soap.verify(module, inputs, plan, steps=arguments.steps, loss=loss, world_size=arguments.world_size)
    if not report.ok:
        raise SystemExit(str(report))
    return str(report)


def run_trace(arguments: argparse.Namespace) -> str:
    plan, graph, rows = chosen(arguments)
    program = lower(graph, plan, rows)
    plan.context = plan.context or Context(graph, rows, _C.CostModel(machine(arguments)))
    out = arguments.out or Path("trace.json")
    out.write_text(chrome_trace({"simulated": simulated_events(program, plan)}))
    return f"wrote {out}: open it in chrome://tracing or ui.perfetto.dev"


def run_info(_arguments: argparse.Namespace) -> str:
    return "\n".join(
        [
            f"torch_soap {torch_soap.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
            f"operators with a rule: {', '.join(_C.registered_rules())}",
            "GPU: off (this version moves data over gloo in host memory)",
        ]
    )


COMMANDS = {"plan": run_plan, "explain": run_explain, "why-not": run_why_not, "diff": run_diff, "verify": run_verify, "trace": run_trace, "info": run_info}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_soap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        if name == "info":
            continue
        if name == "diff":
            command.add_argument("a", help="path or text of a plan")
            command.add_argument("b", help="of another")
            command.add_argument("--module", required=True, help="package.module:factory")
        else:
            command.add_argument("module", help="package.module:factory")
        if name == "why-not":
            command.add_argument("line", nargs="+", help='a line of a plan: "features.3 n=2"')
        command.add_argument("--world-size", type=int, default=2, help="devices")
        command.add_argument("--hosts", type=int, default=1)
        command.add_argument("--link-gbps", type=float, help="rate of every link in Gb/s; default: this version's guess for one host")
        command.add_argument("--plan", help="path or text of a plan; default: searched")
        command.add_argument("--out", type=Path, help="file to write")
        command.add_argument("--steps", type=int, default=3, help="verify: steps of SGD")
    arguments = parser.parse_args(argv)
    try:
        print(COMMANDS[arguments.command](arguments))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
