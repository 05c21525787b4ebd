"""Rented or borrowed workers: the home of distributed, and later of dask-cloudprovider."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..config import Settings
from ..errors import ConfigError

if TYPE_CHECKING:
    from .workers import Workers

__all__ = ["check_cluster_name", "open_cluster"]

_ADDRESS_PREFIXES = ("tcp://", "tls://")


def check_cluster_name(name: str) -> None:
    """Refuse what is neither a kind of cluster nor the address of a scheduler.

    Raises
    ------
    ConfigError
        If the name is neither.
    """
    if name != "local" and not name.startswith(_ADDRESS_PREFIXES):
        raise ConfigError(
            f"--cluster {name!r} is unknown; expected local, or the address of a Dask scheduler "
            "such as tcp://10.0.0.5:8786 or tls://10.0.0.5:8786"
        )


def open_cluster(settings: Settings) -> AbstractContextManager[Workers]:
    """Open the workers that the settings ask for.

    Parameters
    ----------
    settings : Settings
        ``cluster``, ``workers``, ``memory_limit`` and ``dashboard_address`` are used.

    Returns
    -------
    context manager of Workers
        What was started ends with it; borrowed workers stay.

    Raises
    ------
    ConfigError
        If the kind of cluster is unknown.
    ClusterError
        On entering, if the workers cannot be reached or do not fit.
    """
    check_cluster_name(settings.cluster)
    if settings.cluster == "local":
        from .local import open_local  # noqa: PLC0415 - each kind is imported in its branch

        return open_local(
            n_workers=settings.workers,
            memory_limit=settings.memory_limit,
            dashboard_address=settings.dashboard_address,
        )
    from .existing import open_existing  # noqa: PLC0415

    return open_existing(settings.cluster)
