"""Configures and builds the C++ part with the running Python's torch, pybind11, cmake and ninja. Used by make and by setup.py."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torch_root() -> Path:
    """Found without importing torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("building torch_soap needs torch >= 2.13 in this environment: pip install torch")
    return Path(spec.origin).parent


def tool(name: str) -> str:
    """From this environment's bin folder, else from PATH."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"building torch_soap needs {name}: pip install {name}")
    return found


def build(build_dir: Path, output: Path, tests: bool = False) -> None:
    if importlib.util.find_spec("pybind11") is None:
        raise SystemExit("building torch_soap needs pybind11: pip install pybind11")
    import pybind11

    torch = torch_root()
    build_dir.mkdir(parents=True, exist_ok=True)
    options = [
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DTORCH_INCLUDE={torch / 'include'};{torch / 'include/torch/csrc/api/include'}",
        f"-DTORCH_LIBRARY_DIRS={torch / 'lib'}",
        f"-DSOAP_OUTPUT={output}",
    ]
    if tests:
        options += ["-DSOAP_TESTS=ON", "-DSOAP_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    stamp = build_dir / "options.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(options) or not (build_dir / "build.ninja").exists():
        subprocess.run([tool("cmake"), str(ROOT), *options], cwd=build_dir, check=True, stdout=subprocess.DEVNULL)
        stamp.write_text("\n".join(options))
    subprocess.run([tool("ninja"), "--quiet", *([] if "MAX_JOBS" not in os.environ else ["-j", os.environ["MAX_JOBS"]])], cwd=build_dir, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build")
    parser.add_argument("--output", type=Path, default=ROOT / "torch_soap")
    parser.add_argument("--tests", action="store_true", help="GoogleTest of the planning library under ASan and UBSan instead of the extension")
    args = parser.parse_args()
    build(args.build_dir.resolve(), args.output.resolve(), args.tests)


if __name__ == "__main__":
    main()
