"""`calibrate` with two processes: movements between them are measured, one rank prints and writes, and the next plan finds the figures."""

from __future__ import annotations

import json
from pathlib import Path

import torch_soap
from tests.dist.launch import torchrun
from torch_soap.measuring import TRIES


def test_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    outcome = torchrun(2, "torch_soap", "calibrate", "--out", str(path), env={"TORCH_SOAP_CACHE": str(tmp_path / "cache")})
    assert outcome.returncode == 0, outcome.output
    assert outcome.output.count("2 devices on 1 host, measured in") == 1
    machine = torch_soap.Machine.load(path)
    assert machine.num_devices == 2 and sorted(machine.tables) == ["all_reduce/2/1", "exchange/2/1"]
    (cache,) = (tmp_path / "cache").iterdir()
    (known,) = json.loads(cache.read_text())["moments"]
    assert {k: [tuple(p) for p in v] for k, v in known["tables"].items()} == machine.tables
    assert known["rates"] == [machine.flops_per_s, machine.memory_bytes_per_s, machine.op_overhead_ns]
    for name in ("rates", "tables/all_reduce/2/1", "tables/exchange/2/1"):
        spread, load, tries = known["marks"][name]
        assert spread >= 0 and load >= 0 and 1 == tries < TRIES
