"""The c10d backend `soap`: `import torch_soap` registers it, `init_process_group("cpu:soap,cuda:nccl")` or `("soap")` uses it (docs/backend.md)."""

from __future__ import annotations

import atexit
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torch_soap import _backend


def create(options: Any, backend_options: Any = None) -> _backend.SoapBackend:
    """For c10d: the backend of one group. Collective over its ranks."""
    store, rank, size, timeout = options.store, options.group_rank, options.group_size, options.timeout
    if backend_options is not None and backend_options._timeout is not None:
        timeout = backend_options._timeout
    if not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)
    backend = _backend.SoapBackend(dist.PrefixStore("soap", store), rank, size, timeout, host())
    if backend.shares_memory:
        return backend
    if not backend.spans_hosts and rank == 0:
        warnings.warn(f"the process group uses gloo, not shared memory: {backend.why_not}", stacklevel=2)
    backend.set_fallback(dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout))
    return backend


def host() -> str:
    """What the user says this host is; empty: it is found out."""
    return os.environ.get("TORCH_SOAP_HOST", "")


def register() -> None:
    """Makes the name known to c10d; once for a process."""
    if not dist.is_available() or "SOAP" in dist.Backend._plugins:
        return
    dist.Backend.register_backend("soap", create, extended_api=True, devices=["cpu"])
    atexit.register(_backend.leave_all_groups)


def wanted() -> str:
    """What carries CPU tensors of parallelized models: soap unless the user says gloo."""
    name = os.environ.get("TORCH_SOAP_TRANSPORT", "soap")
    if name not in ("soap", "gloo"):
        raise ValueError(f"[backend] TORCH_SOAP_TRANSPORT is {name!r}: soap or gloo")
    return name


def init_string() -> str:
    """For `init_process_group`, where the user has made no process group."""
    return f"cpu:{wanted()},cuda:nccl" if torch.cuda.is_available() else wanted()


_beside: dict[str, dist.ProcessGroup] = {}  # by name of the group of the same ranks that the user made


def beside(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """All ranks' group for parallelized models: the user's own, or one over shared memory beside it where that is gloo's. Collective the first time."""
    if group is None:
        raise RuntimeError("[backend] there is no process group")
    if wanted() != "soap" or group.size() == 1 or "cpu:gloo" not in dist.get_backend_config(group).split(","):
        return group
    if group.group_name not in _beside or _beside[group.group_name] not in dist.distributed_c10d._world.pg_map:
        timeout = group._get_backend(torch.device("cpu")).options._timeout
        world = dist.distributed_c10d._world
        counts: list[Any] = [None] * group.size()
        dist.all_gather_object(counts, world.group_count, group=group)
        world.group_count = max(counts)  # names of groups go by it, and ranks that have made groups of their own count otherwise
        made: Any = dist.new_group(backend="soap", timeout=timeout, group_desc="soap")
        _beside[group.group_name] = made
    return _beside[group.group_name]


def leave() -> None:
    """At exit: no group is held any more."""
    _beside.clear()
