"""Waiting, and what must be true after everything."""

from __future__ import annotations

import time
from collections.abc import Callable

from ec2.cloud import Cloud


def wait_until(condition: Callable[[], bool], *, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def assert_nothing_left(cloud: Cloud) -> None:
    """No instance, no security group, no process."""
    assert cloud.alive == []
    assert cloud.made_groups == []
    wait_until(lambda: cloud.processes == [], what="the processes of the machines end")
