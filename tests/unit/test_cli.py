"""The command line on a small module: each command's words, and its exit status when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_soap.cli import main


def factory() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(6, 6), torch.arange(6) % 4), nn.CrossEntropyLoss()


NAME = "tests.unit.test_cli:factory"


def test_plan_is_saved_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    main(["plan", NAME, "--out", str(path), "--link-gbps", "1"])
    text = capsys.readouterr().out
    assert json.loads(path.read_text())["strategy"] == text.strip("\n").splitlines()
    main(["verify", NAME, "--plan", str(path)])
    assert capsys.readouterr().out.startswith("ok:")


def test_explain_names_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", NAME, "--plan", "0 o=2\n2 i=2\n* n=fed"])
    text = capsys.readouterr().out
    assert "o=2" in text and "i=2" in text and "predicted step" in text


def test_trace_is_chrome_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    main(["trace", NAME, "--plan", "* n=fed", "--out", str(path)])
    assert any(e["ph"] == "X" for e in json.loads(path.read_text())["traceEvents"])


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    assert "conv2d" in capsys.readouterr().out


@pytest.mark.parametrize("plan", ["9 n=2", "0 q=2", "0 o=2 @ [0,7]"])
def test_an_illegal_plan_is_an_error_in_words(plan: str) -> None:
    with pytest.raises(SystemExit, match="plan line 1"):
        main(["explain", NAME, "--plan", plan])
