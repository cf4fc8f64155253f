"""One rank of four on two hosts, of which the last doesn't come, leaves, and dies: `python -m tests.dist.worker_hosts_failures RANK STORE_FILE`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

import torch_soap  # noqa: F401  (registers the backend)
from tests.dist.worker_backend_failures import failure, seconds

SIZE = 4
LAST = SIZE - 1


def main() -> None:
    rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], SIZE)
    dist.init_process_group("soap", store=store, rank=rank, world_size=SIZE, timeout=seconds(40))
    seen: dict[str, tuple[str, float]] = {}
    late, left, aborted, pending = dist.new_group(timeout=seconds(0.6)), dist.new_group(), dist.new_group(), dist.new_group()
    if rank != LAST:
        seen["absent"] = failure(lambda: dist.all_reduce(torch.ones(4), group=late))
        seen["broken"] = failure(lambda: dist.all_reduce(torch.ones(4), group=late))
    dist.barrier()
    if rank == LAST:
        dist.destroy_process_group(left)
    else:
        seen["left"] = failure(lambda: dist.all_reduce(torch.ones(4), group=left))
    dist.barrier()
    if rank != LAST:  # one that waits is told by another thread
        threading.Timer(0.3, aborted._get_backend(torch.device("cpu")).abort).start()
        seen["aborted"] = failure(lambda: dist.all_reduce(torch.ones(4), group=aborted))
    dist.barrier()
    large = torch.ones(1_000_000)
    dist.all_reduce(torch.ones(4))
    if rank == LAST:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    seen["dead"] = failure(lambda: dist.all_reduce(large))
    print(json.dumps(seen), flush=True)
    # Ends without leaving, with works pending.
    dist.all_reduce(large, group=pending, async_op=True)


if __name__ == "__main__":
    main()
