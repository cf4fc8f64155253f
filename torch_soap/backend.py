"""The c10d backend `soap`: `import torch_soap` registers it, `init_process_group("cpu:soap,cuda:nccl")` or `("soap")` uses it (docs/backend.md)."""

from __future__ import annotations

import atexit
import os
import warnings
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from torch_soap import _backend


def create(options: Any, backend_options: Any = None) -> _backend.SoapBackend:
    """For c10d: the backend of one group. Collective over its ranks."""
    store, rank, size, timeout = options.store, options.group_rank, options.group_size, options.timeout
    if backend_options is not None and backend_options._timeout is not None:
        timeout = backend_options._timeout
    if not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)
    backend = _backend.SoapBackend(dist.PrefixStore("soap", store), rank, size, timeout, os.environ.get("TORCH_SOAP_HOST", ""))
    if not backend.shares_memory:
        if backend.one_host and rank == 0:
            warnings.warn(f"the process group uses gloo, not shared memory: {backend.why_not}", stacklevel=2)
        backend.set_fallback(dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout))
    return backend


def register() -> None:
    """Makes the name known to c10d; once for a process."""
    if not dist.is_available() or "SOAP" in dist.Backend._plugins:
        return
    dist.Backend.register_backend("soap", create, extended_api=True, devices=["cpu"])
    atexit.register(_backend.leave_all_groups)
