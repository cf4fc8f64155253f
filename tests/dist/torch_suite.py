"""torch's own tests of a c10d backend (torch.testing._internal.distributed.distributed_test, in the wheel), on gloo or on soap in gloo's place.

    python -m tests.dist.torch_suite soap results.json [part of a test's name ...]

With `soap-on-hosts` instead of `soap` ranks 0 and 1 are on one host, 2 on another.

The tests ask for "gloo" and skip for other names what gloo alone has: so in the processes of a test the name gloo makes our backend. Needs `pip install
expecttest`. One JSON line for each test: its name and ok, skipped, or what failed. `docs/backend.md` has the counts.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

os.environ.setdefault("BACKEND", "gloo")
os.environ.setdefault("WORLD_SIZE", "3")
os.environ.setdefault("TEMP_DIR", tempfile.mkdtemp())

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.distributed_test import DistributedTest, TestDistBackend

import torch_soap.backend

LIMIT_S = 60


class Suite(TestDistBackend, DistributedTest._DistTestBase):
    def setUp(self) -> None:
        super().setUp()
        self._start_processes(torch.multiprocessing.get_context("fork").Process)  # their imports are made: a test takes less than a second


def as_gloo(options: Any, backend_options: Any = None) -> Any:
    made = torch_soap.backend.create(options, backend_options)
    made.set_profiler_name("gloo")
    return made


def as_gloo_on_hosts(options: Any, backend_options: Any = None) -> Any:
    ranks = options.global_ranks_in_group or range(options.group_size)
    os.environ["TORCH_SOAP_HOST"] = f"host{ranks[options.group_rank] // 2}"
    return as_gloo(options, backend_options)


class Kept(unittest.TestResult):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.begin = path, time.monotonic()

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().startTest(test)
        self.begin = time.monotonic()

    def keep(self, test: unittest.TestCase, result: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"test": test.id().rsplit(".", 1)[-1], "result": result, "seconds": round(time.monotonic() - self.begin, 1)}) + "\n")

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self.keep(test, "ok")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self.keep(test, f"skipped: {reason}")

    def addError(self, test: unittest.TestCase, err: object) -> None:  # noqa: N802
        self.keep(test, "failed: " + self._exc_info_to_string(err, test)[-1500:])  # type: ignore[attr-defined]

    addFailure = addError  # noqa: N815


def main() -> None:
    backend, path, parts = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if backend in ("soap", "soap-on-hosts"):
        dist.Backend._ensure_backend_registered("gloo")
        gloo = dist.Backend._plugins["GLOO"]
        dist.Backend._plugins["GLOO"] = gloo._replace(creator_fn=as_gloo if backend == "soap" else as_gloo_on_hosts, extended_api=True)
    torch.set_num_threads(1)
    done = {json.loads(line)["test"] for line in path.read_text().splitlines()} if path.exists() else set()
    names = [n for n in unittest.TestLoader().getTestCaseNames(Suite) if n not in done and (not parts or any(p in n for p in parts))]
    Suite.setUpClass()
    result = Kept(path)
    for name in names:
        test = Suite(name)
        test._default_timeout = LIMIT_S
        test.run(result)


if __name__ == "__main__":
    main()
