"""`pip install --no-build-isolation .` into an environment that has torch >= 2.13, pybind11, cmake and ninja."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "tools"))


class BuildWithExtension(build_py):
    """The package's Python files, and the C++ libraries built beside them."""

    def run(self) -> None:
        from build import build

        super().run()
        build(Path("build").resolve(), (Path(self.build_lib) / "torch_soap").resolve())  # make's own folder: nothing is compiled twice


setup(cmdclass={"build_py": BuildWithExtension}, has_ext_modules=lambda: True)
