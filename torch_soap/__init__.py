"""torch_soap: nobody should have to choose a parallelization strategy by hand again."""

from torch_soap import _ops as _ops
from torch_soap import backend as _c10d_backend
from torch_soap.api import grad_norm, parallelize, plan
from torch_soap.compare import diff
from torch_soap.machine import Machine
from torch_soap.manual import manual_plan
from torch_soap.plan import Plan
from torch_soap.random_ops import counter_rng
from torch_soap.runtime.header import RankMismatchError
from torch_soap.runtime.saving import load, save
from torch_soap.verify import Report, verify

__all__ = [
    "Machine",
    "Plan",
    "RankMismatchError",
    "Report",
    "counter_rng",
    "diff",
    "grad_norm",
    "load",
    "manual_plan",
    "parallelize",
    "plan",
    "save",
    "verify",
]
_c10d_backend.register()
__version__ = "0.1.0"
