"""What the page tells, read from a stored result: a bounded sample, and counts of the rest."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .. import layout
from ..errors import NotFoundError, ResultError, StorageError
from ..features import part_indices
from ..records import Failure
from ..reduce import PcaModel, read_model
from ..results import read_record
from ..storage import ReadAhead, Store

# More points hide each other, and 1,500 pictures make a page of about 4 MB.
MAX_POINTS = 1500
MAX_EXAMPLES = 50
# Without pictures the points come from a few parts; each is read whole for a handful of its rows.
_MAX_UNPICTURED_PARTS = 16
# Parts under way at a time, so also in memory: a part of scores has up to about 10 MB.
_CONCURRENT_READS = 8
# Counting label x split of a longer manifest costs too many requests on S3; run.json has the sums.
_MAX_CROSSED_ROWS = 2_000_000

Cell = tuple[str | None, str | None]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One photo of the sample."""

    path: str
    """Address of the image."""
    label: str | None
    """Name of its fruit, if known."""
    split: str | None
    """Split that it belongs to, if any."""
    scores: tuple[float, ...]
    """Its first two scores, or the only one."""
    jpeg: bytes | None
    """A small picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureDigest:
    """All failures counted, some of them shown."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    """(stage, error) -> images, most frequent first."""
    examples: list[Failure] = field(default_factory=list)
    """At most `MAX_EXAMPLES`, some of each kind, sorted by path."""

    @property
    def n_failures(self) -> int:
        """Images without features."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Everything that the page tells."""

    output: str
    """Address of the result."""
    run: dict[str, Any]
    """Content of run.json."""
    model: PcaModel | None
    """The principal components, if there are any yet."""
    sample: list[Point]
    """Photos to plot."""
    failures: FailureDigest
    """Images without features."""
    cells: dict[Cell, int] | None
    """(label, split) -> listed images; None when they were not counted together."""
    has_dask_report: bool
    """Dask's own performance report is stored beside this one."""

    def stage(self, name: str) -> dict[str, Any]:
        """Return what run.json says of a stage, or of the workers; nothing when it has not run."""
        found = self.run.get("stages", {}).get(name) or self.run.get(name)
        return found if isinstance(found, dict) else {}


def read_contents(store: Store, output: str) -> Contents:
    """Read what the page needs.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.

    Returns
    -------
    Contents
        Of bounded size, however large the result is.

    Raises
    ------
    ResultError
        If there is no result, or a part of it is damaged.
    """
    run = read_record(store, output)
    if run is None:
        raise ResultError(
            f"{output} holds no {layout.RUN_JSON}: nothing to report, use `run` first"
        )
    stages = run.get("stages", {})
    return Contents(
        output=output,
        run=run,
        model=_model(store, output),
        sample=read_sample(store, output),
        failures=read_failures(store, output, stages.get("extract", {}).get("n_failures")),
        cells=_count_cells(store, output, stages.get("plan", {})),
        has_dask_report=store.exists(layout.join(output, layout.DASK_REPORT)),
    )


def read_sample(store: Store, output: str, limit: int = MAX_POINTS) -> list[Point]:
    """Choose photos to plot: those with a thumbnail, else some of a few parts.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.
    limit : int
        At most this many, spread evenly over the rows.

    Returns
    -------
    list of Point
        In the order of the manifest.
    """
    scored = part_indices(store, output, layout.SCORES)
    pictured = sorted({*scored} & {*part_indices(store, output, layout.THUMBNAILS)})
    if points := _thin(_pictured_points(store, output, pictured), limit):
        return points
    few = _spread(scored, _MAX_UNPICTURED_PARTS)
    return _thin(_plain_points(store, output, few), limit)


def read_failures(store: Store, output: str, n_failures: int | None) -> FailureDigest:
    """Count the failures and keep examples of every kind.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.
    n_failures : int or None
        How many there are, if that is known: no part is read after the last of them.

    Returns
    -------
    FailureDigest
        Counts and examples.
    """
    indices = part_indices(store, output, layout.FAILURES) if n_failures != 0 else []
    paths = [layout.part_path(output, layout.FAILURES, index) for index in indices]
    kept: dict[tuple[str, str], list[Failure]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for table in _read_tables(store, paths):
        for row in table.to_pylist():
            kind = (row["stage"], row["error"])
            counts[kind] += 1
            if counts[kind] <= MAX_EXAMPLES:
                kept.setdefault(kind, []).append(Failure(**row))
        if counts.total() == n_failures:
            break
    return FailureDigest(counts=dict(counts.most_common()), examples=_examples(kept))


def _examples(kept: Mapping[tuple[str, str], list[Failure]]) -> list[Failure]:
    """Take from every kind in turn, so that a frequent one does not hide the others."""
    turns = chain.from_iterable(zip_longest(*kept.values()))
    chosen = islice((failure for failure in turns if failure is not None), MAX_EXAMPLES)
    return sorted(chosen, key=lambda failure: failure.path)


def _model(store: Store, output: str) -> PcaModel | None:
    try:
        return read_model(store, output)
    except NotFoundError:
        return None


def _count_cells(store: Store, output: str, plan: Mapping[str, Any]) -> dict[Cell, int] | None:
    path = layout.join(output, layout.MANIFEST)
    if plan.get("n_images", 0) > _MAX_CROSSED_ROWS or not store.exists(path):
        return None
    cells: Counter[Cell] = Counter()
    with store.open(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(columns=["label", "split"]):
            groups = pa.table(batch).group_by(["label", "split"]).aggregate([([], "count_all")])
            for row in groups.to_pylist():
                cells[row["label"], row["split"]] += row["count_all"]
    return dict(cells)


def _pictured_points(store: Store, output: str, indices: list[int]) -> Iterator[Point]:
    kinds = (layout.THUMBNAILS, layout.SCORES)
    paths = [layout.part_path(output, kind, index) for index in indices for kind in kinds]
    tables = _read_tables(store, paths)
    for pictures, scores in zip(tables, tables, strict=True):  # one iterator: they alternate
        jpegs = dict(zip(*(pictures[name].to_pylist() for name in ("path", "jpeg")), strict=True))
        wanted = scores.filter(pc.is_in(scores["path"], pictures["path"].combine_chunks()))
        yield from _points(wanted, jpegs)


def _plain_points(store: Store, output: str, indices: list[int]) -> Iterator[Point]:
    paths = [layout.part_path(output, layout.SCORES, index) for index in indices]
    for scores in _read_tables(store, paths):
        rows = _spread(range(len(scores)), -(-MAX_POINTS // len(paths)))
        yield from _points(scores.take(pa.array(rows, pa.int64())), {})


def _points(scores: pa.Table, jpegs: Mapping[str, bytes]) -> Iterator[Point]:
    columns = (scores[name].to_pylist() for name in ("path", "label", "split", "scores"))
    for path, label, split, vector in zip(*columns, strict=True):
        yield Point(
            path=path, label=label, split=split, scores=tuple(vector[:2]), jpeg=jpegs.get(path)
        )


def _thin(points: Iterable[Point], limit: int) -> list[Point]:
    """Keep at most `limit`, spread evenly, without holding more than twice as many."""
    kept: list[Point] = []
    step = 1
    for number, point in enumerate(points):
        if number % step == 0:
            kept.append(point)
        if len(kept) == 2 * limit:
            kept, step = kept[::2], 2 * step
    return _spread(kept, limit)


def _spread(items: Sequence[_T], limit: int) -> list[_T]:
    """Take at most `limit` items at even distances, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).astype(int)]


def _read_tables(store: Store, paths: Iterable[str]) -> Iterator[pa.Table]:
    with ReadAhead(store, paths, n_concurrent=_CONCURRENT_READS) as reads:
        for path, data in reads:
            yield _parse(path, data)


def _parse(path: str, data: bytes | StorageError) -> pa.Table:
    if isinstance(data, StorageError):
        raise data
    try:
        return pq.ParquetFile(io.BytesIO(data)).read()
    except (pa.ArrowException, OSError) as exc:
        raise ResultError(f"{path} is damaged ({exc}); remove it and run again") from exc
