"""On each rank, with a process group that the user made (gloo): what carries our tensors, and small all-reduces. Argument: the transport expected."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from tests.dist.launch import report
from torch_soap import cache
from torch_soap.runtime import comm as comms
from torch_soap.runtime.comm import TorchComm, transport


def added_up(dtype: torch.dtype, maximum: bool, small: int) -> list[float]:
    """Of tensors whose sum depends on the order; `small`: bytes up to which ranks send all to all. Bits as numbers."""
    comm = TorchComm()
    ranks = list(range(comm.world_size))
    comms.SMALL, kept = small, comms.SMALL
    generator = torch.Generator().manual_seed(comm.rank)
    mine = (torch.randn(33, generator=generator) * 10.0 ** torch.randint(-3, 4, (33,), generator=generator)).to(dtype).reshape(3, 11)
    out = comm.all_reduce(mine.clone(), ranks, maximum)
    comms.SMALL = kept
    everyone: list[torch.Tensor] = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(everyone, mine)
    wanted = everyone[0]
    for other in everyone[1:]:
        wanted = torch.maximum(wanted, other) if maximum else wanted + other
    close = torch.equal(out, wanted) if small or maximum else torch.allclose(out, wanted, rtol=1e-5, atol=1e-5)
    if out.shape != mine.shape or not close:
        raise AssertionError(f"{dtype}, maximum {maximum}, small {small}: {out} is not {wanted}")
    return [float(x) for x in out.double().flatten()]


def main(expected: str) -> None:
    dist.init_process_group("gloo")
    first, second = TorchComm(), TorchComm()
    if transport() != expected or first.world is not second.world or (first.world is dist.group.WORLD) != (expected == "gloo"):
        raise AssertionError(f"{transport()}, not {expected}")
    first.join([(0, 2)])
    if first.rank != 1 and transport(first.group((0, 2))) != expected:
        raise AssertionError("a group of some ranks goes another way")
    sums = [added_up(dtype, maximum, small) for dtype in (torch.float32, torch.float64) for maximum in (False, True) for small in (0, 1 << 20)]
    report({"sums": sums, "cache": cache.file_of(3).name, "alone": cache.file_of(1).name})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
