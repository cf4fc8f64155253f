"""Two hosts: torchrun --nnodes=2, each node in a network namespace of its own, joined by a veth pair. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.launch import ROOT, environment, read_results

ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of the two namespaces; removed afterwards, and their interfaces with them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are two network namespaces: needs root and ip (iproute2)")
    tag = uuid.uuid4().hex[:6]
    names = [f"soap-{tag}-{i}" for i in range(2)]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", f"v{tag}0", "netns", names[0], "type", "veth", "peer", "name", f"v{tag}1", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces aren't allowed here: {error.stderr.strip()}")
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"v{tag}{i}")
            ip("-n", name, "link", "set", f"v{tag}{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [f"{name} v{tag}{i}" for i, name in enumerate(names)]
    finally:
        for name in made:
            ip("netns", "del", name)


def test_two_hosts(hosts: list[str], tmp_path: Path) -> None:
    running = []
    for i, host in enumerate(hosts):
        name, interface = host.split()
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1"]
        command += [f"--master-addr={ADDRESSES[0]}", "--master-port=29517", f"--local-addr={ADDRESSES[i]}", "-m", "tests.dist.worker_two_hosts"]
        env = environment(SOAP_TEST_OUT=str(tmp_path), SOAP_TEST_HOST=name, GLOO_SOCKET_IFNAME=interface)
        running.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [p.communicate(timeout=240)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    results = read_results(str(tmp_path), 2)
    assert all(p.returncode == 0 for p in running), "\n".join(o[-4000:] for o in outputs)
    assert len({r["unet"]["host"] for r in results}) == 2
    for rank, result in enumerate(results):
        for model, seen in result.items():
            assert seen["error"] <= 1e-10, f"{model} on rank {rank}: {seen['where']} differs by {seen['error']:.2e}"
