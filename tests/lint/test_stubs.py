"""torch_soap/_C.pyi names what the compiled library has, no more and no less."""

from __future__ import annotations

import ast
from pathlib import Path

import torch_soap
from torch_soap import _C

STUB = Path(torch_soap.__file__).parent / "_C.pyi"
REMEDY = "run tools/stubs.py and commit torch_soap/_C.pyi"


def compiled_names(namespace: object) -> set[str]:
    return {n for n in vars(namespace) if not n.startswith("_")}


def stub_names(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {n for n in names if not n.startswith("_")}


def stale(stub: str, module: object) -> list[str]:
    """Names that only one side has: "Class.name (stub only)"."""
    tree = ast.parse(stub)
    found = [(n, "compiled only") for n in compiled_names(module) - stub_names(tree.body)]
    found += [(n, "stub only") for n in stub_names(tree.body) - compiled_names(module)]
    for node in tree.body:
        cls = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if cls is None or not isinstance(node, ast.ClassDef):
            continue
        ours, theirs = stub_names(node.body), compiled_names(cls)
        found += [(f"{node.name}.{n}", "compiled only") for n in theirs - ours] + [(f"{node.name}.{n}", "stub only") for n in ours - theirs]
    return sorted(f"{name} ({side})" for name, side in found)


def test_fresh() -> None:
    found = stale(STUB.read_text(), _C)
    assert not found, f"{', '.join(found)}: {REMEDY}"


def test_planted() -> None:
    class Movement:
        ranks = 1

    class Module:
        pass

    Module.Movement = Movement  # type: ignore[attr-defined]
    Module.lower = print  # type: ignore[attr-defined]
    stub = "class Movement:\n    elements: int\ndef project() -> None: ...\n"
    assert stale(stub, Module) == ["Movement.elements (stub only)", "Movement.ranks (compiled only)", "lower (compiled only)", "project (stub only)"]
