"""On each rank: bytes that the engine holds over shared memory, and what was predicted, by plan. See test_memory_held.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from tests.dist.launch import report
from tests.unit.test_memory import OPTIMIZER_COPIES, LiveBytes
from torch_soap import _C
from torch_soap.backend import init_string
from torch_soap.capture import capture
from torch_soap.random import CounterState
from torch_soap.rewrite.graph_import import to_op_graph
from torch_soap.runtime import Engine
from torch_soap.runtime.comm import TorchComm, transport
from torch_soap.runtime.storage import cut, stored_boxes
from torch_soap.verify import rank_rows

PLANS = {
    "ddp": "* n=fed",
    "zero-2": "* n=fed store=shard",
    "zero-3": "* n=fed store=shard keep=use",
    "megatron": "0 o=2\n2 i=2\n4 o=2",
    "pipeline": "0 n=1x4t @ [0]\n1 @ [0]\n2 n=1x4t @ [1]\n3 @ [1]\n4 n=1x4t @ [1]",
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(init_string())
    comm, rank = TorchComm(), dist.get_rank()
    layers = [nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 32)]
    module, x = nn.Sequential(*layers), torch.randn(64, 64)
    captured = capture(module, (x,), {})
    graph = captured.instantiate(captured._signature_of([x]))
    op_graph, rows = to_op_graph(graph), [32, 32]
    tensors = captured.stored_tensors(graph)
    machine = _C.Machine(2)
    found = {}
    for name, plan in PLANS.items():
        program = _C.lower(op_graph, _C.parse_plan(op_graph, plan, 2), rows)
        engine = Engine(program, graph, rank, comm)
        boxes = stored_boxes(program, rank)
        stored = {n: cut(t.detach(), boxes[n]).clone() for n, t in tensors.items()}
        feeds = {n.name: rank_rows(x, n.sample_dim, rows, rank).clone() for n in graph.nodes if n.kind == "feed"}
        old = [t.clone() for t in stored.values()]
        state_bytes = OPTIMIZER_COPIES * sum(t.numel() * t.element_size() for t in old)
        with LiveBytes([*stored.values(), *feeds.values(), *old]) as live:
            seeds = {engine.names[n]: torch.ones(engine.shapes[engine.value_of_return[n]]) for n in engine.returns if engine.return_wants_grad(n)}
            state = engine.forward(feeds, stored, grad=True, random=CounterState(1), seeds=None)
            old.clear()
            engine.backward(state, seeds)
        predicted = {}
        for machine.packs in (False, True):
            predicted[str(machine.packs)] = _C.simulate(program, _C.CostModel(machine)).memory_bytes[rank]
        found[name] = {"measured": live.peak + state_bytes, **predicted}
    report({"transport": transport(), "plans": found})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
