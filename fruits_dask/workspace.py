"""One output being worked on: checked, locked, and with its record kept up to date."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import layout
from .config import RENTED_SETTINGS, Settings
from .errors import InputError, NotFoundError, OutputExistsError, ResultError
from .featurize.weights import Weights, load_weights, normalize_name
from .lock import OutputLock
from .progress import Progress
from .records import FORMAT_VERSION
from .residency import check_regions, find_regions
from .results import (
    Identity,
    check_ours,
    check_same,
    check_versions,
    is_complete,
    new_record,
    read_record,
    remove_result,
    remove_temporaries,
    write_record,
    write_success,
)
from .storage import Store, is_s3, normalize, open_store, real_path

SAMPLE_BUCKET = "fruits-sample"
SAMPLE_ADDRESS = f"s3://{SAMPLE_BUCKET}/photos"

_REDUCTION = {"components", "reducer"}
# Not stored for later commands: they belong to a machine or a moment, not to the result.
_PASSING_SETTINGS = {
    *("output", "cluster", "workers", "memory_limit", "dashboard_address"),
    *RENTED_SETTINGS,
}


@dataclass(kw_only=True)
class Workspace:
    """All that the stages of a run share."""

    settings: Settings
    """As resolved."""
    store: Store
    """Where the output is."""
    output: str
    """Its address."""
    lock: OutputLock
    """Held while this is worked on."""
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

    @cached_property
    def weights(self) -> Weights:
        """What makes the features, loaded when it is first asked for."""
        options = self.settings.store_options
        return load_weights(weights_name(self.settings), self.settings.backbone, options)

    @property
    def identity(self) -> Identity:
        """What decides the tables; not how they are reached or how many workers there are."""
        backbone = self.weights.backbone
        return Identity(
            values={
                "format_version": FORMAT_VERSION,
                "input": self.input,
                "limit": self.settings.limit,
                "max_megapixels": self.settings.max_megapixels,
                "backbone": backbone.name,
                "engine": self.settings.engine,
                "precision": self.settings.precision,
                "weights_sha256": self.weights.sha256,
                "image_px": backbone.image_px,
                "preprocessing": backbone.preprocessing,
                **self.reduction,
            }
        )

    @property
    def reduction(self) -> dict[str, Any]:
        """Settings of the reduction, which can change while the features stay."""
        return self.settings.model_dump(include=_REDUCTION)

    def path(self, name: str) -> str:
        """Address of something in the output."""
        return layout.join(self.output, name)

    def has(self, name: str) -> bool:
        """Tell whether something in the output is there."""
        return self.store.exists(self.path(name))

    def save(self) -> None:
        """Write run.json.

        Raises
        ------
        OutputLockedError
            If another run took the output meanwhile.
        """
        self.lock.check()
        write_record(self.store, self.output, self.record)

    @contextmanager
    def stage(
        self, name: str, *, spent_seconds: float = 0.0, is_saved: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Time a stage; what is put into the yielded dict is recorded when the stage completes.

        Parameters
        ----------
        name : str
            Name of the stage.
        spent_seconds : float
            What earlier tries of the stage took.
        is_saved : bool
            Write run.json at once; else the caller does.
        """
        facts: dict[str, Any] = {}
        start = time.perf_counter()
        yield facts
        facts["seconds"] = round(spent_seconds + time.perf_counter() - start, 3)
        self.stages[name] = facts
        if is_saved:
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
        """Remove what was made from the features, because they or the settings change.

        The record is written before anything but `_SUCCESS` goes: at no moment does it claim what
        is not there.
        """
        self.store.remove(self.path(layout.SUCCESS))
        for stage in ("reduce", "report"):
            self.stages.pop(stage, None)
        self.save()
        for name in (layout.REPORT, "pca"):
            self.store.remove(self.path(name))

    def change_reduction(self) -> None:
        """Take over how the settings reduce into the identity, and forget the old scores."""
        self.forget_reduction()
        wanted = self.reduction
        changed = {**self.record["identity"], **wanted}
        self.record |= {"identity": changed, "fingerprint": Identity(values=changed).fingerprint}
        self.record["settings"] |= wanted
        self.save()

    def complete(self) -> None:
        """Mark the result as complete, if it is.

        Raises
        ------
        ResultError
            If something is missing that the record says is there.
        """
        for name in (layout.MANIFEST, layout.PCA_MODEL, layout.SCORES_CSV, layout.REPORT):
            if not self.has(name):
                raise ResultError(f"{self.path(name)} is missing; start anew with --overwrite")
        self.lock.check()
        if not is_s3(self.output):  # what a worker that was killed left of a write
            names = [item.name for item in self.store.list_folder(self.output)]
            remove_temporaries(self.store, self.output, names)
        write_success(self.store, self.output)


@contextmanager
def open_workspace(
    settings: Settings,
    progress: Progress,
    *,
    overwrite: bool = False,
    keep_reduction: bool = False,
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
    keep_reduction : bool
        The work ahead is not the reduction; how the result does that stays.

    Yields
    ------
    Workspace
        Locked until the end of the block.

    Raises
    ------
    FruitsDaskError
        If the output is not ours, of other settings, locked or outside the allowed regions.
    """
    regions = check_addresses(settings)
    space = _look(settings, progress)
    identity = space.identity
    with _held(space, overwrite=overwrite):
        found = None if overwrite else read_record(space.store, space.output)
        if found is None:
            remove_result(space.store, space.output)
            found = new_record(identity)
        space.record = found
        kept = {name: found["identity"].get(name) for name in _REDUCTION}
        check_same(found, identity.replaced(**kept), space.output)
        check_versions(found)
        found["regions"] = regions
        found["settings"] = _lasting(settings) | kept
        found["weights"] = {"name": space.weights.name, "sha256": space.weights.sha256}
        if kept != space.reduction and not keep_reduction:
            if "reduce" in space.stages:
                check_same(found, identity, space.output)
            space.change_reduction()
        space.save()
        yield space


@contextmanager
def open_result(settings: Settings, progress: Progress) -> Iterator[Workspace]:
    """Take a result for work that needs neither its input nor its weights.

    Parameters
    ----------
    settings : Settings
        As resolved from the result.
    progress : Progress
        Who listens.

    Yields
    ------
    Workspace
        Locked until the end of the block.

    Raises
    ------
    FruitsDaskError
        If there is no result, it is locked or outside the allowed regions.
    """
    space = _look(settings, progress)
    _check_regions(settings, [space.output])
    with _held(space, overwrite=False):
        found = read_record(space.store, space.output)
        if found is None:
            raise ResultError(f"there is no result in {space.output}; `run` or `plan` makes one")
        space.record = found
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
    _check_regions(settings, _addresses(settings))
    space = _look(settings, progress)
    record = read_record(space.store, space.output)
    if record is None or not is_complete(space.store, space.output):
        return None
    check_same(record, space.identity, space.output)
    space.record = record
    return space


def check_addresses(settings: Settings) -> dict[str, str]:
    """Refuse input and output that overlap, are not there, or are where they must not be.

    Parameters
    ----------
    settings : Settings
        As resolved.

    Returns
    -------
    dict of str to str
        Address -> region.

    Raises
    ------
    FruitsDaskError
        Saying which address is at fault.
    """
    output = normalize(settings.output)
    if not is_s3(output) and Path(output).is_file():
        raise OutputExistsError(f"the output {output} is a file; give a folder or an s3:// prefix")
    if settings.input is not None:
        _check_input(input_address(settings), output)
    return _check_regions(settings, _addresses(settings))


def input_address(settings: Settings) -> str:
    """Address below which the images are; without `input`, that of the sample photos."""
    return SAMPLE_ADDRESS if settings.input is None else normalize(settings.input)


def weights_name(settings: Settings) -> str:
    """Name of the weights, or their address; `imagenet` for photos, `fruits` for the sample."""
    default = "fruits" if settings.input is None else "imagenet"
    return normalize_name(settings.weights or default)


def _look(settings: Settings, progress: Progress) -> Workspace:
    output = normalize(settings.output)
    store = open_store(output, settings.store_options)
    lock = OutputLock(store, output)
    return Workspace(
        settings=settings, store=store, output=output, lock=lock, record={}, progress=progress
    )


@contextmanager
def _held(space: Workspace, *, overwrite: bool) -> Iterator[None]:
    names = [item.name for item in space.store.list_folder(space.output)]
    check_ours(names, space.output, overwrite=overwrite)
    with space.lock:
        remove_temporaries(space.store, space.output, names)
        yield


def _check_input(source: str, output: str) -> None:
    if not is_s3(source) and not Path(source).is_dir():
        raise NotFoundError(f"there is no folder {source}; check the spelling of --input")
    inner, outer = f"{real_path(output)}/", f"{real_path(source)}/"
    if inner.startswith(outer) or outer.startswith(inner):
        raise InputError(
            f"the output {output} and the input {source} are one inside the other; the input is "
            "never written, so give an --output beside it"
        )


def _addresses(settings: Settings) -> list[str]:
    """List everything that a run reads or writes."""
    addresses = [normalize(settings.output)]
    if settings.input is not None:
        addresses.append(input_address(settings))
    if is_s3(weights_name(settings)):
        addresses.append(weights_name(settings))
    return addresses


def _check_regions(settings: Settings, addresses: list[str]) -> dict[str, str]:
    regions = find_regions(addresses, settings.store_options)
    endpoint_url = settings.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    check_regions(regions, settings.allowed_regions, endpoint_url=endpoint_url)
    return regions


def _lasting(settings: Settings) -> dict[str, Any]:
    """Return settings for later commands on this result, from whatever folder."""
    gone = {"endpoint_url", "anonymous"} if settings.input is None else set()
    lasting = settings.model_dump(mode="json", exclude=gone | _PASSING_SETTINGS)
    if settings.input is not None:
        lasting["input"] = normalize(settings.input)
    if settings.weights is not None:
        lasting["weights"] = normalize_name(settings.weights)
    return lasting
