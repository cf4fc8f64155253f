"""Writes torch_soap/_C.pyi from the compiled planning library: mypy's stubgen, with the types that a reader expects.

    .venv/bin/python tools/stubs.py

Run it after a change in csrc/bindings; tests/lint/test_stubs.py says when that was forgotten.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = '"""The planning library. Made by tools/stubs.py; the contracts are in the headers of csrc/."""\n'

# What pybind11 writes, and what is meant.
REPLACEMENTS = [
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"collections\.abc\.", ""),
    (r"typing\.", ""),
    (r"def __init__\(self, \*args, \*\*kwargs\) -> None: \.\.\.", "def __init__(self, *args: Any, **kwargs: Any) -> None: ..."),
    (r"ClassVar\[dict\]", "ClassVar[dict[str, Any]]"),
    (r"def __eq__\(self, arg0: \w+\)", "def __eq__(self, other: object)"),
    (r"def copy\(self, \*args, \*\*kwargs\)", "def copy(self)"),  # stubgen takes it for the copy protocol
    (r"sharding\) -> None", "sharding: Sharding) -> None"),  # bound before its class
    (r" *__entries: .*\n", ""),
    (r"__members__: (.*) = \.\.\. *# read-only", r"__members__: \1"),
    (r"(?m)^import .*\n|^from .*\n", ""),
]
IMPORTS = "from collections.abc import Callable, Iterator, Mapping, Sequence, Set\nfrom typing import Any, ClassVar, overload\n\n"


def generate() -> str:
    """The stub's text."""
    with tempfile.TemporaryDirectory() as folder:
        stubgen = Path(sys.executable).with_name("stubgen")
        subprocess.run([str(stubgen), "-q", "-m", "torch_soap._C", "-o", folder], cwd=ROOT, check=True)
        text = (Path(folder) / "torch_soap" / "_C.pyi").read_text()
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    return HEADER + IMPORTS + text.strip() + "\n"


def main() -> None:
    target = ROOT / "torch_soap" / "_C.pyi"
    target.write_text(generate())
    ruff = str(Path(sys.executable).with_name("ruff"))
    subprocess.run([ruff, "check", "--quiet", "--fix-only", str(target)], cwd=ROOT, check=True)
    subprocess.run([ruff, "format", "--quiet", str(target)], cwd=ROOT, check=True)
    print(f"wrote {target.relative_to(ROOT)}, {len(target.read_text().splitlines())} lines")


if __name__ == "__main__":
    main()
