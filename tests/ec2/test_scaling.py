"""Machines come and go as there is work, and none is forgotten."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ec2.cloud import REGION, Cloud
from ec2.waiting import assert_nothing_left, wait_until
from fruits_dask.cluster import ec2
from fruits_dask.cluster.ec2 import machines
from fruits_dask.config import resolve
from fruits_dask.progress import Silent

pytestmark = [pytest.mark.slow, pytest.mark.ec2]

N_TIMES = 100


@pytest.fixture
def here(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process rent from the cloud."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.endpoint_url)
    yield
    assert_nothing_left(cloud)


def rent(config: Path, workers: str) -> AbstractContextManager[ec2._Rental]:
    settings = resolve({"workers": workers}, config_file=config).settings
    return ec2._rented(settings, ec2.Account(REGION, None), "team", Silent())


def test_a_hundred_times_up_and_down(cloud: Cloud, here: None, config: Path) -> None:
    """Only the first worker starts; the others are machines that take their time."""
    cloud.wishes.never_starts = lambda guest: (
        not guest.is_scheduler and "worker-0" not in guest.command
    )
    with rent(config, "1") as rental:
        first = set(cloud.alive)
        for _ in range(N_TIMES):
            rental.machines.scale(3)
            wait_until(lambda: len(cloud.alive) == 4, what="three workers")
            rental.machines.scale(1)
            wait_until(lambda: set(cloud.alive) == first, what="one worker")
    assert cloud.count_actions()["RunInstances"] == 2 + 2 * N_TIMES


@pytest.mark.parametrize("n_processes", [1, 2])
def test_as_many_machines_as_there_is_work(
    cloud: Cloud, here: None, config: Path, monkeypatch: pytest.MonkeyPatch, n_processes: int
) -> None:
    monkeypatch.setattr(machines, "_ADAPT_INTERVAL", "200ms")
    monkeypatch.setattr(machines, "_ADAPT_COUNT", 5)
    monkeypatch.setattr(machines, "_ADAPT_TARGET", "1s")
    text = config.read_text()
    config.write_text(
        text.replace("processes_per_worker = 1", f"processes_per_worker = {n_processes}")
    )
    with rent(config, "1:3") as rental:
        assert len(cloud.alive) == 2
        futures = rental.client.map(time.sleep, [0.5] * 60, pure=False)
        wait_until(lambda: len(cloud.alive) == 4, what="three workers", seconds=60)
        rental.client.gather(futures)
        wait_until(lambda: len(cloud.alive) == 2, what="one worker is left", seconds=60)
    assert cloud.count_actions()["RunInstances"] <= 5  # a scheduler, three workers, perhaps again
