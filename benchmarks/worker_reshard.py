"""On each rank: a tensor goes from one layout to another, as a step's movement and by DTensor, by turns; seconds of each repetition.

torchrun --nproc-per-node=2 -m benchmarks.worker_reshard SECONDS (for each pair of layouts)
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from tests.dist.launch import report
from tests.unit.planning import graph_of, lowered, node
from torch_soap import _C
from torch_soap.rewrite.segment import DTYPES
from torch_soap.runtime.comm import TorchComm
from torch_soap.runtime.heap import keep_freed_memory
from torch_soap.runtime.movement import dense_strides, execute, plan_step

LEAST, MOST = 5, 200  # repetitions
# By name: how a linear layer makes the tensor so, how an elementwise operator reads it so, and what DTensor calls it.
LAYOUTS: dict[str, tuple[str, str, Placement]] = {
    "rows": ("n=2", "d0=2", Shard(0)),
    "columns": ("o=2", "d1=2", Shard(1)),
    "whole": ("replicas=2", "replicas=2", Replicate()),
    "addends": ("i=2", "", Partial()),
    "middle dim": ("s=2", "d1=2", Shard(1)),
    "last dim": ("o=2", "d2=2", Shard(2)),
}
# All pairs of a matrix's layouts, and one of a tensor of three dims: 64 MiB of float32.
MATRIX, THREE_DIMS = [4096, 4096], [256, 256, 256]
PAIRS = [
    ("rows", "columns", MATRIX),
    ("columns", "rows", MATRIX),
    ("rows", "whole", MATRIX),
    ("columns", "whole", MATRIX),
    ("whole", "rows", MATRIX),
    ("whole", "columns", MATRIX),
    ("addends", "whole", MATRIX),
    ("addends", "rows", MATRIX),
    ("addends", "columns", MATRIX),
    ("last dim", "middle dim", THREE_DIMS),
]


def movement(before: str, after: str, shape: list[int], comm: TorchComm) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """The fill that a plan has between a producer and a consumer, and this rank's part of what is made."""
    model = nn.Sequential(nn.Linear(4, shape[-1], bias=False), nn.ReLU())
    rows = [shape[0] // 2, shape[0] // 2]
    program = lowered(graph_of(model, torch.zeros(*shape[:-1], 4)), f"0 {LAYOUTS[before][0]}\n1 {LAYOUTS[after][1]}", rows)
    rank_program = _C.project(program, comm.rank)
    made = node(program.graph, "0").outputs[0]
    fills = [i for i in rank_program.instructions if i.kind == _C.InstructionKind.fill]
    fill = next(i for i in fills if any(program.groups[t.item.id].tensor == made for t in i.transfers))
    step = plan_step(program, rank_program, fill, DTYPES)
    source = next(m.src for t in step.transfers for m in t.moves if m.src >= 0)
    local = torch.randn(list(rank_program.values[source].shape))
    return (lambda: execute(step, comm, lambda value, dtype: local)[0][1]), local


def main() -> None:
    warnings.simplefilter("ignore")
    budget_s = float(sys.argv[1])
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training; for DTensor's results too
    dist.init_process_group("soap")
    comm = TorchComm()
    comm.join([])
    groups = {name: dist.new_group(backend=name) for name in ("soap", "gloo")}
    meshes = {name: DeviceMesh.from_group(group, "cpu") for name, group in groups.items()}
    out: list[dict[str, Any]] = []
    for before, after, shape in PAIRS:
        ours, local = movement(before, after, shape, comm)
        ways: dict[str, Callable[[], torch.Tensor]] = {"ours": ours}
        for name, mesh in meshes.items():
            tensor = DTensor.from_local(local, mesh, [LAYOUTS[before][2]], run_check=False, shape=torch.Size(shape), stride=dense_strides(torch.Size(shape)))

            def way(tensor: DTensor = tensor, mesh: DeviceMesh = mesh, target: Placement = LAYOUTS[after][2]) -> torch.Tensor:
                result = tensor.redistribute(mesh, [target]).to_local()
                return result.wait() if hasattr(result, "wait") else result

            ways[name] = way
        results = {name: way() for name, way in ways.items()}
        same = all(torch.equal(results["ours"], r) for r in results.values())
        times: dict[str, list[float]] = {name: [] for name in ways}
        enough, begin = torch.zeros(1), time.perf_counter()
        while enough == 0:
            for name, way in ways.items():
                dist.barrier()
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
            done = len(times["ours"])
            enough.fill_(done >= MOST or (done >= LEAST and time.perf_counter() - begin > budget_s))
            dist.broadcast(enough, 0)
        out.append({"before": before, "after": after, "shape": shape, "same": same, "times_s": times})
    report(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
