"""Runtime: executes a rank's program. Knows no search."""

from torch_soap.runtime.comm import Comm, ThreadComm, TorchComm
from torch_soap.runtime.engine import Engine, StepState

__all__ = ["Comm", "Engine", "StepState", "ThreadComm", "TorchComm"]
