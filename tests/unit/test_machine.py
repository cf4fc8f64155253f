"""Machines: presets, files, what operators cost on them, and a cache that doesn't keep a busy machine's figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_soap
from tests.unit.planning import graph_of, lowered
from torch_soap import _C, cache, calibrate, measuring, movement_times
from torch_soap.cli import main
from torch_soap.machine import ADDED, FIELDS, FORMAT, from_json, named, to_json

Function = Callable[..., torch.Tensor]


class Call(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)


def works(module: nn.Module, *inputs: torch.Tensor, plan: str = "* @ [0]") -> dict[str, list[_C.Work]]:
    """Of each operator by target, the work of its tiles."""
    world = 1 if plan == "* @ [0]" else 2
    graph = graph_of(module, *inputs)
    rows = inputs[0].shape[0]
    program = lowered(graph, plan, [rows // world] * world)
    out: dict[str, list[_C.Work]] = {}
    for node in program.graph.nodes:
        if node.kind == _C.NodeKind.op:
            tiles = 1 if world == 1 else program.tilings[node.id].tiles
            out.setdefault(node.target, []).extend(_C.work_of(program, node.id, t) for t in range(tiles))
    return out


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


# (module, inputs, target, family, operations by hand)
COUNTS: list[tuple[nn.Module, tuple[torch.Tensor, ...], str, str, int]] = [
    (nn.Linear(5, 7), (torch.randn(3, 5),), "linear", "matmul", 2 * 3 * 5 * 7),
    (Call(torch.matmul), (torch.randn(3, 4, 5), torch.randn(3, 5, 6)), "matmul", "matmul", 2 * 3 * 4 * 5 * 6),
    (Call(torch.bmm), (torch.randn(3, 4, 5), torch.randn(3, 5, 6)), "bmm", "matmul", 2 * 3 * 4 * 5 * 6),
    (nn.Conv2d(4, 6, 3, padding=1, stride=2), (torch.randn(2, 4, 8, 8),), "conv2d", "convolution", 2 * (2 * 6 * 4 * 4) * (4 * 3 * 3)),
    (nn.Conv2d(4, 6, 3, groups=2), (torch.randn(2, 4, 8, 8),), "conv2d", "convolution", 2 * (2 * 6 * 6 * 6) * (2 * 3 * 3)),
    (nn.Conv1d(4, 4, 5, groups=4), (torch.randn(2, 4, 9),), "conv1d", "convolution", 2 * (2 * 4 * 5) * (1 * 5)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (torch.randn(2, 4, 5, 5),), "conv_transpose2d", "convolution", 2 * (2 * 4 * 5 * 5) * (6 * 2 * 2)),
    (Call(attention), (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)), "scaled_dot_product_attention", "attention",
     2 * 2 * 3 * 5 * 7 * (4 + 6)),
    (Call(causal), (torch.randn(2, 3, 5, 4),) * 3, "scaled_dot_product_attention", "attention", 2 * 2 * 3 * (1 + 2 + 3 + 4 + 5) * (4 + 4)),
    (nn.Embedding(100, 8), (torch.randint(100, (2, 3)),), "embedding", "embedding", 0),
    (nn.ReLU(), (torch.randn(3, 5),), "relu", "pointwise", 0),
]  # fmt: skip


@pytest.mark.parametrize(("module", "inputs", "target", "family", "flops"), COUNTS, ids=lambda v: v if isinstance(v, str) else None)
def test_operations_are_counted(module: nn.Module, inputs: tuple[torch.Tensor, ...], target: str, family: str, flops: int) -> None:
    (work,) = works(module, *inputs)[target]
    assert (work.family, work.dtype if inputs[0].is_floating_point() else "float32") == (family, "float32")
    assert work.flops == flops


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_operations_of_recurrent_layers(kind: type[nn.RNNBase], gates: int) -> None:
    layer = kind(5, 6, batch_first=True)
    found = works(Call(lambda x: layer(x)[0]), torch.randn(2, 7, 5))
    (work,) = [w for ws in found.values() for w in ws if w.family == "recurrent"]
    assert work.flops == 2 * 7 * 2 * gates * 6 * (5 + 6)


def test_tiles_share_the_operations() -> None:
    """Halves of a linear's outputs; of causal queries the later half sees more keys; of a table's rows only what is looked up is read."""
    assert [w.flops for w in works(nn.Linear(4, 6), torch.randn(2, 4), plan="* o=2")["linear"]] == [2 * 2 * 4 * 3] * 2
    tiles = works(Call(causal), *(torch.randn(2, 1, 4, 4),) * 3, plan="* s=2")["scaled_dot_product_attention"]
    assert [w.flops for w in tiles] == [2 * 2 * (1 + 2) * 8, 2 * 2 * (3 + 4) * 8]
    (work,) = works(nn.Embedding(1000, 8), torch.randint(1000, (2, 3)))["embedding"]
    assert work.num_bytes == 6 * 8 + 6 * 8 * 4 + 6 * 8 * 4  # indices, rows read, rows given


# (module, inputs, target, size and width that curves of efficiency go by)
SIZES: list[tuple[nn.Module, tuple[torch.Tensor, ...], str, tuple[int, int]]] = [
    (nn.Linear(5, 7), (torch.randn(3, 5),), "linear", (3, 0)),
    (nn.Linear(5, 7), (torch.randn(3, 4, 5),), "linear", (5, 0)),
    (Call(torch.bmm), (torch.randn(2, 9, 8), torch.randn(2, 8, 7)), "bmm", (7, 0)),
    (Call(attention), (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)), "scaled_dot_product_attention", (7, 4)),
    (nn.LayerNorm((3, 5)), (torch.randn(4, 3, 5),), "layer_norm", (15, 0)),
    (nn.Softmax(1), (torch.randn(4, 3, 5),), "softmax", (3, 0)),
    (nn.BatchNorm1d(3), (torch.randn(4, 3),), "batch_norm", (0, 0)),
    (nn.ReLU(), (torch.randn(3, 5),), "relu", (15, 0)),
    (nn.Embedding(100, 8), (torch.randint(100, (2, 3)),), "embedding", (0, 0)),
]


@pytest.mark.parametrize(("module", "inputs", "target", "size"), SIZES, ids=range(len(SIZES)))
def test_sizes_that_efficiencies_go_by(module: nn.Module, inputs: tuple[torch.Tensor, ...], target: str, size: tuple[int, int]) -> None:
    (work,) = works(module, *inputs)[target]
    assert (work.size, work.width) == size


def test_a_curve_goes_before_the_efficiency_of_its_family() -> None:
    """Of the nearest width; between points by the logarithm of the size, beyond them level; forward and backward."""
    machine = torch_soap.Machine(1)
    machine.efficiency = {"attention": 0.9}
    machine.curves = {"attention/bfloat16/64": [(1024, 0.2, 0.1), (4096, 0.4, 0.3)], "attention/bfloat16/128": [(512, 0.7, 0.6)]}
    assert machine.parts_of("attention", "bfloat16", 2048, 64) == pytest.approx((0.3, 0.2))
    assert machine.parts_of("attention", "bfloat16", 2048, 80) == pytest.approx((0.3, 0.2))
    assert machine.parts_of("attention", "bfloat16", 16, 64) == (0.2, 0.1) and machine.parts_of("attention", "bfloat16", 1 << 20, 64) == (0.4, 0.3)
    assert machine.parts_of("attention", "bfloat16", 16, 200) == (0.7, 0.6)
    for without in (("attention", "float32", 16, 64), ("attention", "bfloat16", 0, 64)):
        assert machine.parts_of(*without) == (0.9, 0.9)
    assert machine.parts_of("matmul", "bfloat16", 2048, 64) == (1.0, 1.0)


def test_views_move_nothing() -> None:
    (work,) = works(Call(lambda x: x.view(2, 2, 8) * 2), torch.randn(2, 16))["view"]
    assert (work.flops, work.num_bytes) == (0, 0)


def test_roofline_by_hand() -> None:
    """Overhead, and the slower of operations and bytes over the efficiency; the default machine reaches its rates."""
    program = lowered(graph_of(nn.Linear(512, 512, bias=False), torch.randn(1024, 512)), "* @ [0]", [1024])
    node = next(n.id for n in program.graph.nodes if n.target == "linear")
    machine = torch_soap.Machine(1)
    flops = 2 * 1024 * 512 * 512
    assert _C.CostModel(machine).time(program, node)[0] == int(15e3 + flops / 50e9 * 1e9)
    machine.efficiency, machine.flops_by_dtype = {"matmul": 0.5}, {"float32": 2e11}
    assert _C.CostModel(machine).time(program, node)[0] == int(15e3 + flops / 2e11 / 0.5 * 1e9)
    machine.memory_bytes_per_s = 1e9
    assert _C.CostModel(machine).time(program, node)[0] == int(15e3 + 4 * (1024 * 512 * 2 + 512 * 512) / 1e9 / 0.5 * 1e9)
    machine.curves = {"matmul/float32": [(256, 0.5, 0.25), (1024, 1.0, 0.5)]}
    seconds = 4 * (1024 * 512 * 2 + 512 * 512) / 1e9
    assert _C.CostModel(machine).time(program, node) == (int(15e3 + seconds / 0.75 * 1e9), int(2 * (15e3 + seconds / 0.375 * 1e9)))


@pytest.mark.parametrize("name", _C.machine_presets())
def test_presets_are_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine = torch_soap.Machine.preset(name, hosts=2, devices_per_host=4)
    machine.speed = [1.0, 1 / 3] * 4
    machine.tables = {"exchange/2/1": [(4096, 12345), (1 << 40, 1 << 50)]}
    machine.op_overhead_ns, machine.tf32, machine.overlap = 0.1 + 0.2, True, not machine.overlap
    machine.save(path)
    again = torch_soap.Machine.load(path)
    assert again == machine and isinstance(again, torch_soap.Machine)
    assert to_json(again) == to_json(machine)
    machine.speed = []
    assert again != machine


def test_every_field_is_in_the_file() -> None:
    bound = {n for n, v in vars(_C.Machine).items() if isinstance(v, property) and v.fset is not None}
    assert bound == set(FIELDS)


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r'there is no preset "tpu"; there are a100, cpu-10g, .*p100, v100'):
        torch_soap.Machine.preset("tpu")


WRONG: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.pop("overlap"), "the field overlap is missing"),
    (lambda d: d["inter"].pop("per_host"), "the field inter.per_host is missing"),
    (lambda d: d.update(flops=1), "there is no field flops; the fields are name, host_of"),
    (lambda d: d.update(flops_per_s="fast"), 'flops_per_s must be a number, not "fast"'),
    (lambda d: d.update(tf32=1), "tf32 must be true or false, not 1"),
    (lambda d: d.update(memory_bytes=True), "memory_bytes must be an integer of 64 bits, not true"),
    (lambda d: d.update(memory_bytes=1 << 70), "memory_bytes must be an integer of 64 bits"),
    (lambda d: d.update(host_of=[0, 0.5]), r"host_of\[1\] must be an integer"),
    (lambda d: d.update(intra=3), "intra. must be an object, not 3"),
    (lambda d: d.update(tables={"exchange/2/1": [[1]]}), r"tables\[exchange/2/1\]\[0\] must be a pair \[bytes, ns\], not \[1\]"),
    (lambda d: d.update(curves={"attention/bfloat16/64": [[1, 2]]}), r"curves\[attention/bfloat16/64\]\[0\] must be \[size, forward, backward\]"),
    (lambda d: d.update(curves={"attention": []}), 'curves has "attention", a key is <family>/<type> or'),
    (lambda d: d.update(curves={"matmul/bfloat16": [[2, 1, 1], [1, 1, 1]]}), r"curves\[matmul/bfloat16\] must rise in size: 1 follows 2"),
    (lambda d: d.update(memory_bytes_per_s=float("nan")), "memory_bytes_per_s is nan, it must be a positive number"),
    (lambda d: d.update(format=9), "the file has format 9, this version reads 1 to 8"),
    (lambda d: d.pop("format"), "the field format is missing"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_an_error_that_names_the_field(change: Callable[[dict[str, Any]], Any], text: str, tmp_path: Path) -> None:
    data = to_json(torch_soap.Machine(2))
    change(data)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"\[machine\] .*machine.json: " + text):
        torch_soap.Machine.load(path)


@pytest.mark.parametrize("text", ["preset:h100", "preset:h100:8", "preset:h100:8x", "preset:h100:-1x2"])
def test_names_of_the_command_line(text: str) -> None:
    assert named("preset:h100:2x8").num_devices == 16
    with pytest.raises(ValueError, match="is not preset:<name>:<hosts>x<devices per host>"):
        named(text)


def test_plan_for_a_machine_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through Python on the meta device, and through the command line from a file: the same plan."""
    with torch.device("meta"):
        model, x, y = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 64), torch.randint(4, (8,))
    machine = torch_soap.Machine.preset("p100", hosts=2, devices_per_host=2)
    plan = torch_soap.plan(model, (x, y), loss=nn.functional.cross_entropy, machine=machine)
    assert plan.world_size == 4 and plan.machine == {"name": "p100 2x2", "devices": 4} and plan.predicted["step_time_ns"] > 0
    machine.save(tmp_path / "machine.json")
    texts = []
    for name in (str(tmp_path / "machine.json"), "preset:p100:2x2"):
        main(["plan", "tests.unit.test_cli:factory", "--machine", name])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    with pytest.raises(SystemExit, match="has 4 devices, --world-size is 8"):
        main(["plan", "tests.unit.test_cli:factory", "--machine", "preset:p100:2x2", "--world-size", "8"])
    with pytest.raises(SystemExit, match=r"nowhere\.json"):
        main(["plan", "tests.unit.test_cli:factory", "--machine", "nowhere.json"])


def test_calibrate_writes_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SOAP_CACHE", str(tmp_path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    main(["calibrate", "--out", str(tmp_path / "machine.json")])
    text = capsys.readouterr().out
    assert "GFLOP/s per device" in text and "recurrent" in text
    machine = torch_soap.Machine.load(tmp_path / "machine.json")
    assert set(machine.efficiency) >= set(_C.OP_FAMILIES) - {"other"} and all(v > 0 for v in machine.efficiency.values())
    monkeypatch.setattr(cache, "forget_doubtful", lambda *_: [])  # this machine may be busy
    monkeypatch.setattr(cache, "doubt", lambda _: None)  # test_slow_minutes.py
    monkeypatch.setattr(calibrate, "timed", None)  # from the cache: nothing is measured
    again = calibrate.detect(1, None, cache.load(1))
    assert again == machine


@pytest.mark.parametrize(("busy_speed", "counts"), [([1.0, 0.98, 0.97, 0.95], True), ([1.08, 0.92, 0.65, 0.5], False)])
def test_ranks_that_take_turns_on_cores_lose_nothing_while_they_wait(busy_speed: list[float], counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others compute then: what a rank comes late, and what caches it finds, is in the tables of movements."""
    monkeypatch.setattr(calibrate, "CORES", measuring.Cores())
    layouts = {f"{kind}/{ranks}/1": [[4096, 1000]] for ranks in (2, 4) for kind in ("exchange", "all_reduce")}
    data = {
        "cores_ns": 50,
        "rates": [1e10, 1e10, 100.0],
        "update": [[1024, 10]],
        "busy_speed": busy_speed,
        "update_speed": busy_speed,
        "jitter": 0.2,
        "step_overhead": [1, 2, 3],
        "piece_ns": 4.0,
    }
    comm: Any = SimpleNamespace(rank=0, world_size=4, join=lambda groups: None, gather_objects=lambda mine: [mine] * 4)
    machine = calibrate.detect(4, comm, data | {"tables": layouts, "cold_ns": 3e6, "turn_ns": 2e6}, [0] * 4)
    assert machine.busy_speed == busy_speed and set(machine.tables) == set(layouts)
    assert (machine.jitter, machine.cold_ns, machine.turn_ns) == ((0.2, 3e6, 0.0) if counts else (0.0, 0.0, 2e6))
    assert machine.step_overhead_ns == (1 if counts else 1 + 2 * 2e6), "a step has two meetings of its own"


def test_what_turns_cost_is_what_computing_and_moving_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest rank's, the mean over movements; each of rank 1's takes 40 ns more."""
    samples = iter([(900.0, 500.0, 100.0), (800.0, 500.0, 100.0), (700.0, 500.0, 100.0), (600.0, 500.0, 140.0)])  # with both; computing; moving
    monkeypatch.setattr(movement_times, "calm_samples", lambda *_, **__: ([next(samples)], 1.0))
    comm: Any = SimpleNamespace(rank=0, world_size=2, gather_ints=lambda mine: [mine, [ns + 40 for ns in mine]])
    known = cache.nothing_known()
    assert movement_times.measure_turns(comm, known) == 40 + (300 + 200 + 100 - 40) / 4
    assert movement_times.measure_turns(comm, known) == known["turn_ns"], "from the cache too"


@pytest.mark.parametrize("own_core", [True, False])
def test_a_steps_own_time_is_by_own_clocks_where_ranks_take_turns(own_core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by the speed with all at work; what a segment and a parameter take is counted at that speed by the simulator."""
    own, clocks, times = time.process_time_ns, list[Any](), iter([(1000, 0), (100, 7), (730, 0)])  # of one layer; of one parameter; of many

    def time_step(comm: Any, num_layers: int, width: int, clock: Any) -> tuple[int, int, measuring.Timing]:
        clocks.append(clock)
        return *next(times), measuring.Timing(1, 0.0)

    monkeypatch.setattr(calibrate, "time_step", time_step)
    monkeypatch.setattr(calibrate, "own_clock", lambda: own)
    machine = torch_soap.Machine(4, 1)
    machine.busy_speed, machine.update = [1.0, 1.0, 0.7, 0.5], [(1024, 20)]
    calibrate.measure_step(machine, cast(Any, None), cache.nothing_known(), own_core)
    assert clocks == [time.perf_counter_ns if own_core else own] * 3
    assert machine.step_overhead_ns == (990 if own_core else 1980)
    assert machine.segment_overhead_ns == 7 and machine.update == [(1024, 30)]


@pytest.mark.parametrize(("own_core", "between"), [(True, True), (False, False)])
def test_movements_of_ranks_that_take_turns_are_timed_back_to_back(own_core: bool, between: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[str]()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(movement_times, "execute", lambda *_: seen.append("moved"))
    monkeypatch.setattr(movement_times, "calm_samples", lambda sample, *_, **__: ([sample()], 1.0))
    comm: Any = SimpleNamespace(rank=0, world_size=2, gather_ints=lambda mine: [mine])
    with Seen():
        movement_times.time_movement(comm, "all_reduce", [0, 1], 4096, own_core)
    assert "moved" in seen and ("aten.mm.default" in seen) == between


def known(**marks: list[float]) -> dict[str, Any]:
    tables: dict[str, Any] = {name.split("/")[1]: [[1, 2]] for name in marks}
    return {"tables": tables, "operators": {}, "marks": dict(marks), "load": 9.0}


def test_figures_of_a_busy_machine_are_forgotten() -> None:
    """A large spread, for TRIES runs; a load that has gone since. The rest stays."""
    data = known(
        **{"tables/calm": [0.0, 0.1, 1], "tables/noisy": [0.8, 0.1, 1], "tables/never_quiet": [0.8, 0.1, measuring.TRIES], "tables/busy": [0.0, 2.0, 1]}
    )
    data["rates"], data["marks"]["rates"] = [1, 2, 3], [0.9, 0.0, 1]
    assert measuring.forget_doubtful(data, load=1.8) == ["tables/noisy", "rates"]
    assert "rates" not in data and sorted(data["tables"]) == ["busy", "calm", "never_quiet"]
    assert measuring.forget_doubtful(data, load=0.2) == ["tables/busy"]
    measuring.mark(data, "tables/noisy", measuring.Timing(10**9, 0.9), measuring.Timing(100, 3.0))
    assert data["marks"]["tables/noisy"] == [0.9, 0.2, 2]
    measuring.mark(data, "tables/noisy", measuring.Timing(100, 3.0))  # 300 ns: jitter
    assert data["marks"]["tables/noisy"] == [0.0, 0.2, 3]


def test_noisy_measurements_are_repeated_and_the_calmest_is_taken() -> None:
    timings = [measuring.Timing(10**7, s) for s in (0.9, 0.5, 0.7, 0.0)]
    left = iter(timings)
    assert measuring.calmest(lambda: next(left)) == timings[1]
    assert list(left) == timings[3:]
    calm = iter([measuring.Timing(10**7, 0.1), measuring.Timing(1, 0.0)])
    assert measuring.calmest(lambda: next(calm)).ns == 10**7


def test_what_comes_before_a_run_is_not_timed() -> None:
    now, seen = [0], []

    def before() -> str:
        now[0] += 1000
        return "given"

    def work(given: str) -> None:
        seen.append(given)
        now[0] += 7

    assert measuring.timed(work, 3, lambda: now[0], before=before, pace=lambda: 1.0) == measuring.Timing(7, 0.0)
    assert seen == ["given"] * 4  # one to warm up
    assert measuring.timed(lambda: work("none"), 3, lambda: now[0], pace=lambda: 1.0).ns == 7


def test_samples_of_slow_moments_are_taken_again() -> None:
    """A neighbour slows the second and the third of five samples."""
    readings = iter([1.0, 1.0, 1.7, 1.1, 1.0, 1.2, 1.0])
    samples = iter(range(99))
    assert measuring.calm_samples(lambda: next(samples), 3, pace=lambda: next(readings)) == ([0, 3, 4], 1.2)
    assert next(samples) == 5, "no more than needed"
    slow = iter([1.5, 1.5, 1.9, 1.6, 1.4, 1.4, 1.8, 2.0])
    values, worst = measuring.calm_samples(lambda: next(samples), 3, pace=lambda: next(slow), together=SimpleNamespace(worst=float, moved=lambda: False))
    assert values == [10, 6, 9] and worst == 1.6, "the calmest of seven, where none is calm"


def test_a_slow_pace_makes_a_figure_doubtful() -> None:
    now = [0]

    def work() -> None:
        now[0] += 10**7

    assert not measuring.timed(work, 3, lambda: now[0], pace=lambda: 1.2).noisy
    timing = measuring.timed(work, 3, lambda: now[0], pace=lambda: 1.6)
    assert timing.noisy and timing.ns == 10**7


def test_the_pace_is_in_times_of_the_fastest_reading() -> None:
    pace = measuring.Pace()
    assert pace() == 1.0 and pace.fastest_ns > 0
    pace.fastest_ns = 1
    assert pace() > 100


def test_the_cache_keeps_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SOAP_CACHE", str(tmp_path))
    data = {
        **cache.nothing_known(),
        "operators": {"calm": [1, 2], "noisy": [3, 4]},
        "marks": {"operators/calm": [0.0, 0.0, 1], "operators/noisy": [2.0, 0.0, 1]},
    }
    cache.save(3, data)
    again = cache.load(3)
    assert again["operators"] == {"calm": [1, 2]} and again["marks"] == data["marks"]


def test_movements_are_measured_in_the_groups_that_plans_use() -> None:
    """All ranks, powers of two within hosts, a rank of each host; groups of a kind are disjoint."""
    assert movement_times.group_layouts([0, 0]) == {(2, 1): [[0, 1]]}
    assert movement_times.group_layouts([0, 0, 0, 0]) == {(4, 1): [[0, 1, 2, 3]], (2, 1): [[0, 1], [2, 3]]}
    assert movement_times.group_layouts([0, 0, 1, 1]) == {(4, 2): [[0, 1, 2, 3]], (2, 1): [[0, 1], [2, 3]], (2, 2): [[0, 2], [1, 3]]}


@pytest.mark.parametrize("number", range(1, FORMAT))
def test_files_of_earlier_formats_are_read(number: int) -> None:
    data = to_json(torch_soap.Machine(2))
    for name, (since, _) in ADDED.items():
        if since > number:
            del data[name]
    assert from_json({**data, "format": number}) == torch_soap.Machine(2)


def test_shared_cores_and_overlap_do_not_go_together() -> None:
    machine = torch_soap.Machine(2)
    machine.overlap, machine.busy_speed = True, [1.5, 1.0]
    with pytest.raises(ValueError, match="overlap and busy_speed don't go together"):
        _C.check_machine(machine)
