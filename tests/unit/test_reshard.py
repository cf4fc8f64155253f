"""What moves: the collectives of plans that a person would write are those that they are known for."""

from __future__ import annotations

import random
from collections import Counter

import torch
from torch import nn

from tests.unit.planning import copies, graph_of, lowered, movements, node, op_graph, patterns
from torch_soap import _C
from torch_soap.capture import capture
from torch_soap.testing import random_plan_of
from torch_soap.verify import verify


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.last = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(torch.relu(self.up(self.first(x)))))


def mlp() -> _C.OpGraph:
    return graph_of(Mlp(), torch.randn(8, 4))


def test_data_parallel_reduces_gradients_and_nothing_else() -> None:
    program = lowered(mlp(), "* n=fed", [3, 5])
    assert patterns(program) == Counter({"grad_fill all_reduce": 8})
    sizes = {name: elements for _, name, _, elements in movements(program)}
    assert sizes["param:up.weight"] == 32 and sizes["param:up.bias"] == 8


def test_data_parallel_gradients_travel_in_buckets() -> None:
    graph = mlp()
    one = lowered(graph, "* n=fed", [4, 4])
    many = lowered(graph, "set bucket_bytes=1\n* n=fed", [4, 4])

    def buckets(program: _C.Program) -> int:
        return sum(s.kind == _C.StepKind.grad_fill and any(program.movement(s.kind, i).pattern != _C.Pattern.local for i in s.items) for s in program.steps)

    assert buckets(one) == 1 and buckets(many) == 8


def test_megatron_mlp_is_two_all_reduces() -> None:
    program = lowered(mlp(), "first replicas=2\nup o=2\n/relu d1=2\ndown i=2\nlast replicas=2", [4, 4])
    block = ("first", "up", "/relu", "down")
    inside = [(kind, name, pattern) for kind, name, pattern, _ in movements(program) if name in block or name.startswith(("param:up", "param:down"))]
    assert inside == [("fill", "down", "all_reduce"), ("grad_fill", "first", "all_reduce")]


def test_fully_sharded_gathers_twice_and_scatters_once() -> None:
    program = lowered(mlp(), "* n=fed store=shard keep=use", [4, 4])
    assert Counter(kind for kind, name, _, _ in movements(program) if name.startswith("param:")) == Counter(fill=8, refill=8, grad_fill=8)
    assert all(name.startswith("param:") for _, name, _, _ in movements(program))
    kept = lowered(mlp(), "* n=fed store=shard", [4, 4])
    assert Counter(kind for kind, _, _, _ in movements(kept)) == Counter(fill=8, grad_fill=8)
    gathered = {name: n for kind, name, _, n in movements(kept) if kind == "fill"}
    assert gathered["param:up.weight"] == 32  # each of two ranks gets the other's half


def test_fed_rows_do_not_move() -> None:
    for rows in ([4, 4], [7, 1], [8, 0]):
        program = lowered(mlp(), "* n=fed", rows)
        assert not movements(program, lambda name: not name.startswith("param:"))
    moved = movements(lowered(mlp(), "first n=2", [7, 1]), lambda name: name == "in:0")
    assert moved == [("fill", "in:0", "exchange", 3 * 4)]


def test_halo_is_only_the_halo() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 5, padding=2))
    graph = graph_of(model, torch.randn(1, 1, 12, 7))
    program = lowered(graph, "0 h=3\n1 h=3", [1, 0, 0])
    assert [box[2] for box, _ in copies(program, "0")] == ["[0,6)", "[2,10)", "[6,12)"]
    # Two rows over each of two borders, both ways; back the same gradients.
    assert movements(program, lambda name: name == "0") == [("fill", "0", "exchange", 8 * 7), ("grad_fill", "0", "exchange", 8 * 7)]


def test_many_owners_in_one_halo() -> None:
    """Tiles smaller than the halo need rows of more than one neighbour."""
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 5, padding=2))
    program = lowered(graph_of(model, torch.randn(1, 1, 6)), "0 l=[0,1,2,3,6]\n1 l=4", [1, 0, 0, 0])
    assert [box[2] for box, _ in copies(program, "0")] == ["[0,3)", "[0,5)", "[1,6)", "[2,6)"]


def test_copies_are_covered_exactly_once() -> None:
    """Of every complete tensor in random plans; partial ones are covered by every addend."""
    captured = capture(Mlp(), (torch.randn(8, 4),), {})
    graph = op_graph(captured)
    for seed in range(20):
        world = random.Random(seed).randint(1, 6)
        plan = random_plan_of(captured, world, seed)
        program = _C.lower(graph, plan.strategy, [8] + [0] * (world - 1))
        for group in program.groups:
            tiles = program.tiles[group.tensor]
            for copy in group.copies.coords:
                covered = sum(overlap(copy.box, t.box) for t in tiles.coords)
                wanted = size(copy.box)
                assert covered == wanted if tiles.partial == _C.Reduce.none else covered % max(wanted, 1) == 0


def size(box: list[_C.IndexSet]) -> int:
    out = 1
    for part in box:
        out *= len(part)
    return out


def overlap(a: list[_C.IndexSet], b: list[_C.IndexSet]) -> int:
    out = 1
    for x, y in zip(a, b, strict=True):
        out *= sum(max(0, min(e1, e2) - max(b1, b2)) for b1, e1 in x.runs for b2, e2 in y.runs)
    return out


def test_lowering_is_a_function() -> None:
    """The same text, whoever lowers: all ranks compare its hash."""
    first, second = (str(lowered(mlp(), "up o=2\ndown i=2\n* n=fed", [4, 4])) for _ in range(2))
    assert first == second
    assert node(mlp(), "up").target == "linear"


def traffic(module: nn.Module, inputs: torch.Tensor, plan: str, world_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """What all ranks together sent in one step: operations and float64 elements by kind, in a run."""
    report = verify(module, inputs, plan, world_size=world_size, steps=1)
    assert report.ok, report
    return report.operations, {kind: n // 8 for kind, n in report.num_bytes.items()}


def test_what_runs_moves_what_is_planned() -> None:
    """By every rank's own count: an all-reduce counts its tensor on each rank, an exchange what each rank sends."""
    numel = sum(p.numel() for p in Mlp().parameters())
    assert traffic(Mlp(), torch.randn(8, 4), "* n=fed", 2) == ({"all_reduce": 2}, {"all_reduce": 2 * numel})  # one bucket, once
    operations, elements = traffic(Mlp(), torch.randn(8, 4), "* n=fed store=shard keep=use", 2)
    assert set(operations) == {"exchange"}
    assert elements == {"exchange": 3 * numel}  # gathered, gathered again, scattered: each time every rank sends half of everything
    block = "first replicas=2\nup o=2\n/relu d1=2\ndown i=2\nlast replicas=2"
    operations, elements = traffic(Mlp(), torch.randn(8, 4), block, 2)
    assert operations["all_reduce"] == 2 * 2 and elements["all_reduce"] == 2 * 2 * 8 * 4  # forward and backward, [8, 4] each
    # The feed: each rank gets the other's 4 rows. The return: the rows are there already; their gradients come from the other.
    assert elements["exchange"] == 8 * 4 + 8 * 4
    halo = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 5, padding=2))
    _, elements = traffic(halo, torch.randn(1, 1, 12, 7), "0 h=2\n1 h=2", 2)
    feed, back = 7 * 7, 6 * 7  # the rank without rows gets 7 of the image's for its 6, and its 6 of the result go home: cotangents come
    border = 2 * 2 * 7  # two rows each way
    parameters = sum(p.numel() for p in halo.parameters())
    assert elements == {"exchange": feed + 2 * back + 2 * border, "all_reduce": 2 * parameters}
