"""For the checks of the backend soap: what ranks bring, what must come out, and which ranks are on one host."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

Op = dist.ReduceOp


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def values(of: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What rank `of` brings: every rank can compute it. Small, so that products and 16-bit sums are exact where they must be."""
    generator = torch.Generator().manual_seed(1000 * of + count)
    drawn = torch.randint(0, 3, (count,), generator=generator)
    return (drawn > 0) if dtype == torch.bool else drawn.to(dtype)


def everyone(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [values(r, count, dtype) for r in range(size())]


def expect(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    if got.dtype != wanted.dtype or got.shape != wanted.shape or not torch.equal(got, wanted):
        raise AssertionError(f"{what}: {got.dtype} {tuple(got.shape)} {got.flatten()[:5].tolist()} instead of {wanted.flatten()[:5].tolist()}")


def folded(op: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    out = parts[0].clone()
    for part in parts[1:]:
        if op == Op.SUM:
            out = out | part if out.dtype == torch.bool else out + part
        elif op == Op.PRODUCT:
            out = out & part if out.dtype == torch.bool else out * part
        elif op in (Op.MIN, Op.MAX):
            out = (torch.minimum if op == Op.MIN else torch.maximum)(out, part)
        else:
            out = {Op.BAND: torch.bitwise_and, Op.BOR: torch.bitwise_or, Op.BXOR: torch.bitwise_xor}[op](out, part)
    return out


def added(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """One after another, in float32, rounded once."""
    total, dtype = None, torch.float32
    for part in parts:
        total, dtype = part.float() if total is None else total + part.float(), part.dtype
    assert total is not None
    return total.to(dtype)


def host_ranks() -> list[list[int]]:
    """Ranks of each host, as SOAP_TEST_HOSTS says: "2,1" is ranks 0 and 1 on one, 2 on another. Without it there is one."""
    counts = [int(c) for c in os.environ.get("SOAP_TEST_HOSTS", os.environ["WORLD_SIZE"]).split(",")]
    return [list(range(sum(counts[:i]), sum(counts[: i + 1]))) for i in range(len(counts))]


def everything(mine: str) -> list[str]:
    out: list[Any] = [None] * size()
    dist.all_gather_object(out, mine)
    return out
