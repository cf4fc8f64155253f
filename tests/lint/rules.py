"""The lints: each takes the root of a tree and gives what is wrong, one line each: `file:line: what, and what to do instead`."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

# csrc: what a folder may include besides itself (docs/concept.md has the picture).
PLANNING = ["base", "graph", "sharding", "substitution", "reshard", "program"]
LAYERS: dict[str, set[str]] = {layer: set(PLANNING[:i]) for i, layer in enumerate(PLANNING)}
LAYERS["machine"] = {"base"}
LAYERS["cost"] = {*PLANNING, "machine"}
LAYERS["sim"] = LAYERS["cost"] | {"cost"}
LAYERS["search"] = LAYERS["sim"] | {"sim"}
LAYERS["plan"] = LAYERS["report"] = LAYERS["search"] | {"search", "plan"}
LAYERS["kernels"] = {"base"}
LAYERS["runtime"] = {"base", "kernels", "program"}
LAYERS["transport"] = {"base"}
LAYERS["backend"] = {"base", "transport"}
LAYERS["movement"] = {"base", "kernels", "transport", "backend"}
LAYERS["engine"] = {"base", "movement"}
LAYERS["bindings_torch"] = {"backend", "movement", "engine", "transport"}
LAYERS["testing"] = LAYERS["plan"] | {"report"}
LAYERS["bindings"] = LAYERS["testing"] | {"testing"}
WITH_TORCH = {"runtime", "backend", "movement", "engine", "bindings_torch"}  # may include LibTorch
WITH_PYTHON = {"bindings", "bindings_torch"}
TORCH_HEADERS = {"torch", "ATen", "c10"}

# torch_soap: what a package or module may not import.
FORBIDDEN = {
    "capture": {"rewrite", "runtime"},
    "rewrite": {"runtime"},
}
API_USERS = {"__init__", "cli", "__main__", "api"}

NO_TORCH = "the planning library and the kernels know no torch: pass raw pointers and sizes, dispatch in csrc/runtime"
NO_PLAN = "capture knows no plan and rewrite no process: pass what it needs as an argument"

LONG, TOO_LONG = 500, 800
# Files over LONG lines, with the reason why they are one piece.
LONG_FILES = {
    "tests/unit/test_capture.py": "one test for each trap of capture; splitting it would only spread the list",
    "tests/property/cases.py": "the table of modules that the property test draws from",
    "torch_soap/_C.pyi": "made by tools/stubs.py",
}
SOURCES = {".h", ".cpp", ".cu", ".cuh", ".py", ".pyi"}
TEXT = SOURCES | {".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".soap", ".sh", ""}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(work|root|opt|home|mnt|srv|Users)/")


def tracked(root: Path) -> list[Path]:
    """Files of the tree, relative: what git knows or would add; all of them where there is no repository."""
    if (root / ".git").exists():
        out = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True)
        return [Path(p) for p in sorted(out.stdout.splitlines()) if (root / p).is_file()]
    return sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())


def lines_of(root: Path, suffixes: set[str], under: str = "") -> Iterator[tuple[Path, int, str]]:
    for path in tracked(root):
        if path.suffix in suffixes and str(path).startswith(under):
            for number, line in enumerate((root / path).read_text(errors="replace").splitlines(), 1):
                yield path, number, line


def include_direction(root: Path) -> list[str]:
    """Includes of csrc go one way, torch stays below and pybind11 at the edge."""
    found = []
    folders = {p.parts[1] for p in tracked(root) if p.parts[0] == "csrc" and len(p.parts) > 2}
    for folder in sorted(folders - set(LAYERS)):
        found.append(f"csrc/{folder}: a folder that no layer is given for; add it to LAYERS in tests/lint/rules.py, below those that will include it")
    for path, number, line in lines_of(root, {".h", ".cpp", ".cu", ".cuh"}, "csrc/"):
        match = INCLUDE.match(line)
        if match is None or len(path.parts) < 3:
            continue
        layer, target = path.parts[1], match[2].split("/")[0]
        if target in LAYERS and match[1] == '"' and target != layer and target not in LAYERS.get(layer, set()):
            allowed = ", ".join(sorted(LAYERS.get(layer, set()))) or "nothing"
            found.append(f"{path}:{number}: {layer} may not include {target}; it may include {allowed}. Move what both need down, or what needs both up")
        if target in TORCH_HEADERS and layer not in WITH_TORCH:
            found.append(f"{path}:{number}: {layer} may not include {match[2]}; {NO_TORCH}")
        if target == "pybind11" and layer not in WITH_PYTHON:
            found.append(f"{path}:{number}: only csrc/bindings includes pybind11; write a free function here and bind it there")
    return found


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def python_layers(root: Path) -> list[str]:
    """capture <- rewrite <- runtime, and the API on top."""
    found = []
    for path in tracked(root):
        if path.suffix != ".py" or path.parts[0] != "torch_soap":
            continue
        layer = path.parts[1].removesuffix(".py")
        names = [(number, name.split(".")) for number, name in imports_of(root / path)]
        for number, imported in dict.fromkeys((n, parts[1]) for n, parts in names if parts[0] == "torch_soap" and len(parts) > 1):
            if imported in FORBIDDEN.get(layer, set()):
                found.append(f"{path}:{number}: {layer} may not import {imported}; {NO_PLAN}")
            if imported == "api" and layer not in API_USERS:
                found.append(f"{path}:{number}: only __init__ and cli import api; move what {layer} needs out of it")
    return found


def file_sizes(root: Path) -> list[str]:
    """Files aim at 100-300 lines."""
    found = []
    for path in tracked(root):
        if path.suffix not in SOURCES:
            continue
        length = len((root / path).read_text(errors="replace").splitlines())
        if length > TOO_LONG and path.suffix != ".pyi":
            found.append(f"{path}:1: {length} lines, more than {TOO_LONG}; split it by what changes together")
        elif length > LONG and str(path) not in LONG_FILES:
            found.append(f"{path}:1: {length} lines, more than {LONG}; split it, or add it with a reason to LONG_FILES in tests/lint/rules.py")
    return found


def stale_exceptions(root: Path) -> list[str]:
    """An entry of LONG_FILES that is no longer needed."""
    found = []
    for name in LONG_FILES:
        if not (root / name).exists() or len((root / name).read_text().splitlines()) <= LONG:
            found.append(f"tests/lint/rules.py: {name} is not longer than {LONG} lines (or gone); take it out of LONG_FILES")
    return found


def swallowed_errors(root: Path) -> list[str]:
    """No `except: pass`."""
    found = []
    for path in tracked(root):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((root / path).read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                found.append(f"{path}:{node.lineno}: a bare except also takes KeyboardInterrupt; name the exception")
            if all(isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in node.body):
                found.append(f"{path}:{node.lineno}: an exception is swallowed; handle it, let it pass, or suppress it by name with the reason beside it")
    return found


def unfinished(root: Path) -> list[str]:
    """No notes to oneself in the sources."""
    return [
        f"{path}:{number}: {match[1]} is a note to oneself; do it, or write what doesn't work in README"
        for path, number, line in lines_of(root, SOURCES)
        if path.parts[:2] != ("tests", "lint") and (match := UNFINISHED.search(line))
    ]


def dead_links(root: Path) -> list[str]:
    """Relative links of the documents lead somewhere."""
    return [
        f"{path}:{number}: nothing is at {target}; write it, or take the link out"
        for path, number, line in lines_of(root, {".md"})
        for target in LINK.findall(line)
        if "://" not in target and not (root / path.parent / target).exists()
    ]


def machine_paths(root: Path) -> list[str]:
    """No path of one machine."""
    return [
        f"{path}:{number}: {match[0]}... is a path of one machine; make it relative to the file, or an argument"
        for path, number, line in lines_of(root, TEXT)
        if path.parts[:2] != ("tests", "lint") and (match := MACHINE_PATH.search(line))
    ]
