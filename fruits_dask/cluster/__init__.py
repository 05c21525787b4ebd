"""Rented or borrowed workers: the home of distributed and dask-cloudprovider."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..config import Settings
from ..errors import ConfigError
from ..progress import Progress, Silent
from ..records import Capacity
from ..residency import LOCAL, UNSTATED, check_regions
from ..storage import is_s3
from .kept import is_kept

if TYPE_CHECKING:
    from .workers import Workers

__all__ = ["check_cluster", "find_capacity", "open_cluster"]

_SILENT = Silent()


def check_cluster(settings: Settings) -> None:
    """Refuse what is neither a kind of cluster nor an address, and rented machines for local files.

    Raises
    ------
    ConfigError
        Saying what was expected.
    """
    name = settings.cluster
    if name != "ec2" and settings.workers and settings.workers[0] != settings.workers[1]:
        raise ConfigError(
            f"--workers {settings.workers[0]}:{settings.workers[1]} is for --cluster ec2; give one "
            "number"
        )
    if not settings.is_rented:
        return
    if name != "ec2" and not is_kept(name):
        raise ConfigError(
            f"--cluster {name!r} is unknown; expected local, ec2, the address of a Dask "
            "scheduler such as tcp://10.0.0.5:8786 or tls://10.0.0.5:8786, or the name of a "
            "cluster that `cluster up` rented from this machine"
        )
    for flag, address in (("--input", settings.input), ("--output", settings.output)):
        if address is not None and not is_s3(address):
            raise ConfigError(
                f"{flag} {address} is on this machine, where rented machines cannot reach it; "
                "give an s3://BUCKET/PREFIX"
            )


def rented_region(settings: Settings, regions: Mapping[str, str]) -> str:
    """Choose where machines are rented, and refuse a place where the bytes must not go.

    Parameters
    ----------
    settings : Settings
        ``region`` and ``allowed_regions`` are used.
    regions : mapping of str to str
        Address -> region of what the machines will read and write.

    Returns
    -------
    str
        ``region``, or where the input is.

    Raises
    ------
    ConfigError
        If that is outside the allowed regions, or not where the buckets are.
    """
    known = {a: r for a, r in regions.items() if r not in (LOCAL, UNSTATED)}
    region = settings.region or next(iter(known.values()), None)
    if region is None:
        raise ConfigError("no service states where the photos are; give --region")
    check_regions({"the cluster": region}, settings.allowed_regions, endpoint_url=None)
    for address, other in known.items():
        if other != region:
            raise ConfigError(
                f"{address} is in {other} and the cluster in {region}: every byte between them "
                f"would leave its region, and cost; rent in one region with both buckets"
            )
    return region


def find_capacity(settings: Settings, regions: Mapping[str, str]) -> Capacity:
    """Find out what would work on a run; nothing is started.

    Parameters
    ----------
    settings : Settings
        As for `open_cluster`.
    regions : mapping of str to str
        As for `rented_region`.

    Returns
    -------
    Capacity
        For rented machines the most that would come.

    Raises
    ------
    ConfigError
        If a setting does not fit, or the workers are those of somebody else.
    """
    check_cluster(settings)
    if settings.cluster == "local":
        from .local import default_n_workers, memory_of_worker  # noqa: PLC0415

        n_workers = settings.workers[1] if settings.workers else default_n_workers()
        n_bytes = memory_of_worker(settings.memory_limit, n_workers)
        return Capacity(
            n_processes=n_workers,
            hourly=None,
            is_rented=False,
            description=f"{n_workers} local processes with {n_bytes / 2**30:.1f} GiB each",
        )
    if settings.cluster == "ec2":
        from .ec2 import examine  # noqa: PLC0415

        return examine(settings, region=rented_region(settings, regions))
    raise ConfigError("what others run is not known here: estimate for --cluster local or ec2")


def open_cluster(
    settings: Settings,
    *,
    regions: Mapping[str, str] | None = None,
    progress: Progress = _SILENT,
) -> AbstractContextManager[Workers]:
    """Open the workers that the settings ask for.

    Parameters
    ----------
    settings : Settings
        ``cluster``, ``workers``, ``memory_limit``, ``dashboard_address`` and those of rented
        machines are used.
    regions : mapping of str to str, optional
        Address -> region of input and output; rented machines are there too.
    progress : Progress
        Who listens; machines take minutes to start.

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
    check_cluster(settings)
    if settings.cluster == "local":
        from .local import open_local  # noqa: PLC0415 - each kind is imported in its branch

        return open_local(
            n_workers=settings.workers[1] if settings.workers else None,
            memory_limit=settings.memory_limit,
            dashboard_address=settings.dashboard_address,
        )
    if settings.is_rented:
        from .ec2 import open_ec2, open_kept  # noqa: PLC0415

        region = rented_region(settings, regions or {})
        if settings.cluster == "ec2":
            return open_ec2(settings, region=region, progress=progress)
        return open_kept(settings.cluster, settings, region=region)
    from .existing import open_existing  # noqa: PLC0415

    return open_existing(settings.cluster)
