"""The c10d backend soap among ranks on several hosts, told apart by TORCH_SOAP_HOST: the checks of one host, and errors that name the rank."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launch import ROOT, Outcome, environment, torchrun
from tests.dist.worker_backend import CHECKS

# Ranks of each host -> what is checked. Three hosts share sums out among each other, two don't. Two hosts with one rank or two each are network namespaces
# (test_two_hosts.py, test_backend.py), and tests/cpp/spanning_test.cpp has all kinds of layouts.
LAYOUTS = {"2,1": (*CHECKS, "sender_goes_on"), "1,1,1": ("sums_in_rank_order", "movements")}


@functools.cache
def outcome(layout: str) -> Outcome:
    counts = [int(c) for c in layout.split(",")]
    return torchrun(sum(counts), "tests.dist.worker_backend", *LAYOUTS[layout], timeout_s=120, env={"SOAP_TEST_HOSTS": layout})


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, names in LAYOUTS.items() for name in names])
def test_results(layout: str, name: str) -> None:
    done = outcome(layout)
    for rank, results in enumerate(done.results):
        assert results is not None and name in results, f"rank {rank} did not come to {name}\n{done.output}"
        assert not results[name], f"rank {rank}: {results[name]}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ends_in_peace(layout: str) -> None:
    assert outcome(layout).returncode == 0, outcome(layout).output


def test_failures_name_the_rank(tmp_path: Path) -> None:
    """Of two hosts with two ranks each, of which the last doesn't come, leaves, and is killed. Who waits for its neighbour is told of that one."""
    command = [sys.executable, "-m", "tests.dist.worker_hosts_failures"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment(TORCH_SOAP_HOST=f"host{rank // 2}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    outputs = []
    try:
        outputs = [p.communicate(timeout=60) for p in running[:3]]
    finally:
        for p in running:
            p.kill()
        running[3].communicate()
    other_host = {"absent": "on another host, did not come", "left": "on another host, has ended", "dead": "on another host, has ended"}
    same_host = {"absent": "rank 3 did not come", "left": "rank 3 has left", "dead": "rank 3 has ended (process"}
    for rank, (out, err) in enumerate(outputs):
        assert running[rank].returncode == 0, err
        seen = json.loads(out.splitlines()[-1])
        for name, within_s in (("absent", 2.5), ("left", 2.0), ("dead", 3.0)):
            text, took_s = seen[name]
            # Rank 1 waits for rank 3, rank 0 for rank 2, which waits for rank 3. Who is second to see it may be told by the other rank of its host.
            told = {0: ("rank 2, " + other_host[name], "rank 1 has failed, because of rank 3"), 1: ("rank 3, " + other_host[name], "rank 0 has failed"), 2: (same_host[name],)}
            assert any(part in text for part in told[rank]), f"rank {rank}, {name}: {text}"
            assert took_s < within_s, f"rank {rank}, {name}: {took_s:.1f} s"
        assert "the group has ended" in seen["broken"][0] and seen["broken"][1] < 0.5, seen["broken"]
        text, took_s = seen["aborted"]  # by itself, or by another just before
        assert ("aborted" in text or "on another host, has ended" in text or "has failed" in text) and took_s < 2.0, seen["aborted"]
