"""Another plan for a model that is parallelized already."""

from __future__ import annotations

import torch

from torch_soap.plan import Plan
from torch_soap.runtime.meter import Meter
from torch_soap.runtime.parallel import Parallel


def replan(parallel: Parallel, plan: Plan) -> None:
    """From the next forward on the module, and its parallel copies, run this plan: parameters are brought together here and cut anew there; gradients
    are dropped. State of optimizers is laid out as the parameters were: gather it before (`state_dict`), and leave it in `pending_states`. Collective."""
    for other in {id(p): p for r in parallel.family if (p := r()) is not None}.values():
        with other.whole_parameters():
            whole = {name: p.data for name, p in other.parameters()}
        for name, parameter in other.parameters():
            parameter.grad = None
            # A loss that is still there keeps the node that adds to p.grad, and it the old shape: another type makes torch forget that node.
            parameter.data = torch.empty(0, dtype=torch.float64 if parameter.dtype != torch.float64 else torch.float32)
            parameter.data = whole[name]
        other.engines.clear()
        other.storage.clear()
        other.cuts.clear()
        other.calling.clear()
        other.boxes.clear()
        other.owners.clear()
        other.known.start(other.parameters())
        other.meter = Meter()
        other.plan = plan
    parallel.adopt(plan)
