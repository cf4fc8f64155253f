"""`python -m torch_soap plan|explain|why-not|diff|report|verify|trace|calibrate|info`: the planner and the exactness check from the command line.

A module is named `package.module:factory`; the factory returns (module, example_inputs) or (module, example_inputs, loss) for
the global batch. A machine is `preset:<name>:<hosts>x<devices per host>` (preset:h100:8x8) or the path of a file that
`calibrate --out` or Machine.save wrote. `calibrate` under torchrun measures with all of its processes at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

import torch_soap
from torch_soap import _C
from torch_soap.backend import wanted
from torch_soap.compare import Context
from torch_soap.families import measure_now
from torch_soap.machine import Machine, named
from torch_soap.plan import Plan, as_plan, lower
from torch_soap.planner import graph_for
from torch_soap.runtime.comm import TorchComm
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


def machine(arguments: argparse.Namespace) -> Machine:
    """The one of --machine, or one of --world-size devices on --hosts hosts with links of --link-gbps."""
    if arguments.machine is not None:
        out = named(arguments.machine)
        if out.num_devices < arguments.world_size:
            raise ValueError(f"[machine] {arguments.machine} has {out.num_devices} devices, --world-size is {arguments.world_size}")
        return out
    out = Machine(arguments.world_size, arguments.hosts)
    if arguments.link_gbps is not None:
        out.inter = out.intra = _C.Link(latency_ns=50e3, bytes_per_s=arguments.link_gbps * 1e9 / 8)
    return out


def world_size(arguments: argparse.Namespace) -> int:
    """--world-size, or all devices of --machine, or 2."""
    if arguments.world_size is not None:
        return int(arguments.world_size)
    return 2 if arguments.machine is None else named(arguments.machine).num_devices


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


def run_report(arguments: argparse.Namespace) -> str:
    plan, graph, rows = chosen(arguments)
    plan.context = plan.context or Context(graph, rows, _C.CostModel(machine(arguments)))
    page, trace = plan.report(arguments.out or Path("report.html"), title=arguments.module.partition(":")[2], seconds=arguments.seconds)
    return f"wrote {page} and {trace}: open the one in a browser, the other in ui.perfetto.dev"


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


def run_calibrate(arguments: argparse.Namespace) -> str:
    comm = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group(wanted())
        comm = TorchComm()
    made, text = measure_now(comm)
    if comm is not None:
        rank = comm.rank
        torch.distributed.destroy_process_group()
        if rank > 0:
            return ""
    if arguments.out is not None:
        made.save(arguments.out)
        text += f"\nwrote {arguments.out}"
    return text


def run_info(_arguments: argparse.Namespace) -> str:
    return "\n".join(
        [
            f"torch_soap {torch_soap.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
            f"operators with a rule: {', '.join(_C.registered_rules())}",
            "GPU: off (this version moves data in host memory)",
        ]
    )


COMMANDS = {
    "plan": run_plan,
    "explain": run_explain,
    "why-not": run_why_not,
    "diff": run_diff,
    "report": run_report,
    "verify": run_verify,
    "trace": run_trace,
    "calibrate": run_calibrate,
    "info": run_info,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m torch_soap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name)
        if name == "info":
            continue
        if name == "calibrate":
            command.add_argument("--out", type=Path, help="file to write the machine to")
            continue
        if name == "diff":
            command.add_argument("a", help="path or text of a plan")
            command.add_argument("b", help="of another")
            command.add_argument("--module", required=True, help="package.module:factory")
        else:
            command.add_argument("module", help="package.module:factory")
        if name == "why-not":
            command.add_argument("line", nargs="+", help='a line of a plan: "features.3 n=2"')
        command.add_argument("--world-size", type=int, help="devices; default: all of --machine, else 2")
        command.add_argument("--machine", help="preset:<name>:<hosts>x<devices per host>, or a file; default: a modest server, described by:")
        command.add_argument("--hosts", type=int, default=1)
        command.add_argument("--link-gbps", type=float, help="rate of every link in Gb/s; default: this version's guess for one host")
        command.add_argument("--plan", help="path or text of a plan; default: searched")
        command.add_argument("--out", type=Path, help="file to write")
        command.add_argument("--seconds", type=float, default=10.0, help="report: for pricing alternatives")
        command.add_argument("--steps", type=int, default=3, help="verify: steps of SGD")
    arguments = parser.parse_args(argv)
    try:
        if "world_size" in arguments:
            arguments.world_size = world_size(arguments)
        text = COMMANDS[arguments.command](arguments)
        if text:
            print(text)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
