"""Two hosts on one machine: network namespaces joined by a veth pair, as fast as one asks for. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from tests.dist.launch import ROOT, Outcome, end, environment, read_results

ADDRESSES = ("10.231.77.1", "10.231.77.2")
PORT = 29517
# What the kernel hands to the link at once. A network card has no bucket: with room for 256 KiB in it, as many bytes take no time after a few milliseconds' rest.
PACKET = 16 << 10


class NoHosts(RuntimeError):
    """This machine doesn't allow namespaces; says why."""


@dataclass(frozen=True)
class Host:
    namespace: str
    interface: str
    address: str


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[list[Host]]:
    """Removed afterwards, and their interfaces with them.

    Args:
        rate: of the link in each direction, as tc writes it ("1gbit"); default: as fast as the kernel copies.

    Raises:
        NoHosts: not root, no iproute2, or namespaces aren't allowed here.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NoHosts("two hosts are two network namespaces: needs root and ip (iproute2)")
    tag = uuid.uuid4().hex[:6]
    hosts = [Host(f"soap-{tag}-{i}", f"v{tag}{i}", address) for i, address in enumerate(ADDRESSES)]
    made = []
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.namespace)
                made.append(host)
            a, b = hosts
            ip("link", "add", a.interface, "netns", a.namespace, "type", "veth", "peer", "name", b.interface, "netns", b.namespace)
            for host in hosts:
                ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
                ip("-n", host.namespace, "link", "set", host.interface, "up")
                ip("-n", host.namespace, "link", "set", "lo", "up")
                if rate is not None:
                    ip("-n", host.namespace, "link", "set", "dev", host.interface, "gso_max_size", str(PACKET))
                    limit = ["tc", "qdisc", "add", "dev", host.interface, "root", "tbf", "rate", rate, "burst", str(PACKET + 4096), "latency", "50ms"]
                    ip("netns", "exec", host.namespace, *limit)
        except subprocess.CalledProcessError as error:
            raise NoHosts(f"network namespaces aren't allowed here: {error.stderr.strip()}") from error
        yield hosts
    finally:
        for host in made:
            ip("netns", "del", host.namespace)


def torchrun_on(hosts: list[Host], per_host: int, module: str, *arguments: str, timeout_s: float = 600.0, env: dict[str, str] | None = None) -> Outcome:
    """`torchrun -m module arguments` with `per_host` processes on each host; the workers find their host in SOAP_TEST_HOST."""
    running = []
    with tempfile.TemporaryDirectory() as folder:
        for i, host in enumerate(hosts):
            command = ["ip", "netns", "exec", host.namespace, sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node-rank={i}"]
            command += [f"--nproc-per-node={per_host}", f"--master-addr={hosts[0].address}", f"--master-port={PORT}", f"--local-addr={host.address}"]
            variables = environment(SOAP_TEST_OUT=folder, SOAP_TEST_HOST=host.namespace, TORCH_SOAP_HOST=host.namespace, GLOO_SOCKET_IFNAME=host.interface, **(env or {}))
            command += ["-m", module, *arguments]
            running.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        try:
            outputs = [p.communicate(timeout=timeout_s)[0] for p in running]
        finally:
            for p in running:
                end(p)
        code = next((p.returncode for p in running if p.returncode), 0)
        return Outcome(code, "\n".join(o[-6000:] for o in outputs), read_results(folder, len(hosts) * per_host))
