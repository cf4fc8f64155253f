"""One rank of three, of which the last doesn't come, leaves, and dies: `python -m tests.dist.worker_backend_failures RANK STORE_FILE`."""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import torch_soap  # noqa: F401  (registers the backend)
from torch_soap import _backend

SIZE = 3
LAST = SIZE - 1


def seconds(count: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=count)


def failure(call: Callable[[], Any]) -> tuple[str, float]:
    """The error's text and the seconds until it came."""
    begin = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return "no error", time.monotonic() - begin


def main() -> None:
    rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], SIZE)
    dist.init_process_group("soap", store=store, rank=rank, world_size=SIZE, timeout=seconds(40))
    seen: dict[str, tuple[str, float]] = {}

    late, left, dead = dist.new_group(timeout=seconds(0.6)), dist.new_group(), dist.new_group()
    if rank != LAST:
        seen["absent"] = failure(lambda: dist.all_reduce(torch.ones(4), group=late))
        seen["broken"] = failure(lambda: dist.all_reduce(torch.ones(4), group=late))
        seen["never met"] = failure(lambda: _backend.SoapBackend(dist.PrefixStore("never", store), rank, SIZE, seconds(0.6)))
    dist.barrier()
    if rank == LAST:
        dist.destroy_process_group(left)
    else:
        seen["left"] = failure(lambda: dist.all_reduce(torch.ones(4), group=left))
    dist.barrier()
    large = torch.ones(1_000_000)
    if rank == LAST:
        dist.all_reduce(torch.ones(4))
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))
    seen["dead"] = failure(lambda: dist.all_reduce(large))
    seen["dead, receiving"] = failure(lambda: dist.recv(torch.ones(4), LAST, group=dead))
    seen["dead, sending"] = failure(lambda: dist.send(large, LAST, group=dead))
    print(json.dumps(seen), flush=True)
    # Ends without leaving, with works pending.
    dist.irecv(torch.ones(4), 1 - rank, group=dead)


if __name__ == "__main__":
    main()
