"""`pip install --no-build-isolation .` into an environment that has torch >= 2.13, pybind11, cmake and ninja."""

import os
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
        # make's own folder, so that nothing is compiled twice.
        build(Path(os.environ.get("SOAP_BUILD_DIR", "build")).resolve(), (Path(self.build_lib) / "torch_soap").resolve())


setup(cmdclass={"build_py": BuildWithExtension}, has_ext_modules=lambda: True)
