"""Workers of a Dask cluster that somebody else runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from distributed import Client, rpc
from distributed.security import Security

from ..errors import ClusterError
from .versions import check_workers
from .workers import Workers

_CONNECT_SECONDS = 20


@contextmanager
def open_existing(address: str) -> Iterator[Workers]:
    """Use the workers of a scheduler; TLS certificates come from the Dask configuration.

    Parameters
    ----------
    address : str
        ``tcp://host:port`` or ``tls://host:port``.

    Yields
    ------
    Workers
        All workers of that cluster; they stay when the block ends.

    Raises
    ------
    ClusterError
        If nothing answers, there is no worker, or a worker has other versions.
    """
    with connect(address, Security(), f"the cluster at {address}") as client:
        n_threads = min(client.nthreads().values())
        workers = Workers(client, n_threads=n_threads)
        try:
            yield workers
        finally:
            workers.withdraw()


@contextmanager
def connect(address: str, security: Security, name: str) -> Iterator[Client]:
    """Connect to a scheduler whose workers fit.

    Parameters
    ----------
    address : str
        ``tcp://host:port`` or ``tls://host:port``.
    security : distributed.Security
        Certificates.
    name : str
        What the cluster is called in messages.

    Yields
    ------
    distributed.Client
        Connected.

    Raises
    ------
    ClusterError
        If nothing answers, there is no worker, or a worker has other versions.
    """
    try:
        with ThreadPoolExecutor(1) as pool:  # a thread, because a notebook has a loop in this one
            pool.submit(asyncio.run, _knock(address, security)).result()
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=True, security=security)
    except (OSError, TimeoutError, ValueError, TypeError) as exc:
        raise ClusterError(
            f"no Dask scheduler answers at {address} within {_CONNECT_SECONDS} s ({exc}). Check "
            "the address and the firewall; for tls:// set distributed.comm.tls in the Dask "
            "configuration"
        ) from exc
    with client:
        check_workers(client, name)
        yield client


async def _knock(address: str, security: Security) -> None:
    """Wait for an answer of the scheduler; a Client would wait for ever where something is mute."""
    arguments = security.get_connection_args("client")
    async with asyncio.timeout(_CONNECT_SECONDS), rpc(address, connection_args=arguments) as other:
        await other.identity()
