"""save and load: checkpoints in the format of torch.distributed.checkpoint, whole tensors under their full names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def save(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Writes the model, the optimizer and the state of our random numbers to the folder `path`. Collective.

    The model may be parallelized or plain; any plan, any number of processes and the plain module can load it.
    """
    state: dict[str, Any] = {"model": dict(model.state_dict())}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    parallel = getattr(model, "_soap", None)
    if parallel is not None:
        state["random"] = parallel.random.state_dict()
    dcp.save(state, checkpoint_id=path)


def load(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Loads what `save` wrote, under any plan. Every process of the job must call it and see the folder.

    Raises:
        KeyError: the checkpoint has no optimizer and one was given.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, whole)
        state = torch.load(whole, weights_only=True)
    if optimizer is not None and "optimizer" not in state:
        raise KeyError(f"[load] {path} has no optimizer")
    model.load_state_dict(state["model"])
    if optimizer is not None:
        saved = state["optimizer"]
        saved["state"] = {int(k): v for k, v in saved.get("state", {}).items()}  # the format makes keys text
        optimizer.load_state_dict(saved)
    parallel = getattr(model, "_soap", None)
    if parallel is not None and "random" in state:
        parallel.random.load_state_dict(state["random"])
    if dist.is_initialized():
        dist.barrier()  # nobody deletes or writes the folder while another one reads
