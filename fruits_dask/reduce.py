"""Vectors to scores: principal component analysis over the stored parts, the home of dask-ml."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zipfile import BadZipFile

import dask.array as da
import dask.bag as db
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from dask import delayed
from numpy.typing import NDArray

from . import layout
from .errors import ReduceError, ResultError, StorageError
from .features import read_vectors, vector_table, write_table
from .records import TRAINING_SPLITS, PartCount, StoreOptions
from .storage import Store, open_store

logger = logging.getLogger(__name__)

Matrix = NDArray[np.float64]

# Rows of one chunk: enough that its QR decomposition pays for the task.
_CHUNK_ROWS = 1024
# Rows of one batch of IncrementalPCA. Each batch but the first loses a little accuracy, because
# only the kept components of the earlier ones enter it. 8,192 x 1,280 float64 are 84 MB.
_BATCH_ROWS = 8192
_ALL_SAME = (
    "all {n_samples} images have the same features, so there is no variance to explain; check that "
    "the input holds different photos"
)
# Fitting this many times the wanted components makes that loss negligible.
_OVERSAMPLING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PcaModel:
    """A fitted principal component analysis; what ``pca/model.npz`` holds."""

    components: Matrix
    """(k, d) orthonormal rows, strongest first; the largest element of each is positive."""
    mean: Matrix
    """(d,) mean of the rows it was fitted on."""
    explained_variance: Matrix
    """(k,) variance along each component, divisor n - 1."""
    explained_variance_ratio: Matrix
    """(k,) share of the total variance."""
    singular_values: Matrix
    """(k,) of the centred rows."""
    n_samples: int
    """Rows it was fitted on."""

    def transform(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Project rows.

        Parameters
        ----------
        vectors : ndarray, (n_rows, d) float32
            Features.

        Returns
        -------
        ndarray, (n_rows, k) float32
            Scores.
        """
        return ((vectors - self.mean) @ self.components.T).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Which rows of which parts make one chunk of the matrix."""

    counts: tuple[PartCount, ...]
    training_only: bool

    @property
    def n_rows(self) -> int:
        return sum(c.n_training if self.training_only else c.n_features for c in self.counts)


def fit_pca(
    output: str,
    options: StoreOptions,
    counts: list[PartCount],
    *,
    components: float,
    on_batch: Callable[[int], None] = lambda n_done: None,
) -> PcaModel:
    """Fit dask-ml's IncrementalPCA on the stored features.

    It is fitted on the training split alone when there is one. The work runs on the default Dask
    scheduler, batch after batch; only one batch is in memory.

    Parameters
    ----------
    output : str
        Address of a result with features.
    options : StoreOptions
        How to reach it.
    counts : list of PartCount
        Row counts of all parts; known chunks are what dask-ml needs.
    components : int or float
        How many, or the share of the variance that they must explain.
    on_batch : callable
        Told the number of batches that are done.

    Returns
    -------
    PcaModel
        With as many components as asked for, or as many as the rows allow.

    Raises
    ------
    ReduceError
        If there are fewer than two rows, or all rows are equal.

    References
    ----------
    Ross, Lim, Lin and Yang, "Incremental Learning for Robust Visual Tracking", IJCV 2008: the
    method of IncrementalPCA. Demmel, Grigori, Hoemmen and Langou, "Communication-optimal parallel
    and sequential QR and LU factorizations", 2012: tall-and-skinny QR, its solver here.
    """
    chunks = _plan_chunks(counts)
    n_samples = sum(chunk.n_rows for chunk in chunks)
    if n_samples < 2:  # noqa: PLR2004 - a variance needs two rows
        raise ReduceError(
            f"a principal component analysis needs at least 2 images, found {n_samples} with "
            f"features{' in the training split' if any(c.n_training for c in counts) else ''}; "
            "the features are stored, look into failures/ or give more images"
        )
    first_row = _first_row(open_store(output, options), output, chunks[0])
    n_features = len(first_row)
    # Centred rows span one dimension less than there are rows.
    largest = min(n_samples - 1, n_features)
    wanted = min(int(components), largest) if components >= 1 else largest
    n_fit = min(_OVERSAMPLING * wanted, largest)
    batches = _plan_batches(chunks, n_fit)
    estimator = _primed_estimator(first_row, n_fit)
    for n_done, batch in enumerate(batches):
        on_batch(n_done)
        matrix = _matrix(output, options, batch, n_features, skip=int(n_done == 0))
        if len(batches) == 1 and not (matrix != first_row).any().compute():
            raise ReduceError(_ALL_SAME.format(n_samples=n_samples))  # before dask-ml divides by 0
        estimator.partial_fit(matrix)
    on_batch(len(batches))
    return _select(_model(estimator, n_samples), components)


def _plan_chunks(counts: list[PartCount]) -> list[_Rows]:
    """Join neighbouring parts to chunks of at least `_CHUNK_ROWS` rows."""
    training_only = any(count.n_training for count in counts)
    chunks: list[_Rows] = []
    pending: tuple[PartCount, ...] = ()
    for count in sorted(counts, key=lambda c: c.index):
        if count.n_training if training_only else count.n_features:
            pending = (*pending, count)
        rows = _Rows(counts=pending, training_only=training_only)
        if rows.n_rows >= _CHUNK_ROWS:
            chunks.append(rows)
            pending = ()
    if pending:
        chunks.append(_Rows(counts=pending, training_only=training_only))
    return chunks


def _plan_batches(chunks: list[_Rows], n_fit: int) -> list[list[_Rows]]:
    """Group chunks to batches of more rows than components are fitted, as dask-ml demands."""
    least = max(_BATCH_ROWS, n_fit + 1)
    batches: list[list[_Rows]] = [[]]
    for chunk in chunks:
        if sum(c.n_rows for c in batches[-1]) >= least:
            batches.append([])
        batches[-1].append(chunk)
    if len(batches) > 1 and sum(c.n_rows for c in batches[-1]) <= n_fit:
        rest = batches.pop()
        batches[-1] += rest
    return batches


def _matrix(
    output: str, options: StoreOptions, batch: list[_Rows], n_features: int, *, skip: int
) -> da.Array:
    """Build the array of a batch, without its first `skip` rows, held by the workers."""
    load = delayed(_load_rows, pure=False)
    blocks = [
        da.from_delayed(
            load(output, options, chunk), shape=(chunk.n_rows, n_features), dtype=np.float64
        )
        for chunk in batch
    ]
    # Held, because partial_fit computes twice and would read every part twice.
    return da.concatenate(blocks)[skip:].persist()


def _load_rows(output: str, options: StoreOptions, chunk: _Rows) -> Matrix:
    store = open_store(output, options)
    blocks = [
        _part_rows(store, output, count.index, training_only=chunk.training_only)
        for count in chunk.counts
    ]
    rows = np.concatenate(blocks)
    if len(rows) != chunk.n_rows:
        raise ResultError(
            f"{output} changed while it was read: {len(rows)} rows of features, expected "
            f"{chunk.n_rows}; run again"
        )
    return rows


def _part_rows(store: Store, output: str, index: int, *, training_only: bool) -> Matrix:
    part = read_vectors(store, layout.part_path(output, layout.FEATURES, index), "features")
    vectors = part.vectors
    if training_only:
        vectors = vectors[np.asarray(pc.is_in(part.keys["split"], pa.array(TRAINING_SPLITS)))]
    return np.asarray(vectors, dtype=np.float64)


def _first_row(store: Store, output: str, chunk: _Rows) -> Matrix:
    index = chunk.counts[0].index
    first: Matrix = _part_rows(store, output, index, training_only=chunk.training_only)[0]
    return first


def _primed_estimator(first_row: Matrix, n_fit: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Start IncrementalPCA from the exact state after one row.

    From no row at all, dask-ml 2025.1.0 divides zero by zero in its running mean, and the log of
    every worker says so. After one row the mean is that row and all variances are zero.
    """
    from dask_ml.decomposition import IncrementalPCA  # noqa: PLC0415 - takes 2 s to import

    estimator = IncrementalPCA(
        n_components=n_fit, svd_solver="tsqr", iterated_power=4, random_state=0
    )
    estimator.n_samples_seen_ = 1
    estimator.mean_ = first_row
    estimator.var_ = np.zeros_like(first_row)
    estimator.components_ = np.zeros((n_fit, len(first_row)))
    estimator.singular_values_ = np.zeros(n_fit)
    return estimator


def _model(estimator, n_samples: int) -> PcaModel:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Take over what was fitted, with signs that do not depend on the solver."""
    components = np.asarray(estimator.components_, dtype=np.float64)
    largest = np.abs(components).argmax(axis=1)
    signs = np.where(np.take_along_axis(components, largest[:, None], axis=1) < 0, -1.0, 1.0)
    return PcaModel(
        components=components * signs,
        mean=np.asarray(estimator.mean_, dtype=np.float64),
        explained_variance=np.asarray(estimator.explained_variance_, dtype=np.float64),
        explained_variance_ratio=np.asarray(estimator.explained_variance_ratio_, dtype=np.float64),
        singular_values=np.asarray(estimator.singular_values_, dtype=np.float64),
        n_samples=n_samples,
    )


def _select(model: PcaModel, components: float) -> PcaModel:
    """Keep the wanted components, without those that are only rounding."""
    values = model.singular_values
    scale = float(np.abs(model.mean).max()) * np.sqrt(model.n_samples)
    tolerance = max(values[0], scale) * max(model.components.shape) * np.finfo(np.float64).eps
    rank = int((values > tolerance).sum())
    if rank == 0:
        raise ReduceError(_ALL_SAME.format(n_samples=model.n_samples))
    wanted = components
    if components < 1:
        reached = np.cumsum(model.explained_variance_ratio[:rank])
        wanted = int(np.searchsorted(reached, components)) + 1
    k = min(int(wanted), rank)
    if k < wanted:
        logger.warning(
            "%d components are all that the features of %d images allow; %d were asked for",
            k,
            model.n_samples,
            wanted,
        )
    return _truncate(model, k)


def _truncate(model: PcaModel, k: int) -> PcaModel:
    return PcaModel(
        components=model.components[:k],
        mean=model.mean,
        explained_variance=model.explained_variance[:k],
        explained_variance_ratio=model.explained_variance_ratio[:k],
        singular_values=model.singular_values[:k],
        n_samples=model.n_samples,
    )


def write_model(store: Store, output: str, model: PcaModel) -> None:
    """Store a model as ``pca/model.npz``, plain arrays without pickle."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        components=model.components,
        mean=model.mean,
        explained_variance=model.explained_variance,
        explained_variance_ratio=model.explained_variance_ratio,
        singular_values=model.singular_values,
        n_samples=np.int64(model.n_samples),
    )
    store.write(layout.join(output, layout.PCA_MODEL), buffer.getvalue())


def read_model(store: Store, output: str) -> PcaModel:
    """Read ``pca/model.npz``.

    Raises
    ------
    ResultError
        If it is damaged.
    """
    path = layout.join(output, layout.PCA_MODEL)
    try:
        with np.load(io.BytesIO(store.read(path)), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return PcaModel(**{**arrays, "n_samples": int(arrays["n_samples"])})
    except StorageError:
        raise
    except (ValueError, TypeError, KeyError, OSError, EOFError, BadZipFile) as exc:
        raise ResultError(f"{path} is damaged ({exc}); run `reduce` again") from exc


def scores_bag(output: str, options: StoreOptions, indices: list[int]) -> db.Bag | None:
    """Describe the projection of all stored parts as a bag; nothing is computed.

    Parameters
    ----------
    output : str
        Address of a result with features and a model.
    options : StoreOptions
        How to reach it.
    indices : list of int
        Numbers of the parts.

    Returns
    -------
    dask.bag.Bag or None
        Of the number of rows of each part, one in each partition of the bag; None for no part.
    """
    if not indices:  # dask.bag knows no empty bag
        return None
    return db.from_sequence(indices, npartitions=len(indices)).map(
        lambda index: write_scores(output, options, index)
    )


def write_scores(output: str, options: StoreOptions, index: int) -> int:
    """Project one stored part and store its scores; return the number of rows."""
    store = open_store(output, options)
    path = layout.part_path(output, layout.FEATURES, index)
    part = read_vectors(store, path, "features")
    scores = read_model(store, output).transform(part.vectors)
    table = vector_table(part.keys, scores, "scores", part.metadata)
    write_table(store, layout.part_path(output, layout.SCORES, index), table)
    return len(table)


def iterate_scores(store: Store, output: str, indices: list[int]) -> Iterator[pa.Table]:
    """Read the scores part by part as flat tables.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.
    indices : list of int
        Numbers of the parts.

    Yields
    ------
    pyarrow.Table
        Columns path, label, split, pc_001 .. pc_k.
    """
    for index in indices:
        part = read_vectors(store, layout.part_path(output, layout.SCORES, index), "scores")
        table = part.keys.replace_schema_metadata(None)
        for number, column in enumerate(part.vectors.T, start=1):
            table = table.append_column(f"pc_{number:03d}", pa.array(column))
        yield table
