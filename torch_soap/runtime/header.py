"""The agreement of ranks before each forward: mode, shapes, rows. A disagreement or a missing rank is an error on all ranks that
names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from torch_soap.runtime.comm import Comm, RankMismatchError

KNOWN_NUMBERS = 64
MAX_SIZES = 100  # of inputs, in the header; more of them are told apart from it


def agree(comm: Comm, what: str, mine: Any, message: str) -> None:
    """Raises on every rank, naming the first that differs from rank 0, unless all have the same value. Collective."""
    values = comm.gather_objects(mine)
    for rank, value in enumerate(values):
        if value != values[0]:
            raise RankMismatchError(f"[{what}] {message}: rank {rank} has {value!r}, rank 0 has {values[0]!r}")


def number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


class Header:
    """What every rank says before a forward: a few integers; in words only when they differ."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.reseeded = False  # on any rank, as of the last check
        self.numbers: dict[Any, int] = {}  # of what was said lately

    def check(
        self,
        training: bool,
        grad: bool,
        tensors: Sequence[torch.Tensor],
        structure: Any,
        attributes: int,
        *,
        model: str,
        deferred: bool = False,
        replaced: int = 0,
        reseeded: bool = False,
    ) -> None:
        """All ranks call the module in the same mode, with the same number, dtypes and ranks of inputs, in the same structure with the same constants.

        attributes: a number that stands for the modes and plain attributes of all submodules.
        model: which of those that this process parallelized.
        deferred: inside no_sync.
        replaced: how often parameters were replaced by other objects.
        reseeded: torch was seeded anew here; ranks may differ in it.
        """
        inputs = tuple([(t.dtype, t.dim()) for t in tensors])
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        said = model, training, grad, deferred, replaced, autocast, inputs, structure, attributes

        def words() -> dict[str, Any]:
            return {
                "model": model,
                "mode": "train" if training else "eval",
                "grad": grad,
                "no_sync": deferred,
                "replaced parameters": replaced,
                "autocast": (autocast[0], str(autocast[1])),
                "inputs": [(str(dtype), dim) for dtype, dim in inputs],
                "arguments": structure,
                "attributes": attributes,
            }

        if said not in self.numbers:
            if len(self.numbers) >= KNOWN_NUMBERS:
                self.numbers.clear()
            self.numbers[said] = number(repr(words()))
        sizes = [n for t in tensors for n in t.shape]
        short = len(sizes) <= MAX_SIZES
        mine = [self.numbers[said], len(sizes), *(sizes if short else [])]
        everyones = self.comm.gather_ints([int(reseeded), *mine], "forward")
        self.reseeded = any(g[0] for g in everyones)
        self.gathered = [g[1:] for g in everyones]
        if any(g[:2] != mine[:2] for g in self.gathered):
            everyone = self.comm.gather_objects(words())
            for rank, other in enumerate(everyone):
                for key, value in other.items():
                    if value != everyone[0][key]:
                        if key == "attributes":
                            raise RankMismatchError(
                                f"[forward] on rank {rank} a submodule's mode or attribute, or a parameter's dtype or requires_grad, isn't rank 0's"
                            )
                        hint = " A forward on some ranks only, or in another mode, must be called on all ranks." if key in ("mode", "grad") else ""
                        raise RankMismatchError(f"[forward] ranks disagree on {key}: rank {rank} has {value}, rank 0 has {everyone[0][key]}.{hint}")
            raise RankMismatchError("[forward] ranks disagree on their inputs")
        if not short:
            self.gathered = [[*mine, *other] for other in self.comm.gather_objects(sizes)]

    def model(self, label: str) -> int:
        """A number that stands for a label."""
        return self.numbers[label] if label in self.numbers else self.numbers.setdefault(label, number(label))

    def explain_failure(self, tensors: Sequence[torch.Tensor], error: Exception | None) -> None:
        """After a capture failed on a rank: raises when the ranks' inputs differ in more than their rows, which then is the reason."""
        shapes = self._shapes(tensors)
        for i in range(len(tensors)):
            for rank, other in enumerate(shapes):
                if other[i][1:] != shapes[0][i][1:]:
                    raise RankMismatchError(f"[forward] input {i}: rank {rank} has shape {list(other[i])}, rank 0 {list(shapes[0][i])}") from error

    def _shapes(self, tensors: Sequence[torch.Tensor]) -> list[list[tuple[int, ...]]]:
        """Of each rank, of each input, as gathered by `check`."""
        per_rank = []
        for g in self.gathered:
            sizes, shapes = g[2:], []
            for t in tensors:
                shapes.append(tuple(sizes[: t.dim()]))
                sizes = sizes[t.dim() :]
            per_rank.append(shapes)
        return per_rank

    def rows(self, tensors: Sequence[torch.Tensor], dims: Sequence[int | None]) -> tuple[list[int], tuple[tuple[tuple[int, ...], torch.dtype], ...]]:
        """Rows that each process feeds, and the global signature. Call after `check`."""
        per_rank = self._shapes(tensors)
        signature = []
        rows: list[int] | None = None
        for i, (t, dim) in enumerate(zip(tensors, dims, strict=True)):
            shapes = [s[i] for s in per_rank]
            for rank, shape in enumerate(shapes):
                if [n for d, n in enumerate(shape) if d != dim] != [n for d, n in enumerate(shapes[0]) if d != dim]:
                    raise RankMismatchError(f"[forward] input {i}: rank {rank} has shape {list(shape)}, rank 0 {list(shapes[0])}; only dim {dim} may differ")
            total = list(shapes[0])
            if dim is not None:
                mine = [shape[dim] for shape in shapes]
                total[dim] = sum(mine)
                if rows is None:
                    rows = mine
                elif [a * sum(rows) for a in mine] != [b * sum(mine) for b in rows]:
                    raise RankMismatchError(f"[forward] input {i} has {mine} rows on the ranks, another input {rows}: they must be in proportion")
            signature.append((tuple(total), t.dtype))
        return rows if rows is not None else [1] * self.comm.world_size, tuple(signature)
