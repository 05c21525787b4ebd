"""What would go wrong in a run, before it does."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import psutil

from . import layout
from .cluster import check_cluster, find_capacity
from .config import Settings
from .errors import ConfigError, FruitsDaskError, InputError, NotFoundError
from .featurize import check_engine
from .featurize.backbones import DEFAULT_BACKBONE, find_backbone
from .featurize.weights import imagenet_path, load_weights
from .records import IMAGE_SUFFIXES
from .results import check_ours
from .storage import is_s3, normalize, open_store
from .workspace import check_addresses, input_address, weights_name

_LEAST_MEMORY_BYTES = 2 * 2**30
_LEAST_DISK_BYTES = 1 * 2**30
_LOOK_AT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Result of one check."""

    subject: str
    """What was looked at."""
    is_good: bool
    """Nothing to do."""
    message: str
    """What was found, and what to do if it is not good."""


def examine(settings: Settings) -> Iterator[Finding]:
    """Check everything a run needs; no photo is read, no engine imported.

    Parameters
    ----------
    settings : Settings
        Those of the run.

    Yields
    ------
    Finding
        One for each check, as it is done.
    """
    for subject, check in _CHECKS.items():
        try:
            yield Finding(subject=subject, is_good=True, message=check(settings))
        except FruitsDaskError as exc:
            yield Finding(subject=subject, is_good=False, message=str(exc))
            if check is _addresses and not isinstance(exc, NotFoundError):
                return  # nothing is asked of places where nothing may be read or written


def _python(settings: Settings) -> str:
    check_engine(settings.engine)
    missing = [name for name in ("tensorflow", "dask_ml", "s3fs", "bokeh") if not find_spec(name)]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}; pip install fruits_dask")
    return f"{sys.version.split()[0]}, all packages are there"


def _machine(_: Settings) -> str:
    memory = psutil.virtual_memory().available
    cores = psutil.cpu_count() or 1
    if memory < _LEAST_MEMORY_BYTES:
        raise ConfigError(f"only {memory / 2**30:.1f} GiB of memory free; a worker needs about 1.5")
    return f"{cores} cores, {memory / 2**30:.1f} GiB of memory free"


def _addresses(settings: Settings) -> str:
    regions = check_addresses(settings)
    return ", ".join(f"{address}: {region}" for address, region in regions.items())


def _workers(settings: Settings) -> str:
    check_cluster(settings)
    if settings.cluster not in ("local", "ec2"):
        return f"those at {settings.cluster}; a run checks their versions"
    regions = check_addresses(settings) if settings.is_rented else {}
    return find_capacity(settings, regions).description


def _source(settings: Settings) -> str:
    if settings.input is None:
        if not find_spec("moto"):
            raise ConfigError(
                "the sample photos need the extra `demo`: pip install 'fruits_dask[demo]'; "
                "or give --input"
            )
        return "generated sample photos in an embedded S3 server"
    root = input_address(settings)
    images = open_store(root, settings.store_options).list_images(root, IMAGE_SUFFIXES)
    found = sum(1 for _ in islice(images, _LOOK_AT))
    if not found:
        raise InputError(f"no image below {root}; check the spelling of --input")
    return f"{root}: {'at least ' if found == _LOOK_AT else ''}{found:,} images"


def _target(settings: Settings) -> str:
    output = normalize(settings.output)
    store = open_store(output, settings.store_options)
    names = [item.name for item in store.list_folder(output)]
    check_ours(names, output, overwrite=False)
    probe = layout.join(output, f"{layout.PROBE}{uuid.uuid4().hex[:8]}")
    try:
        store.write(probe, b"")
        store.remove(probe)
    finally:
        store.prune(output)
    if not is_s3(output):
        free = shutil.disk_usage(Path(output).parent).free
        if free < _LEAST_DISK_BYTES:
            raise ConfigError(f"{output}: only {free / 2**30:.1f} GiB free on this disk")
    state = "holds a result already; `run` resumes it" if names else "can be written"
    return f"{output} {state}"


def _weights(settings: Settings) -> str:
    name = weights_name(settings)
    backbone = find_backbone(settings.backbone or DEFAULT_BACKBONE)
    if name == "imagenet" and backbone.imagenet_file and not imagenet_path(backbone).is_file():
        return f"imagenet: not on this machine yet, a run will download {imagenet_path(backbone)}"
    found = load_weights(name, settings.backbone, settings.store_options)
    return f"{name} for {found.backbone.name}, SHA-256 {found.sha256[:12]}"


_CHECKS: dict[str, Callable[[Settings], str]] = {
    "python": _python,
    "machine": _machine,
    "workers": _workers,
    "addresses": _addresses,
    "input": _source,
    "output": _target,
    "weights": _weights,
}
