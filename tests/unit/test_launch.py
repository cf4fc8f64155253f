"""The host's launches: what is counted, and that steps in a row take what is predicted of one."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_soap
from benchmarks.gpu_launch_table import launch_times
from tests.unit.planning import graph_of
from torch_soap import _C
from torch_soap.machine import Machine, from_json, to_json
from torch_soap.report.data import report_data
from torch_soap.trace import simulated_events

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_launch_h200_2026-11-26.json"


def mlp(layers: int = 3) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))), (torch.randn(32, 64), torch.zeros(32, dtype=torch.long))


def machine(launch: dict[str, tuple[float, float]], devices: int = 1) -> Machine:
    out = Machine(devices)
    out.overlap, out.launch = True, launch
    out.op_overhead_ns, out.flops_per_s, out.memory_bytes_per_s = 700.0, 1e11, 1e10
    return out


def program_of(module: nn.Module, inputs: tuple[torch.Tensor, ...], world: int) -> _C.Program:
    """A step without a loss: one device, or data parallel, whose gradients are all that moves."""
    graph = graph_of(module, inputs[0])
    (strategy,) = [s for name, s in _C.seeds(graph, world) if name == ("ddp" if world > 1 else "one device")]
    strategy.bucket_bytes = 20_000
    return _C.lower(graph, strategy, [32 // world] * world)


def test_presets_have_what_was_measured() -> None:
    expected = launch_times(json.loads(MEASURED.read_text()))
    for name in ("v100", "a100", "h100", "h200"):
        found = Machine.preset(name).launch
        assert set(found) == set(expected) and all(found[key] == pytest.approx(times) for key, times in expected.items())
    for name in ("p100", "k80", "cpu-1g"):
        assert Machine.preset(name).launch == {}


def test_what_is_counted() -> None:
    """Three linears. Operators by name before their family; forward and backward; the update of six parameters."""
    launch = {"linear": (10e3, 20e3), "matmul": (9e9, 9e9), "update": (100e3, 7e3)}
    program = program_of(*mlp(), world=1)
    cost = _C.CostModel(machine(launch))
    seen = {n.target: cost.launch(program, n.id) for n in program.graph.nodes if n.kind == _C.NodeKind.op}
    assert seen == {"linear": (10_000, 20_000)}
    assert _C.simulate(program, cost).host_ns == [3 * 30_000 + 100_000 + 6 * 7_000]


def test_a_view_launches_nothing_on_the_device() -> None:
    with torch.device("meta"):
        module, inputs = nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (8, 8)), nn.Flatten()), mlp()[1]
    program = program_of(module, inputs, world=1)
    view = next(n.id for n in program.graph.nodes if n.target in ("unflatten", "view", "reshape", "flatten"))
    with_host, without = _C.CostModel(machine({"view": (3e3, 4e3)})), _C.CostModel(machine({}))
    assert with_host.time(program, view) == (0, 0) and with_host.launch(program, view) == (3_000, 4_000)
    assert without.time(program, view)[0] == 700 and without.launch(program, view) == (0, 0)


def steps_in_a_row(program: _C.Program, cost: _C.CostModel, count: int) -> list[int]:
    """When each of `count` steps of one device, or of data parallel devices that are alike, has been done and launched: a host and a device that begin a
    step when they are done with the one before, the device never before its launch."""
    m = cost.machine
    host = compute = movement = 0
    ends = []
    for _ in range(count):
        backward_end: dict[int, int] = {}
        for step in program.steps:
            node = step.items[0].id
            if step.kind in (_C.StepKind.compute, _C.StepKind.compute_backward):
                way = int(step.kind == _C.StepKind.compute_backward)
                host += cost.launch(program, node)[way]
                spent = cost.time(program, node)[way]
                compute = max(compute, host) + spent if spent else compute
                if way:
                    backward_end[node] = compute
                continue
            moved = {program.groups[i.id].tensor for i in step.items}
            parameters = {t for t in moved if program.graph.nodes[program.graph.tensors[t].producer].kind == _C.NodeKind.param}
            if step.kind != _C.StepKind.grad_fill or not parameters or program.world_size == 1:
                continue
            tensors = [program.graph.tensors[program.groups[i.id].tensor] for i in step.items]
            size = sum(torch.Size(t.shape).numel() * t.element_bytes for t in tensors)
            host += int(m.launch["collective"][0])
            ready = max(end for node, end in backward_end.items() if parameters & set(program.graph.nodes[node].inputs))
            ranks = list(range(program.world_size))
            movement = max(movement, ready, host) + _C.movement_ns(m, "all_reduce", ranks, size)
        compute = max(compute, movement)
        stored = [program.graph.tensors[n.outputs[0]] for n in program.graph.nodes if n.kind == _C.NodeKind.param]
        host += int(m.launch["update"][0]) + len(stored) * int(m.launch["update"][1])
        compute = max(compute, host) + sum(
            int(torch.Size(t.shape).numel() * t.element_bytes * 5 / m.memory_bytes_per_s * 1e9 + m.op_overhead_ns) for t in stored
        )
        ends.append(compute)
    return ends


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("scale", [0.02, 0.5, 1.0, 4.0])
def test_steps_in_a_row(world: int, scale: float) -> None:
    """Where the host bounds, where the device does, and between: a long run takes the predicted step again and again."""
    module, inputs = mlp(6)
    rng = random.Random(3)
    launch = {name: (rng.uniform(1e3, 3e4) * scale, rng.uniform(1e3, 3e4) * scale) for name in ("linear", "other", "normalization", "collective", "update")}
    cost = _C.CostModel(machine(launch, world))
    program = program_of(module, inputs, world)
    simulation = _C.simulate(program, cost)
    bound = simulation.device_step_ns < simulation.step_ns
    assert bound if scale == 4 else not bound if scale == 0.02 else True
    ends = steps_in_a_row(program, cost, 40)
    assert ends[-1] - ends[-2] == simulation.step_ns
    assert simulation.step_ns == max(simulation.device_step_ns, *simulation.host_ns)


def test_recorded_events_of_a_step_that_the_host_bounds() -> None:
    program = program_of(*mlp(), world=4)
    launch = {"linear": (50e3, 90e3), "collective": (40e3, 0.0), "update": (80e3, 5e3)}
    simulation = _C.simulate(program, _C.CostModel(machine(launch, 4)), record=True)
    assert simulation.device_step_ns < simulation.step_ns == max(simulation.host_ns)
    launched = {(e.step, e.device): e.end_ns for e in simulation.events if e.host}
    devices = [e for e in simulation.events if not e.host]
    assert {e.step for e in simulation.events if e.host and e.step < 0} == {-1}
    assert all(e.begin_ns >= launched.get((e.step, e.device), 0) for e in devices)
    assert any(e.begin_ns == launched[e.step, e.device] for e in devices if (e.step, e.device) in launched)
    hosts: dict[int, list[Any]] = {}
    for e in simulation.events:
        if e.host:
            hosts.setdefault(e.device, []).append(e)
    for device, events in hosts.items():
        assert events[0].begin_ns == 0 and events[-1].end_ns == simulation.host_ns[device]
        assert all(a.end_ns == b.begin_ns for a, b in itertools.pairwise(events))


def test_a_cpu_has_no_such_host() -> None:
    simulation = _C.simulate(program_of(*mlp(), world=1), _C.CostModel(Machine(1)), record=True)
    assert simulation.host_ns == [0] and simulation.device_step_ns == simulation.step_ns
    assert not any(e.host for e in simulation.events)


@pytest.mark.parametrize("batch", [32, 1 << 17])
def test_plan_says_what_bounds_the_step(batch: int) -> None:
    with torch.device("meta"):
        module, inputs = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), (torch.randn(batch, 1024), torch.zeros(batch, dtype=torch.long))
    plan = torch_soap.manual_plan(module, inputs, loss=F.cross_entropy, machine=Machine.preset("h100"))
    host, step = plan.predicted["host_ns"][0], plan.predicted["step_time_ns"]
    line = f"the host queues kernels for {host / 1e6:.2f} ms of a {step / 1e6:.2f} ms step"
    assert (host == step) == (line in plan.explain()) == (batch == 32)
    program = _C.lower(plan.known_context("test").graph, plan.strategy, plan.known_context("test").rows)
    assert {e.stream for e in simulated_events(program, plan)} == {"compute", "host"}
    found = report_data(plan, program, title="", timeline=(), step_seconds=(), seconds=1)
    assert {e[2] for e in found["timeline"]["simulated"]} == {0, 2} and found["timeline"]["steps"][-1][0] == "update"
    assert sum(found["parts"].values()) == step
    assert found["parts"].get("waiting for the host", 0) == step - plan.predicted["device_step_ns"]


def test_files() -> None:
    data = to_json(Machine.preset("h200"))
    again = json.loads(json.dumps(data))
    assert from_json(again) == Machine.preset("h200")
    again["format"] = 3
    del again["launch"]
    assert from_json(again).launch == {}
    data = json.loads(json.dumps(data))
    again = {**data, "launch": {"linear": [1.0]}}
    with pytest.raises(ValueError, match=r"launch\[linear\] must be a pair \[forward ns, backward ns\]"):
        from_json(again)
    again = {**data, "launch": {"linear": [1.0, -1.0]}}
    with pytest.raises(ValueError, match=r"launch\[linear\] is -1, it must be a number from 0 up"):
        from_json(again)
    again = {**data, "busy_speed": [1.0]}
    with pytest.raises(ValueError, match="busy_speed has 1 entries and launch 26: a device either computes on its host's cores"):
        from_json(again)


def test_what_torch_does_within_another_call_has_no_overhead_of_its_own() -> None:
    module, image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(32, 3, 8, 8, device="meta")
    graph = graph_of(module.to("meta"), image)
    program = _C.lower(graph, dict(_C.seeds(graph, 1))["one device"], [32])
    node = next(n.id for n in program.graph.nodes if n.target == "running_average")
    launch = {"pointwise": (3e3, 4e3)}
    own, within = (_C.CostModel(machine(launch | more)).time(program, node) for more in ({}, {"running_average": (0.0, 0.0)}))
    assert own[0] - within[0] == 700 and own[1] == within[1] == 0
