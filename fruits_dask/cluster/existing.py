"""Workers of a Dask cluster that somebody else runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from distributed import Client, rpc
from distributed.security import Security

from ..errors import ClusterError
from .workers import Workers

_CONNECT_SECONDS = 20
# What must be the same on both sides: these read each other's objects or decide the features.
_SAME = (
    *("fruits_dask", "dask", "distributed", "dask-ml", "fsspec", "s3fs"),
    *("tensorflow", "openvino", "keras", "h5py", "numpy", "pillow", "pyarrow"),
)


@contextmanager
def open_existing(address: str) -> Iterator[Workers]:
    """Connect to a scheduler; TLS certificates come from the Dask configuration.

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
    try:
        with ThreadPoolExecutor(1) as pool:  # a thread, because a notebook has a loop in this one
            pool.submit(asyncio.run, _knock(address)).result()
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=True)
    except (OSError, TimeoutError, ValueError, TypeError) as exc:
        raise ClusterError(
            f"no Dask scheduler answers at {address} within {_CONNECT_SECONDS} s ({exc}). Check "
            "the address and the firewall; for tls:// set distributed.comm.tls in the Dask "
            "configuration"
        ) from exc
    with client:
        _check_workers(client, address)
        n_threads = min(client.nthreads().values())
        workers = Workers(client, n_threads=n_threads)
        try:
            yield workers
        finally:
            workers.withdraw()


async def _knock(address: str) -> None:
    """Wait for an answer of the scheduler; a Client would wait for ever where something is mute."""
    security = Security().get_connection_args("client")
    async with asyncio.timeout(_CONNECT_SECONDS), rpc(address, connection_args=security) as other:
        await other.identity()


def _check_workers(client: Client, address: str) -> None:
    if not client.scheduler_info(n_workers=-1)["workers"]:
        raise ClusterError(f"the cluster at {address} has no worker; start some and run again")
    # Reads package metadata over there; imports nothing, so it works where the package is missing.
    found = client.get_versions(packages=list(_SAME))
    here = found["client"]["packages"]
    problems = [
        f"  {worker}: {name} {answer['packages'].get(name) or 'missing'}, here {here[name]}"
        for worker, answer in sorted(found["workers"].items())
        for name in ("python", *_SAME)
        if answer["packages"].get(name) != here[name]
    ]
    if problems:
        raise ClusterError(
            f"the workers at {address} do not have the packages of this machine:\n"
            + "\n".join(problems)
            + "\nInstall the same versions there (requirements.lock has them)"
        )
