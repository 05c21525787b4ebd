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
from .config import Settings
from .errors import ConfigError, FruitsDaskError, InputError
from .featurize.backbones import DEFAULT_BACKBONE, find_backbone
from .featurize.weights import imagenet_path, load_weights
from .records import IMAGE_SUFFIXES
from .residency import check_regions, find_regions
from .storage import is_s3, normalize, open_store
from .workspace import input_address, weights_name

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


def _python(_: Settings) -> str:
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


def _region(settings: Settings) -> str:
    addresses = [normalize(settings.output)]
    if settings.input is not None:
        addresses.append(input_address(settings))
    regions = find_regions(addresses, settings.store_options)
    check_regions(regions, settings.allowed_regions, endpoint_url=settings.endpoint_url)
    return ", ".join(f"{address}: {region}" for address, region in regions.items())


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
    probe = layout.join(output, f".doctor-{uuid.uuid4().hex[:8]}")
    existed = is_s3(output) or Path(output).is_dir()
    try:
        store.write(probe, b"")
    finally:
        store.remove(probe)
        if not existed:
            store.remove(output)
    if not is_s3(output):
        free = shutil.disk_usage(Path(output).parent).free
        if free < _LEAST_DISK_BYTES:
            raise ConfigError(f"{output}: only {free / 2**30:.1f} GiB free on this disk")
    return f"{output} can be written"


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
    "regions": _region,
    "input": _source,
    "output": _target,
    "weights": _weights,
}
