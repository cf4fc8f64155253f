"""AutoParallel's placements of the model of benchmarks/test_peers.py, as JSON on the last line of its output. Needs the peer: see there.

Runs on a fake process group. Its tables of devices have no CPU, so the name that torch gives for the device is replaced by a GPU's.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.placement_types import Partial, Placement, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.peer_model import Model


def text(placement: Placement) -> Any:
    """A dim that is cut, "sum" or None."""
    return placement.dim if isinstance(placement, Shard) else "sum" if isinstance(placement, Partial) else None


def specs(of: Any) -> list[list[Any] | None]:
    return [None if s is None else [text(p) for p in s.placements] for s in (of if isinstance(of, list | tuple) else [of])]


def first_product(node: torch.fx.Node, order: dict[torch.fx.Node, int]) -> torch.fx.Node | None:
    """The product that reads a parameter first, through casts and transpositions."""
    found, todo = [], [node]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                continue
            name = str(user.target)
            if any(product in name for product in ("einsum", "mm", "linear")):
                found.append(user)
            elif len(user.all_input_nodes) == 1:
                todo.append(user)
    return min(found, key=order.__getitem__, default=None)


def main() -> None:
    rows, length, hidden, heads, layers, *mesh_shape = map(int, sys.argv[1:])
    world = 1
    for size in mesh_shape:
        world *= size
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with (
        patch("torch.cuda.get_device_name", lambda *a, **k: "H100"),
        patch("torch.cuda.device_count", lambda: 8),
        patch("torch.cuda.get_device_capability", lambda *a, **k: (9, 0)),
    ):
        from autoparallel.api import AutoParallel

        mesh = init_device_mesh("cpu", tuple(mesh_shape), mesh_dim_names=tuple(f"m{i}" for i in range(len(mesh_shape))))
        with torch.device("meta"):
            model = Model(hidden, heads, layers)
        begin = time.perf_counter()
        with AutoParallel(model, lambda: torch.rand(rows, length, hidden), mesh) as peer:
            traced = time.perf_counter()
            by_rows = (Shard(0),) * len(mesh_shape)
            peer.add_parameter_memory_constraint(low=None, high=None)
            peer.add_input_constraints([by_rows])
            peer.add_output_constraints([by_rows])
            solution = peer.optimize_placement(verbose=False)
            solved = time.perf_counter()
    order = {n: i for i, n in enumerate(next(iter(solution)).graph.nodes)}
    parameters = {}
    for node, spec in solution.items():
        name = getattr(node.meta.get("desc"), "target", None)
        if node.op != "placeholder" or not isinstance(name, str) or not name.endswith(".weight"):
            continue
        product = first_product(node, order)
        parameters[name] = {"stored": specs(spec.output_specs)[0], "product": None if product is None else specs(solution[product].output_specs)[0]}
    print(json.dumps({"trace_s": traced - begin, "solve_s": solved - traced, "parameters": parameters, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
