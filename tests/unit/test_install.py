"""`pip install --no-build-isolation .` gives a package that works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import torch, torch_soap
from torch_soap import _C
from torch_soap.report.page import FOLDER, SCRIPTS
assert all((FOLDER / name).is_file() for name in [*SCRIPTS, "template.html", "style.css"]), list(FOLDER.iterdir())
assert "site" in torch_soap.__file__, torch_soap.__file__
report = torch_soap.verify(torch.nn.Linear(4, 4), torch.randn(4, 4), "/linear o=2", world_size=2)
assert report.ok, report
"""


def test_pip_install(tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(site), str(ROOT)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
