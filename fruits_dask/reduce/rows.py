"""Which rows of the stored parts the PCA is fitted on, and how they come to the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import layout
from ..errors import ResultError
from ..features import read_vectors
from ..records import TRAINING_SPLITS, Features, PartCount, StoreOptions
from ..storage import open_store

_T = TypeVar("_T")
_R = TypeVar("_R")

# Rows of one chunk. A few rows are cut in two, so that there is work for more than one worker; many
# into chunks that are worth a task and are held several times while it computes: 26 MB as float64
# with 1,280 columns.
_CHUNKS_AT_LEAST = 2
_LEAST_ROWS = 1024
_MOST_ROWS = 2560
# Parts that one task reads or writes at a time; on S3 most of the time is waiting.
_CONCURRENT_PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Which rows of which parts make one chunk of the matrix."""

    output: str
    """Address of the result."""
    options: StoreOptions
    """How to reach it."""
    counts: tuple[PartCount, ...]
    """Its parts, in their order."""
    training_only: bool
    """Take the rows of the training split alone."""

    @property
    def n_rows(self) -> int:
        """Rows of the chunk."""
        return sum(_n_rows(count, training_only=self.training_only) for count in self.counts)


def plan_chunks(output: str, options: StoreOptions, counts: Iterable[PartCount]) -> list[Chunk]:
    """Join neighbouring parts to chunks that are worth a task.

    The cut depends on the rows alone, never on the workers, so that the same rows give the same
    model anywhere.

    Parameters
    ----------
    output : str
        Address of a result with features.
    options : StoreOptions
        How to reach it.
    counts : iterable of PartCount
        Row counts of all parts, in any order.

    Returns
    -------
    list of Chunk
        In the order of the rows; of the training split alone where there is one.
    """
    ordered = sorted(counts, key=lambda count: count.index)
    training_only = any(count.n_training for count in ordered)
    n_rows = sum(_n_rows(count, training_only=training_only) for count in ordered)
    target = min(max(_LEAST_ROWS, -(-n_rows // _CHUNKS_AT_LEAST)), _MOST_ROWS)
    groups: list[list[PartCount]] = []
    held = 0
    for count in ordered:
        n_new = _n_rows(count, training_only=training_only)
        if n_new == 0:
            continue
        if not groups or held + n_new / 2 > target:  # as near to it as whole parts can come
            groups.append([])
            held = 0
        groups[-1].append(count)
        held += n_new
    return [
        Chunk(output=output, options=options, counts=tuple(group), training_only=training_only)
        for group in groups
    ]


def load_chunk(chunk: Chunk) -> Features:
    """Read the rows of a chunk.

    Parameters
    ----------
    chunk : Chunk
        Which rows.

    Returns
    -------
    ndarray, (n_rows, n_features) float32
        As they are stored.

    Raises
    ------
    ResultError
        If there are not as many as were counted.
    """
    rows = np.concatenate(list(ahead(lambda count: _part_rows(chunk, count), chunk.counts)))
    if len(rows) != chunk.n_rows:
        raise ResultError(
            f"{chunk.output} changed while it was read: {len(rows)} rows of features, expected "
            f"{chunk.n_rows}; run again"
        )
    return rows


def ahead(function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Call a function that reads or writes a part, a few parts ahead of the consumer, in order.

    Parameters
    ----------
    function : callable
        What to do with one item; is called in threads.
    items : iterable
        What to do it with.

    Yields
    ------
    object
        What the function returned, in the order of the items.
    """
    pending: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(_CONCURRENT_PARTS, thread_name_prefix="part") as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= _CONCURRENT_PARTS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _n_rows(count: PartCount, *, training_only: bool) -> int:
    return count.n_training if training_only else count.n_features


def _part_rows(chunk: Chunk, count: PartCount) -> Features:
    store = open_store(chunk.output, chunk.options)
    path = layout.part_path(chunk.output, layout.FEATURES, count.index)
    part = read_vectors(store, path, "features")
    if not chunk.training_only:
        return part.vectors
    rows: Features = part.vectors[
        np.asarray(pc.is_in(part.keys["split"], pa.array(TRAINING_SPLITS)))
    ]
    return rows


def first_rows(chunk: Chunk) -> Features:
    """Read the rows of the first part of a chunk, (n_rows, n_features) float32."""
    return _part_rows(chunk, chunk.counts[0])
