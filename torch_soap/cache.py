"""What is known of this machine, kept between runs: figures of each kind of moment (docs/decisions/0022), and how good they are (torch_soap/measuring.py)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch_soap.measuring import NEAR, PACE, apart, forget_doubtful, load_per_core
from torch_soap.operator_times import Ranks, doubt
from torch_soap.runtime.comm import Comm, transport

FORMAT = 20  # of the cache
LOOKS = 2  # at what is in the cache, each in another run: figures that none of them found too large are no longer doubted


def file_of(num_ranks: int, host_of: Sequence[int] = ()) -> Path:
    """One file per (kind of host, torch, threads, what carries tensors, ranks on each host)."""
    root = Path(os.environ.get("TORCH_SOAP_CACHE", Path.home() / ".cache" / "torch_soap"))
    key = f"{FORMAT}|{platform.processor()}|{platform.machine()}|{os.cpu_count()}|{torch.__version__}|{torch.get_num_threads()}|{num_ranks}"
    if num_ranks > 1:
        key += f"|{transport()}"
    if len(set(host_of)) > 1:
        key += f"|{list(host_of)}"
    return root / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def nothing_known(cores_ns: int = 0) -> dict[str, Any]:
    """`cores_ns`: how far apart the cores are; 0: not asked yet."""
    return {"cores_ns": cores_ns, "operators": {}, "doubted": [], "looks": 0, "tables": {}, "marks": {}, "load": round(load_per_core(), 2)}


def load(num_ranks: int, comm: Comm | None = None, host_of: Sequence[int] = (), cores_ns: int = 0) -> dict[str, Any]:
    """What rank 0's host knows of moments like this one, or of those of `cores_ns`, and doesn't doubt, on all ranks, so that all measure the same things in the
    same order. Collective when `comm` is given."""
    distance_ns = cores_ns if cores_ns or comm is None else Ranks(comm).core_distance_ns()
    known = nothing_known(distance_ns)
    if comm is None or comm.rank == 0:
        like = [(apart(m["cores_ns"], distance_ns), i, m) for i, m in enumerate(moments(file_of(num_ranks, host_of)))]
        if like and min(like)[0] <= NEAR:
            known = min(like)[2]
            forget_doubtful(known, load_per_core())
    if comm is not None:
        known = dict(comm.gather_objects(known if comm.rank == 0 else None)[0])
    if known.setdefault("looks", 0) < LOOKS:
        doubt(known)
    if "pace_ns" in known and (comm is None or not host_of or host_of[comm.rank] == host_of[0]):
        PACE.fastest_ns = min(PACE.fastest_ns or known["pace_ns"], known["pace_ns"])
    return known


def moments(path: Path) -> list[dict[str, Any]]:
    """What a cache knows, by how far apart the cores were."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text())["moments"])
    except json.JSONDecodeError:  # cut short by a killed run: measure again
        path.unlink()
        return []


def save(num_ranks: int, data: dict[str, Any], host_of: Sequence[int] = ()) -> None:
    path = file_of(num_ranks, host_of)
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [moment for moment in moments(path) if apart(moment["cores_ns"], data["cores_ns"]) > NEAR]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"moments": [*others, data | {"doubted": [], "pace_ns": PACE.fastest_ns}]}))
    temporary.replace(path)
