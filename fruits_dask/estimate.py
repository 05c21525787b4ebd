"""How long a planned run would take, and what it would cost, from a try on some of its photos."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from . import layout
from .cluster import find_capacity
from .config import Settings
from .decode import decode
from .errors import DecodeError, InputError
from .featurize import build_featurizer, prepare_network
from .featurize.weights import load_weights
from .pipeline import Outcome
from .progress import Progress
from .records import Capacity, Pixels, RowRange
from .source import read_rows
from .storage import ReadAhead, open_store
from .workspace import weights_name

N_IMAGES = 200
"""Photos that are tried."""

# From so many places of the manifest, because photos of one folder are alike.
_N_PLACES = 10
# Reading, storing and Dask beside decoding and the network, see docs/scaling.md.
_OVERHEAD = 1.1
# Seconds of a core elsewhere for one of a core here: a virtual CPU of EC2 is half a core mostly.
_CORE_SECONDS = (0.7, 2.5)
# Until rented machines are there, and until they are given back.
_START_SECONDS = (120.0, 480.0)
# Listing is done; PCA, scores, CSV and report are left, see docs/scaling.md.
_SECONDS_AFTER = 10.0
_SECONDS_AFTER_AN_IMAGE = 60e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run would take."""

    n_images: int
    """Photos of the plan."""
    n_tried: int
    """Those of them that were decoded and featurized here."""
    seconds_per_image: float
    """Of one core of this machine."""
    capacity: Capacity
    """Where it would run."""
    hours: tuple[float, float]
    """From the start of the machines to their end."""

    @property
    def cost(self) -> tuple[float, float] | None:
        """Of the machines, in the currency of `hourly_prices`; None where no price is known."""
        hourly = self.capacity.hourly
        return None if hourly is None else (self.hours[0] * hourly, self.hours[1] * hourly)


def estimate(settings: Settings, planned: Outcome, *, progress: Progress) -> Estimate:
    """Decode and featurize some photos of a plan, on one core, and extrapolate.

    Parameters
    ----------
    settings : Settings
        As resolved; the cluster is the one that is asked about.
    planned : Outcome
        Of `pipeline.plan`.
    progress : Progress
        Who listens.

    Returns
    -------
    Estimate
        A range: other cores, and machines that take their time to come, are not known from here.

    Raises
    ------
    InputError
        If none of the photos can be decoded.
    """
    capacity = find_capacity(settings, planned.record["regions"])
    n_images = int(planned.record["stages"]["plan"]["n_images"])
    n_tried, seconds = _try(settings, planned, n_images, progress)
    whole = n_images * seconds * _OVERHEAD / capacity.n_processes
    after = _SECONDS_AFTER + _SECONDS_AFTER_AN_IMAGE * n_images
    low, high = (whole * factor + after for factor in _CORE_SECONDS)
    if capacity.is_rented:
        low, high = low + _START_SECONDS[0], high + _START_SECONDS[1]
    return Estimate(
        n_images=n_images,
        n_tried=n_tried,
        seconds_per_image=seconds,
        capacity=capacity,
        hours=(low / 3600, high / 3600),
    )


def _try(
    settings: Settings, planned: Outcome, n_images: int, progress: Progress
) -> tuple[int, float]:
    """Count the photos that could be decoded, and the seconds of one of them."""
    weights = load_weights(weights_name(settings), settings.backbone, settings.store_options)
    spec = weights.spec(engine=settings.engine, precision=settings.precision, n_threads=1)
    featurizer = build_featurizer(spec, prepare_network(settings.engine, weights))
    featurizer(np.zeros((8, spec.image_px, spec.image_px, 3), np.uint8))  # the first is slower
    paths = _some_paths(settings, planned, n_images)
    progress.start("estimate", total=len(paths), unit="images")
    pixels: list[Pixels] = []
    seconds = 0.0
    store = open_store(paths[0], settings.store_options)
    with ReadAhead(store, paths, n_concurrent=settings.concurrent_reads) as reads:
        for number, (_, data) in enumerate(reads, 1):
            progress.update(number)
            if not isinstance(data, bytes):
                continue
            start = time.perf_counter()
            try:
                pixels.append(
                    decode(data, image_px=spec.image_px, max_megapixels=settings.max_megapixels)
                )
            except DecodeError:
                continue
            seconds += time.perf_counter() - start
    if not pixels:
        raise InputError(f"none of {len(paths)} photos could be decoded; there is no estimate")
    start = time.perf_counter()
    featurizer(np.stack(pixels))
    seconds += time.perf_counter() - start
    progress.finish(f"{len(pixels) / seconds:,.0f} images/s on one core of this machine")
    return len(pixels), seconds / len(pixels)


def _some_paths(settings: Settings, planned: Outcome, n_images: int) -> list[str]:
    manifest = layout.join(planned.output, layout.MANIFEST)
    store = open_store(planned.output, settings.store_options)
    n_places = min(_N_PLACES, n_images)
    n_each = min(N_IMAGES // n_places, n_images // n_places)
    starts = np.linspace(0, n_images - n_each, n_places).astype(int)
    ranges = [RowRange(index=i, start=int(s), stop=int(s) + n_each) for i, s in enumerate(starts)]
    found = [p for rows in ranges for p in read_rows(store, manifest, rows)["path"].to_pylist()]
    return list(dict.fromkeys(found))
