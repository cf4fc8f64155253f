"""The c10d backend soap on real processes: as gloo, and what must come out; errors that name the rank; and without shared memory."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.hosts import NoHosts, torchrun_on, two_hosts
from tests.dist.launch import ROOT, Outcome, environment, torchrun
from tests.dist.worker_backend import CHECKS

RANKS = 3  # on two cores: more ranks than cores


@functools.cache
def outcome() -> Outcome:
    return torchrun(RANKS, "tests.dist.worker_backend", timeout_s=120)


@pytest.mark.parametrize("name", CHECKS)
def test_results(name: str) -> None:
    done = outcome()
    for rank, results in enumerate(done.results):
        assert results is not None and name in results, f"rank {rank} did not come to {name}\n{done.output}"
        assert not results[name], f"rank {rank}: {results[name]}"


def test_ends_in_peace() -> None:
    assert outcome().returncode == 0, outcome().output


def test_failures_name_the_rank(tmp_path: Path) -> None:
    """Of ranks that don't come, leave, or are killed; the others' processes end well though they have works pending."""
    command = [sys.executable, "-m", "tests.dist.worker_backend_failures"]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    outputs = []
    try:
        outputs = [p.communicate(timeout=60) for p in running[:2]]
    finally:
        for p in running:
            p.kill()
        running[2].communicate()
    for rank, (out, err) in enumerate(outputs):
        assert running[rank].returncode == 0, err
        seen = json.loads(out.splitlines()[-1])
        for name, part, within_s in (
            ("absent", "the timeout of 0.6 s passed: rank 2 did not come", 2.0),
            ("broken", "the group has ended: the timeout", 0.5),
            ("never met", "of them 2 did not come within 0.6 s", 2.0),
            ("left", "rank 2 has left: it destroyed its process group", 2.0),
            ("dead", "rank 2", 4.0),
            ("dead, receiving", "rank 2 has ended", 2.0),
            ("dead, sending", "rank 2 has ended", 2.0),
        ):
            text, took_s = seen[name]
            assert part in text, f"rank {rank}, {name}: {text}"
            assert took_s < within_s, f"rank {rank}, {name}: {took_s:.1f} s"
        assert "has ended" in seen["dead"][0] or "has failed, because of rank 2" in seen["dead"][0], seen["dead"]


def test_too_little_shared_memory(tmp_path: Path) -> None:
    """Says so, and goes on with gloo."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small /dev/shm needs root")
    inner = f"mount -t tmpfs -o size=512k tmpfs /dev/shm && exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 "
    inner += "-m tests.dist.worker_backend late_rank messages"
    done = subprocess.run(["unshare", "-m", "sh", "-c", inner], cwd=ROOT, env=environment(SOAP_TEST_OUT=str(tmp_path)), capture_output=True, text=True)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"mounts aren't allowed here: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    assert "/dev/shm has 512 KiB free, a group of 2 ranks needs" in done.stderr, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"late_rank": "", "messages": ""}


def test_between_hosts() -> None:
    """Ranks of each host share memory, and those of two talk over a network."""
    checks = ("late_rank", "hosts", "asynchronous", "sums_in_rank_order", "movements")
    try:
        with two_hosts() as hosts:
            done = torchrun_on(hosts, 2, "tests.dist.worker_backend", *checks, timeout_s=120, env={"SOAP_TEST_HOSTS": "2,2"})
    except NoHosts as error:
        pytest.skip(str(error))
    assert done.returncode == 0, done.output
    assert done.results == [dict.fromkeys(checks, "")] * 4, done.results
