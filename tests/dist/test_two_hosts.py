"""Two hosts: torchrun --nnodes=2, each node in a network namespace of its own, joined by a veth pair. Needs root."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.hosts import Host, NoHosts, torchrun_on, two_hosts


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    try:
        with two_hosts() as made:
            yield made
    except NoHosts as error:
        pytest.skip(str(error))


def test_two_hosts(hosts: list[Host]) -> None:
    done = torchrun_on(hosts, 1, "tests.dist.worker_two_hosts", timeout_s=240)
    assert done.returncode == 0, done.output
    assert len({r["unet"]["host"] for r in done.results}) == 2
    for rank, result in enumerate(done.results):
        for model, seen in result.items():
            assert seen["error"] <= 1e-10, f"{model} on rank {rank}: {seen['where']} differs by {seen['error']:.2e}"
