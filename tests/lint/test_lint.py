"""Every lint holds in this repository, and catches a violation planted in a tree of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import rules

ROOT = Path(__file__).resolve().parents[2]
Lint = Callable[[Path], list[str]]
LINTS: list[Lint] = [
    rules.include_direction,
    rules.python_layers,
    rules.file_sizes,
    rules.stale_exceptions,
    rules.swallowed_errors,
    rules.unfinished,
    rules.dead_links,
    rules.machine_paths,
]


@pytest.mark.parametrize("lint", LINTS, ids=lambda lint: lint.__name__)
def test_repository(lint: Lint) -> None:
    found = lint(ROOT)
    assert not found, "\n" + "\n".join(found)


# (lint, file, text, part of the message); None: nothing to say.
PLANTED: list[tuple[Lint, str, str, str | None]] = [
    (rules.include_direction, "csrc/graph/a.h", '#include "sharding/rule.h"\n', "a.h:1: graph may not include sharding; it may include base"),
    (rules.include_direction, "csrc/base/a.h", '#include "machine/machine.h"\n', "base may not include machine"),
    (rules.include_direction, "csrc/machine/a.h", '#include "graph/op_graph.h"\n', "machine may not include graph"),
    (rules.include_direction, "csrc/cost/a.h", '#include "sim/simulate.h"\n', "cost may not include sim"),
    (rules.include_direction, "csrc/program/a.h", '#include "cost/cost.h"\n', "program may not include cost"),
    (rules.include_direction, "csrc/search/a.h", '#include "bindings/bindings.h"\n', "search may not include bindings"),
    (rules.include_direction, "csrc/sharding/rules/a.cpp", "\n#include <torch/all.h>\n", "a.cpp:2: sharding may not include torch/all.h"),
    (rules.include_direction, "csrc/kernels/cpu/a.cpp", "#include <ATen/ATen.h>\n", "kernels may not include ATen"),
    (rules.include_direction, "csrc/sim/a.cpp", "#include <pybind11/stl.h>\n", "only csrc/bindings includes pybind11"),
    (rules.include_direction, "csrc/utils/a.h", "int a;\n", "no layer is given"),
    (rules.include_direction, "csrc/search/b.h", '#include "sim/simulate.h"\n#include "base/error.h"\n', None),
    (rules.include_direction, "csrc/runtime/b.cpp", "#include <torch/library.h>\n", None),
    (rules.python_layers, "torch_soap/capture/a.py", "from torch_soap.rewrite.local import Call\n", "capture may not import rewrite"),
    (rules.python_layers, "torch_soap/capture/a.py", "def f():\n    import torch_soap.runtime.engine\n", "a.py:2: capture may not import runtime"),
    (rules.python_layers, "torch_soap/rewrite/a.py", "from torch_soap import runtime\n", "rewrite may not import runtime"),
    (rules.python_layers, "torch_soap/verify.py", "from torch_soap.api import plan\n", "only __init__ and cli import api"),
    (rules.python_layers, "torch_soap/cli.py", "from torch_soap.api import plan\n", None),
    (rules.file_sizes, "csrc/sim/long.cpp", "int a;\n" * 501, "501 lines, more than 500"),
    (rules.file_sizes, "torch_soap/long.py", "a = 1\n" * 801, "801 lines, more than 800"),
    (rules.file_sizes, "torch_soap/fine.py", "a = 1\n" * 500, None),
    (rules.swallowed_errors, "torch_soap/a.py", "try:\n    f()\nexcept ValueError:\n    pass\n", "a.py:3: an exception is swallowed"),
    (rules.swallowed_errors, "torch_soap/a.py", "try:\n    f()\nexcept:\n    raise\n", "a bare except"),
    (rules.swallowed_errors, "torch_soap/a.py", "try:\n    f()\nexcept ValueError:\n    g()\n", None),
    (rules.unfinished, "csrc/sim/a.cpp", "int a;  // TODO faster\n", "a.cpp:1: TODO is a note to oneself"),
    (rules.unfinished, "torch_soap/a.py", "a = 1  # FIXME\n", "FIXME"),
    (rules.dead_links, "docs/a.md", "see [this](b.md#part)\n", "a.md:1: nothing is at b.md"),
    (rules.dead_links, "docs/a.md", "[here](a.md) and [there](https://example.org/a)\n", None),
    (rules.machine_paths, "docs/a.md", "see /home/me/data\n", "a.md:1: /home/"),
    (rules.machine_paths, "torch_soap/a.py", "PATH = '/opt/tool/bin'\n", "/opt/"),
    (rules.machine_paths, "torch_soap/a.py", "URL = 'https://example.org/work/a'\nP = Path.home() / '.cache'\n", None),
]


@pytest.mark.parametrize(("lint", "name", "text", "message"), PLANTED, ids=lambda v: getattr(v, "__name__", None))
def test_planted(tmp_path: Path, lint: Lint, name: str, text: str, message: str | None) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    found = lint(tmp_path)
    if message is None:
        assert found == []
    else:
        assert len(found) == 1 and message in found[0]


def test_stale_exception(tmp_path: Path) -> None:
    assert len(rules.stale_exceptions(tmp_path)) == len(rules.LONG_FILES)
