"""The speed of this machine against its own ceiling."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from . import pipeline
from .cluster import open_cluster
from .config import Settings
from .decode import decode
from .demo import write_sample
from .errors import DecodeError, InputError
from .featurize import get_featurizer, prepare_network
from .featurize.weights import Weights, load_weights
from .progress import Progress, Silent
from .records import IMAGE_SUFFIXES, FeaturizerSpec, Pixels, StoreOptions
from .storage import open_store
from .workspace import input_address, weights_name

# Photos in memory while the network runs alone: 40 MB at 224 px.
_CEILING_IMAGES = 256
_CEILING_SECONDS = 10.0
# Each worker works on two parts at a time: it is warm after its first ones, and may run out of work
# during its last ones.
_PARTS_AT_A_TIME = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of one extract stage."""

    steady: float
    """Images/s, without the first and the last parts of every worker."""
    extract: float
    """Images/s of the whole stage, the start of the engine included."""
    n_images: int
    """Photos with features."""
    n_workers: int
    """Worker processes."""
    peak_memory_bytes: int
    """Highest resident memory of a worker."""
    first_part_seconds: float
    """From the call until the first part was stored."""


@dataclass(slots=True)
class _Stopwatch(Silent):
    """Listens to the extract stage, and passes on what it hears."""

    listener: Progress
    start_seconds: float = field(default_factory=time.perf_counter)
    stage: str = ""
    marks: list[tuple[float, int]] = field(default_factory=list)

    def start(self, stage: str, *, total: int | None, unit: str, done: int = 0) -> None:
        self.stage = stage
        self.listener.start(stage, total=total, unit=unit, done=done)

    def update(self, done: int, *, n_failures: int = 0) -> None:
        if self.stage == "extract":
            self.marks.append((time.perf_counter() - self.start_seconds, done))
        self.listener.update(done, n_failures=n_failures)

    def finish(self, note: str = "") -> None:
        self.listener.finish(note)

    def say(self, message: str) -> None:
        self.listener.say(message)

    def steady(self, n_workers: int) -> float:
        """Images/s while all workers are warm and have work."""
        n_edge = _PARTS_AT_A_TIME * n_workers
        if len(self.marks) <= 2 * n_edge:
            raise InputError(
                f"{self.marks[-1][1]:,} photos in {len(self.marks)} parts are too few for a speed; "
                f"give enough for more than {2 * n_edge} parts, or a smaller --partition-size"
            )
        start, before = self.marks[n_edge - 1]
        end, after = self.marks[-n_edge - 1]
        return (after - before) / (end - start)


def measure(settings: Settings, *, progress: Progress) -> tuple[float, Speed]:
    """Run the network alone, then the extract stage.

    Parameters
    ----------
    settings : Settings
        As resolved; the output is a temporary folder whatever they say, and without an `input`
        sample photos are generated.
    progress : Progress
        Who listens.

    Returns
    -------
    ceiling : float
        What `measure_ceiling` found.
    speed : Speed
        What `measure_extraction` found.
    """
    with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
        ready = _with_photos(settings, Path(folder), progress)
        weights = load_weights(weights_name(settings), settings.backbone, settings.store_options)
        ceiling = measure_ceiling(ready, weights, progress=progress)
        return ceiling, measure_extraction(ready, progress=progress)


def measure_extraction(settings: Settings, *, progress: Progress) -> Speed:
    """Run the extract stage with a watch in the hand.

    Parameters
    ----------
    settings : Settings
        With an `input`, and an `output` where nothing is.
    progress : Progress
        Who listens.

    Returns
    -------
    Speed
        What was measured.

    Raises
    ------
    InputError
        If there are too few photos to tell a speed.
    """
    watch = _Stopwatch(progress)
    outcome = pipeline.extract(settings, progress=watch)
    facts = outcome.record["stages"]["extract"]
    return Speed(
        steady=watch.steady(facts["n_workers"]),
        extract=facts["images_per_second"],
        n_images=facts["n_features"],
        n_workers=facts["n_workers"],
        peak_memory_bytes=max(facts["peak_memory_bytes"].values()),
        first_part_seconds=watch.marks[0][0],
    )


def measure_ceiling(settings: Settings, weights: Weights, *, progress: Progress) -> float:
    """Measure the network alone: decoded photos in memory, all workers at the same time.

    Parameters
    ----------
    settings : Settings
        With an `input`.
    weights : Weights
        Those of the network.
    progress : Progress
        Who listens.

    Returns
    -------
    float
        Images/s of all workers together.
    """
    pixels = _some_pixels(settings, weights)
    progress.start("ceiling", total=None, unit="")
    with open_cluster(settings) as workers:
        spec = weights.spec(
            engine=settings.engine, precision=settings.precision, n_threads=workers.n_threads
        )
        workers.deliver(spec, lambda: prepare_network(settings.engine, weights))
        rates = workers.each(_rate, spec, pixels, _CEILING_SECONDS)
    progress.finish(f"{sum(rates):,.0f} images/s, the network alone")
    return sum(rates)


def _with_photos(settings: Settings, folder: Path, progress: Progress) -> Settings:
    changes: dict[str, object] = {"output": str(folder / "result")}
    if settings.input is None:
        progress.start("sample", total=None, unit="photos")
        write_sample(str(folder / "photos"), StoreOptions(), on_written=progress.update)
        progress.finish()
        changes |= {"input": str(folder / "photos"), "weights": weights_name(settings)}
    return settings.model_copy(update=changes)


def _some_pixels(settings: Settings, weights: Weights) -> Pixels:
    """Decode the first usable photos of the input."""
    side = weights.backbone.image_px
    found = list(islice(_decoded(settings, side), _CEILING_IMAGES))
    if not found:
        raise InputError(f"no photo below {input_address(settings)} could be decoded")
    return np.stack([found[i % len(found)] for i in range(_CEILING_IMAGES)])


def _decoded(settings: Settings, image_px: int) -> Iterator[Pixels]:
    root = input_address(settings)
    store = open_store(root, settings.store_options)
    for item in store.list_images(root, IMAGE_SUFFIXES):
        try:
            yield decode(store.read(item.path), image_px=image_px)
        except DecodeError:
            continue


def _rate(spec: FeaturizerSpec, pixels: Pixels, least_seconds: float) -> float:
    """Images/s of the featurizer of this worker."""
    featurizer = get_featurizer(spec)
    featurizer(pixels)
    n_images, start = 0, time.perf_counter()
    while time.perf_counter() - start < least_seconds:
        featurizer(pixels)
        n_images += len(pixels)
    return n_images / (time.perf_counter() - start)
