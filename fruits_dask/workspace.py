"""One output being worked on: checked, locked, and with its record kept up to date."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import layout
from .config import Settings
from .errors import InputError, NotFoundError, ResultError
from .featurize.weights import Weights, load_weights
from .lock import OutputLock
from .progress import Progress
from .records import FORMAT_VERSION
from .residency import check_regions, find_regions
from .results import (
    Identity,
    check_ours,
    check_same,
    is_complete,
    new_record,
    read_record,
    remove_result,
    remove_temporaries,
    write_record,
)
from .storage import Store, is_s3, normalize, open_store

SAMPLE_BUCKET = "fruits-sample"
SAMPLE_ADDRESS = f"s3://{SAMPLE_BUCKET}/photos"


@dataclass(slots=True, kw_only=True)
class Workspace:
    """All that the stages of a run share."""

    settings: Settings
    """As resolved."""
    store: Store
    """Where the output is."""
    output: str
    """Its address."""
    weights: Weights
    """What makes the features."""
    record: dict[str, Any]
    """Content of run.json."""
    progress: Progress
    """Who listens."""

    @property
    def input(self) -> str:
        """Address below which the images are."""
        return input_address(self.settings)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Facts of the stages that were completed, by name."""
        found: dict[str, dict[str, Any]] = self.record["stages"]
        return found

    def path(self, name: str) -> str:
        """Address of something in the output."""
        return layout.join(self.output, name)

    def has(self, name: str) -> bool:
        """Tell whether something in the output is there."""
        return self.store.exists(self.path(name))

    def save(self) -> None:
        """Write run.json."""
        write_record(self.store, self.output, self.record)

    @contextmanager
    def stage(self, name: str, *, spent_seconds: float = 0.0) -> Iterator[dict[str, Any]]:
        """Time a stage; what is put into the yielded dict is recorded when the stage completes."""
        facts: dict[str, Any] = {}
        start = time.perf_counter()
        yield facts
        facts["seconds"] = round(spent_seconds + time.perf_counter() - start, 3)
        self.stages[name] = facts
        self.save()

    def require(self, stage: str) -> None:
        """Refuse to go on when an earlier stage is not complete.

        Raises
        ------
        ResultError
            Naming the stage to run first.
        """
        if stage not in self.stages:
            raise ResultError(
                f"{self.output} has no complete `{stage}` stage; do that first, or `run` everything"
            )

    def forget_reduction(self) -> None:
        """Remove what was made from the features, because they or the settings changed."""
        for name in (layout.SUCCESS, layout.REPORT, "pca"):
            self.store.remove(self.path(name))
        for stage in ("reduce", "report"):
            self.stages.pop(stage, None)
        self.save()


@contextmanager
def open_workspace(
    settings: Settings,
    progress: Progress,
    *,
    overwrite: bool = False,
    may_change: tuple[str, ...] = (),
) -> Iterator[Workspace]:
    """Check all that can be checked before work, take the output for this run, and yield it.

    Parameters
    ----------
    settings : Settings
        As resolved.
    progress : Progress
        Who listens.
    overwrite : bool
        Remove the result that is there.
    may_change : tuple of str
        Names in the identity that may differ from the result that is there.

    Yields
    ------
    Workspace
        Locked until the end of the block.

    Raises
    ------
    FruitsDaskError
        If the output is not ours, of other settings, locked or outside the allowed regions.
    """
    output = normalize(settings.output)
    _check_input(input_address(settings), output)
    regions = _check_residency(settings, output)
    space = _look(settings, output, progress)
    identity = _identity(settings, space.weights)
    check_ours(_names(space), output, overwrite=overwrite)
    with OutputLock(space.store, output):
        _take_over(space, identity, overwrite=overwrite, may_change=may_change)
        space.record["regions"] = regions
        space.record["settings"] = _lasting(settings)
        space.save()
        yield space


def find_finished(settings: Settings, progress: Progress) -> Workspace | None:
    """Look for a complete result of the same settings, without locking or writing anything.

    Parameters
    ----------
    settings : Settings
        As resolved.
    progress : Progress
        Who listens.

    Returns
    -------
    Workspace or None
        None when there is work to do.

    Raises
    ------
    OutputExistsError
        If there is a complete result of other settings.
    """
    output = normalize(settings.output)
    _check_residency(settings, output)
    store = open_store(output, settings.store_options)
    record = read_record(store, output)
    if record is None or not is_complete(store, output):
        return None
    space = _look(settings, output, progress)
    space.record = record
    check_same(record, _identity(settings, space.weights), output)
    return space


def input_address(settings: Settings) -> str:
    """Address below which the images are; without `input`, that of the sample photos."""
    return normalize(settings.input or SAMPLE_ADDRESS)


def _look(settings: Settings, output: str, progress: Progress) -> Workspace:
    options = settings.store_options
    return Workspace(
        settings=settings,
        store=open_store(output, options),
        output=output,
        weights=load_weights(weights_name(settings), settings.backbone, options),
        record={},
        progress=progress,
    )


def weights_name(settings: Settings) -> str:
    """Name of the weights; `imagenet` for real photos, `fruits` for the sample."""
    return settings.weights or ("imagenet" if settings.input else "fruits")


def _check_input(source: str, output: str) -> None:
    if not is_s3(source) and not Path(source).is_dir():
        raise NotFoundError(f"there is no folder {source}; check the spelling of --input")
    if f"{output}/".startswith(f"{source}/"):
        raise InputError(
            f"the output {output} is inside the input {source}, which is never written; "
            "give an --output outside of it"
        )


def _check_residency(settings: Settings, output: str) -> dict[str, str]:
    addresses = [output]
    if settings.input is not None:
        addresses.append(input_address(settings))
    if is_s3(weights_name(settings)):
        addresses.append(normalize(weights_name(settings)))
    regions = find_regions(addresses, settings.store_options)
    check_regions(regions, settings.allowed_regions, endpoint_url=settings.endpoint_url)
    return regions


def _identity(settings: Settings, weights: Weights) -> Identity:
    """Collect what decides the tables; not how they are reached or how many workers there are."""
    return Identity(
        values={
            "format_version": FORMAT_VERSION,
            "input": input_address(settings),
            "limit": settings.limit,
            "partition_size": settings.partition_size,
            "max_megapixels": settings.max_megapixels,
            "backbone": weights.backbone.name,
            "engine": settings.engine,
            "weights": weights.name,
            "weights_sha256": weights.sha256,
            "image_px": weights.backbone.image_px,
            "preprocessing": weights.backbone.preprocessing,
            "components": settings.components,
        }
    )


def _names(space: Workspace) -> list[str]:
    return [item.name for item in space.store.list_folder(space.output)]


def _take_over(
    space: Workspace, identity: Identity, *, overwrite: bool, may_change: tuple[str, ...]
) -> None:
    """Start a record, or go on with the one that is there."""
    remove_temporaries(space.store, space.output, _names(space))
    found = None if overwrite else read_record(space.store, space.output)
    if found is None:
        remove_result(space.store, space.output)
        space.record = new_record(identity)
        return
    space.record = found
    known = found["identity"]
    changed = {name for name, value in identity.values.items() if known.get(name) != value}
    if changed and changed <= set(may_change):
        found |= {"identity": identity.values, "fingerprint": identity.fingerprint}
        space.forget_reduction()
    check_same(found, identity, space.output)


def _lasting(settings: Settings) -> dict[str, Any]:
    """Return settings for later commands on this result; an embedded server is gone by then."""
    gone = {"endpoint_url", "anonymous"} if settings.input is None else set()
    return settings.model_dump(mode="json", exclude=gone)
