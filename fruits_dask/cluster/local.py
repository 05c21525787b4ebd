"""Worker processes of this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import dask
import psutil
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import Client, LocalCluster, WorkerPlugin
from distributed.system import MEMORY_LIMIT

from ..errors import ClusterError, ConfigError
from ..residency import LOCAL
from .workers import WORKER_BYTES, WORKER_SETTINGS, Workers

logger = logging.getLogger(__name__)

_LEAST_BYTES = 1 * 2**30
# One computes while the other reads, decodes and stores.
_TASKS_AT_A_TIME = 2


def default_n_workers() -> int:
    """Choose one worker for each core, as far as the memory allows."""
    available = min(MEMORY_LIMIT, psutil.virtual_memory().available)
    return max(1, min(int(CPU_COUNT), int(available // WORKER_BYTES)))


@contextmanager
def open_local(
    *, n_workers: int | None, memory_limit: str | None, dashboard_address: str
) -> Iterator[Workers]:
    """Start worker processes on this machine, reachable from this machine only.

    Parameters
    ----------
    n_workers : int or None
        How many; None for one a core.
    memory_limit : str or None
        Memory of each, such as ``4GiB``; None for an equal share.
    dashboard_address : str
        ``host:port`` of the dashboard; another port is taken when this one is busy.

    Yields
    ------
    Workers
        Each with two tasks at a time; the engine has threads of its own.

    Raises
    ------
    ConfigError
        If `memory_limit` is no amount of memory.
    ClusterError
        If the workers do not start.
    """
    n_workers = n_workers or default_n_workers()
    memory_bytes = memory_of_worker(memory_limit, n_workers)
    try:
        with _interrupts_for_driver_only(), dask.config.set(WORKER_SETTINGS):
            cluster = LocalCluster(
                n_workers=n_workers,
                threads_per_worker=_TASKS_AT_A_TIME,
                memory_limit=memory_bytes,
                host="127.0.0.1",
                dashboard_address=_free_address(dashboard_address),
                silence_logs=logging.CRITICAL,  # what matters comes back as an exception
            )
    except (OSError, RuntimeError, TimeoutError) as exc:
        raise ClusterError(
            f"the local cluster did not start: {exc}; try --workers 1, or another "
            "--dashboard-address"
        ) from exc
    with cluster, Client(cluster) as client:
        n_threads = max(1, CPU_COUNT // n_workers)
        if hasattr(os, "sched_setaffinity") and n_workers * n_threads <= CPU_COUNT:  # on Linux
            client.register_plugin(_OwnCores(n_threads))
        yield Workers(client, n_threads=n_threads, region=LOCAL)


class _OwnCores(WorkerPlugin):  # type: ignore[misc]
    """Give every worker cores of its own, so that none pushes another out of its caches.

    Parameters
    ----------
    n_cores : int
        Of each.
    """

    name = "fruits_dask-own-cores"

    def __init__(self, n_cores: int) -> None:
        self._n_cores = n_cores

    def setup(self, worker: Any) -> None:  # noqa: ANN401 - distributed is untyped
        """Bind the thread that starts all others; local workers are named by their number."""
        cores = sorted(os.sched_getaffinity(0))
        first = int(worker.name) * self._n_cores
        os.sched_setaffinity(0, cores[first : first + self._n_cores])


def memory_of_worker(limit: str | None, n_workers: int) -> int:
    """Find the memory of one worker.

    Parameters
    ----------
    limit : str or None
        Such as ``4GiB``; None for an equal share of the machine.
    n_workers : int
        How many workers share it.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ConfigError
        If this is no amount of memory, or too little for TensorFlow.
    """
    try:
        n_bytes = int(MEMORY_LIMIT // n_workers if limit is None else parse_bytes(limit))
    except ValueError as exc:
        raise ConfigError(
            f"--memory-limit {limit!r} is no amount of memory; expected 4GiB or 3500MB"
        ) from exc
    if n_bytes < _LEAST_BYTES:
        raise ConfigError(
            f"{n_workers} workers with {n_bytes / 2**20:,.0f} MiB each cannot work; a worker needs "
            f"{_LEAST_BYTES / 2**30:g} GiB at least: give fewer --workers, or more --memory-limit"
        )
    return n_bytes


@contextmanager
def _interrupts_for_driver_only() -> Iterator[None]:
    """Start processes that do not see Ctrl-C, which a terminal sends to all of them.

    A blocked signal stays blocked in processes that are started now, and waits for this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # It unblocks signals when it starts, so it must not start on the way.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host or "127.0.0.1", int(port)))
    except (ValueError, OverflowError) as exc:
        raise ConfigError(
            f"--dashboard-address {address!r} is none; expected HOST:PORT such as 127.0.0.1:8787"
        ) from exc
    except OSError:
        logger.info("%s is in use; the dashboard takes a free port", address)
        return f"{host or '127.0.0.1'}:0"
    return f"{host or '127.0.0.1'}:{port}"
