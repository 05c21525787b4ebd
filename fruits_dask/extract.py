"""One partition's unit of work: read, decode, featurize, store.

This is what a Dask task runs. It is safe to repeat: the same rows give the same parts, and a part
appears only when it is whole. The features part is written last: where it is, the partition is
done.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from . import layout
from .decode import decode, thumbnail
from .errors import DecodeError, NotFoundError, StorageError
from .features import (
    count_part,
    metadata,
    read_table,
    read_vectors,
    vector_table,
    write_failures,
    write_table,
    write_thumbnails,
)
from .featurize import get_featurizer
from .records import (
    EXTRACT_OPERATIONS,
    Failure,
    Features,
    FeaturizerSpec,
    PartCount,
    PartitionSummary,
    Pixels,
    RowRange,
    StoreOptions,
)
from .source import read_rows
from .storage import ReadAhead, open_store
from .tasks import bag_of

if TYPE_CHECKING:
    import dask.bag as db

# Images that are decoded before the network sees them; bounds the pixels in memory.
_CHUNK_IMAGES = 128
# A worker has two tasks at a time: one computes while the other reads, decodes and stores. So the
# network never waits for the store, and what is prefetched is bounded by one chunk.
_computing = threading.Lock()
_of_thread = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractJob:
    """What a worker must know to do any partition of a run."""

    output: str
    """Address of the result; its manifest lists the images."""
    options: StoreOptions
    """How to reach input and output."""
    spec: FeaturizerSpec
    """What makes the features."""
    max_megapixels: float
    """Larger images are failures."""
    concurrent_reads: int
    """Requests under way at a time."""
    thumbnail_step: int
    """Every n-th row of the manifest gets a thumbnail for the report."""


@dataclass(slots=True)
class _Clock:
    """Wall-clock seconds of each operation."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(EXTRACT_OPERATIONS, 0.0)
    )

    @contextmanager
    def __call__(self, operation: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[operation] += time.perf_counter() - start


@dataclass(slots=True)
class _Outcome:
    """What became of the images of a partition, as far as it is done."""

    positions: list[int] = field(default_factory=list)
    vectors: list[Features] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    jpegs: dict[str, bytes] = field(default_factory=dict)


class Tally:
    """Sums over the partitions of a run, while they come in.

    Parameters
    ----------
    earlier : mapping, optional
        Facts of an earlier run over the same images, to go on from.
    """

    def __init__(self, earlier: Mapping[str, Any] | None = None) -> None:
        known = earlier or {}
        self.n_images = 0
        self.n_failures = 0
        self._seconds: dict[str, float] = {
            name: known.get("operations", {}).get(name, 0.0) for name in EXTRACT_OPERATIONS
        }
        self._peak_bytes: dict[str, int] = dict(known.get("peak_memory_bytes", {}))
        self._images_per_second = known.get("images_per_second")
        self._start = time.perf_counter()

    def add(self, summary: PartitionSummary) -> None:
        """Take in one partition."""
        self.n_images += summary.n_images
        self.n_failures += summary.n_failures
        for name, seconds in summary.seconds.items():
            self._seconds[name] += seconds
        peak = max(self._peak_bytes.get(summary.worker, 0), summary.peak_memory_bytes)
        self._peak_bytes[summary.worker] = peak

    def facts(self, counts: Sequence[PartCount], *, n_workers: int) -> dict[str, Any]:
        """Sum up for run.json: `counts` are those of all stored parts."""
        speed = self._images_per_second  # few images, tried again, say nothing about the speed
        if speed is None and self.n_images:
            speed = round(self.n_images / (time.perf_counter() - self._start), 1)
        return {
            "n_features": sum(count.n_features for count in counts),
            "n_failures": sum(count.n_failures for count in counts),
            "n_workers": n_workers,
            "images_per_second": speed,
            "operations": {name: round(s, 3) for name, s in self._seconds.items()},
            "peak_memory_bytes": dict(sorted(self._peak_bytes.items())),
        }


def extraction_bag(job: ExtractJob, partitions: list[RowRange]) -> db.Bag | None:
    """Describe the work of many partitions as a bag; nothing is computed.

    Parameters
    ----------
    job : ExtractJob
        What is the same for all of them.
    partitions : list of RowRange
        One task each.

    Returns
    -------
    dask.bag.Bag or None
        Of `PartitionSummary`, one in each partition of the bag; None when there is nothing to do.
    """
    return bag_of(partitions, partial(extract_partition, job))


def retry_bag(job: ExtractJob, partitions: list[RowRange]) -> db.Bag | None:
    """Describe the work of `retry_partition` on many partitions as a bag."""
    return bag_of(partitions, partial(retry_partition, job))


def counts_bag(output: str, options: StoreOptions, indices: list[int]) -> db.Bag | None:
    """Describe the counting of stored parts as a bag of `PartCount`, one in each partition."""
    return bag_of(indices, partial(_count_part, output, options))


def _count_part(output: str, options: StoreOptions, index: int) -> PartCount:
    return count_part(open_store(output, options), output, index)


def extract_partition(job: ExtractJob, rows: RowRange) -> PartitionSummary:
    """Make and store the features of one partition.

    Parameters
    ----------
    job : ExtractJob
        What is the same for all partitions.
    rows : RowRange
        Which rows of the manifest.

    Returns
    -------
    PartitionSummary
        Counts and times; the features are in the store.
    """
    clock = _Clock()
    store = open_store(job.output, job.options)
    listed = read_rows(store, layout.join(job.output, layout.MANIFEST), rows)
    outcome = _featurize_rows(job, listed, rows.start, clock)
    with clock("store"):
        _write_partition(job, rows.index, listed, outcome)
    return _summary(len(listed), outcome, clock)


def retry_partition(job: ExtractJob, rows: RowRange) -> PartitionSummary:
    """Try the failed images of one partition once more, and store what is then known.

    Parameters
    ----------
    job : ExtractJob
        What is the same for all partitions.
    rows : RowRange
        A partition that has both of its parts.

    Returns
    -------
    PartitionSummary
        Counts and times of this second try.
    """
    clock = _Clock()
    store = open_store(job.output, job.options)
    listed = read_rows(store, layout.join(job.output, layout.MANIFEST), rows)
    done = read_vectors(
        store, layout.part_path(job.output, layout.FEATURES, rows.index), "features"
    )
    failed = read_table(store, layout.part_path(job.output, layout.FAILURES, rows.index))
    positions = {path: i for i, path in enumerate(listed["path"].to_pylist())}
    known = set(done.keys["path"].to_pylist())  # also failed, if an earlier retry was cut short
    again = sorted(positions[path] for path in failed["path"].to_pylist() if path not in known)
    chosen = listed.take(np.asarray(again, dtype=np.int64))
    outcome = _featurize_rows(job, chosen, None, clock)
    outcome.positions = [again[i] for i in outcome.positions]
    outcome.positions += [positions[path] for path in done.keys["path"].to_pylist()]
    outcome.vectors.append(done.vectors)
    with clock("store"):
        _write_partition(job, rows.index, listed, outcome, is_retry=True)
    return _summary(len(again), outcome, clock)


def _featurize_rows(
    job: ExtractJob, listed: pa.Table, first_row: int | None, clock: _Clock
) -> _Outcome:
    """Read, decode and featurize listed images; `first_row` is None when none gets a thumbnail."""
    featurizer = get_featurizer(job.spec)
    outcome = _Outcome()
    paths = listed["path"].to_pylist()
    decoded = _decoded(job, paths, outcome, clock)
    buffer = _chunk_buffer(job.spec.image_px)
    while positions := _fill(buffer, decoded):
        batch = buffer[: len(positions)]
        with _computing, clock("featurize"):
            vectors = featurizer(batch)
        usable = np.asarray(np.isfinite(vectors).all(axis=1))
        outcome.vectors.append(vectors[usable])
        for position, pixels, is_usable in zip(positions, batch, usable, strict=True):
            path = paths[position]
            if not is_usable:
                outcome.failures.append(_not_finite(path))
                continue
            outcome.positions.append(position)
            if first_row is not None and (first_row + position) % job.thumbnail_step == 0:
                outcome.jpegs[path] = thumbnail(pixels)
    return outcome


def _chunk_buffer(side: int) -> Pixels:
    """Return the one buffer of this thread, for chunk after chunk and task after task.

    Giving back this many bytes for others to scatter small things into would make the process grow.
    """
    shape = (_CHUNK_IMAGES, side, side, 3)
    buffer: Pixels | None = getattr(_of_thread, "buffer", None)
    if buffer is None or buffer.shape != shape:
        buffer = _of_thread.buffer = np.empty(shape, np.uint8)
    return buffer


def _fill(buffer: Pixels, decoded: Iterator[tuple[int, Pixels]]) -> list[int]:
    """Put the next decoded images into the rows of `buffer`, and return their positions."""
    positions = []
    for row, (position, pixels) in zip(buffer, decoded, strict=False):  # the buffer asks first
        row[...] = pixels
        positions.append(position)
    return positions


def _decoded(
    job: ExtractJob, paths: list[str], outcome: _Outcome, clock: _Clock
) -> Iterator[tuple[int, Pixels]]:
    """Yield what could be read and decoded; the rest goes to the failures."""
    if not paths:
        return
    store = open_store(paths[0], job.options)
    with ReadAhead(store, paths, n_concurrent=job.concurrent_reads) as reads:
        contents = iter(reads)
        for position in range(len(paths)):
            with clock("read"):
                path, data = next(contents)
            if isinstance(data, StorageError):
                outcome.failures.append(_failure(path, "read", data))
                continue
            try:
                with _computing, clock("decode"):
                    pixels = decode(
                        data, image_px=job.spec.image_px, max_megapixels=job.max_megapixels
                    )
            except DecodeError as exc:
                outcome.failures.append(_failure(path, "decode", exc))
            else:
                yield position, pixels


def _failure(path: str, stage: str, exc: Exception) -> Failure:
    message = str(exc)
    if isinstance(exc, NotFoundError):
        message += "; it was there when the input was listed"
    return Failure(path=path, stage=stage, error=type(exc).__name__, message=message)


def _not_finite(path: str) -> Failure:
    message = "the network gave NaN or infinite features; the weights are damaged or do not fit"
    return Failure(path=path, stage="featurize", error="FloatingPointError", message=message)


def _write_partition(
    job: ExtractJob, index: int, listed: pa.Table, outcome: _Outcome, *, is_retry: bool = False
) -> None:
    """Store the parts, so that a cut between two writes never leaves an image in neither."""
    store = open_store(job.output, job.options)
    positions = np.asarray(outcome.positions, dtype=np.int64)
    order = np.argsort(positions)
    none = np.empty((0, job.spec.n_features), np.float32)
    vectors = np.concatenate([none, *outcome.vectors])[order]
    keys = listed.take(positions[order])
    table = vector_table(keys, vectors, "features", metadata(job.spec))
    if outcome.jpegs:
        write_thumbnails(store, job.output, index, outcome.jpegs)
    failures = sorted(outcome.failures, key=lambda failure: failure.path.encode())
    writes: list[Callable[[], None]] = [
        lambda: write_failures(store, job.output, index, failures),
        lambda: write_table(store, layout.part_path(job.output, layout.FEATURES, index), table),
    ]
    for write in reversed(writes) if is_retry else writes:
        write()


def _summary(n_images: int, outcome: _Outcome, clock: _Clock) -> PartitionSummary:
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB except on macOS
    return PartitionSummary(
        n_images=n_images,
        n_failures=len(outcome.failures),
        seconds=clock.seconds,
        worker=f"{platform.node()}-{os.getpid()}",
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
    )
