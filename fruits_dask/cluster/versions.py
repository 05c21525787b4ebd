"""Whether workers have the packages of this machine."""

from __future__ import annotations

import hashlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from distributed import Client

# What must be the same on both sides: these read each other's objects or decide the features.
_SAME = (
    *("fruits_dask", "dask", "distributed", "dask-ml", "fsspec", "s3fs"),
    *("tensorflow", "openvino", "keras", "h5py", "numpy", "pillow", "pyarrow"),
)
_MADE_TAG = re.compile(r".+-[0-9a-f]{12}")


def environment_tag() -> str:
    """Name what is installed here: equal names, equal versions on both sides.

    Returns
    -------
    str
        Version of this package, and twelve digits over those of all packages that matter; a tag for
        a container image.
    """
    found = [f"python {platform.python_version()}"]
    found += [f"{name} {_version(name)}" for name in _SAME]
    digits = hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]
    return f"{__version__}-{digits}"


def check_image(image: str) -> None:
    """Refuse an image that is not pinned, or whose tag says that it has other versions.

    Parameters
    ----------
    image : str
        ``REPOSITORY:TAG``, with ``@sha256:...`` or without.

    Raises
    ------
    ConfigError
        Saying which tag fits.
    """
    _, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    here = environment_tag()
    if "@sha256:" not in image and tag in ("", "latest"):
        raise ConfigError(
            f"the docker_image {image!r} is not pinned: what it is may change while a run goes on. "
            f"Give REPOSITORY:TAG; {here} is the tag of an image with the versions of this machine"
        )
    if _MADE_TAG.fullmatch(tag) and tag != here:
        raise ConfigError(
            f"the docker_image {image!r} has other versions than this machine, whose tag is "
            f"{here}: build that one, or install here what the image has (requirements.lock)"
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def check_workers(client: Client, where: str) -> None:
    """Refuse workers that have other versions than this machine, or none at all.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    where : str
        What the cluster is called in messages.

    Raises
    ------
    ClusterError
        Naming every worker and package that differs.
    """
    if not client.scheduler_info(n_workers=-1)["workers"]:
        raise ClusterError(f"{where} has no worker; start some and run again")
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
            f"the workers of {where} do not have the packages of this machine:\n"
            + "\n".join(problems)
            + "\nInstall the same versions there (requirements.lock has them)"
        )
