"""The incremental reducer: dask-ml's IncrementalPCA, batch after batch. Its only home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import dask
import dask.bag as db
import numpy as np
from dask import delayed
from dask.delayed import Delayed

from ..tasks import bag_of
from .model import Matrix, PcaModel, all_same, keep_components, turn_positive
from .moments import Moments, captured, eigenvalues, exact_share, merge_all
from .rows import Chunk, first_rows, load_chunk

if TYPE_CHECKING:
    import dask.array as da

# Rows of one batch, which the workers hold together: 168 MB as float64 with 1,280 columns, and once
# more centred. Each batch but the first loses a little accuracy, because only the kept components
# of the earlier ones enter it.
_BATCH_ROWS = 16_384
# Fitting this many times the wanted components, and at least this many more, makes that loss and
# that of the randomized solver negligible.
_OVERSAMPLING = 2
_SPARE = 100
# The randomized solver pays as long as it looks for fewer directions than this share of all.
_RANDOMIZED_SHARE = 0.5
# Each power iteration makes the solver more accurate and blinder: directions whose singular value
# is less than eps ** (1 / (2 n + 1)) of the largest are lost in rounding, because dask.array does
# not orthonormalize in between. With two that is 1 in 1,400, or 5e-7 of the variance.
_POWER_ITERATIONS = 2


def prepare() -> None:
    """Import what takes time to import."""
    import dask_ml.decomposition  # noqa: F401, PLC0415


def prepare_worker() -> None:
    """Import what takes time to import on a worker, where dask-ml is not needed."""
    import dask.array  # noqa: F401, PLC0415


def fit_incremental(
    chunks: Sequence[Chunk], components: float, on_batch: Callable[[int], None]
) -> PcaModel:
    """Fit dask-ml's IncrementalPCA; only one batch of rows is in memory.

    Parameters
    ----------
    chunks : sequence of Chunk
        The rows; at least two.
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
        If all rows are equal.

    References
    ----------
    Ross, Lim, Lin and Yang, "Incremental Learning for Robust Visual Tracking", IJCV 2008: the
    method of IncrementalPCA. Halko, Martinsson and Tropp, "Finding structure with randomness",
    SIAM Review 53(2), 2011: its solver here. Demmel, Grigori, Hoemmen and Langou,
    "Communication-optimal parallel and sequential QR and LU factorizations", 2012: its solver for
    many components.
    """
    # By a worker, like all other rows: this machine may have other ways to the store.
    first = delayed(first_rows)(chunks[0]).compute().astype(np.float64)
    n_samples = sum(chunk.n_rows for chunk in chunks)
    # Centred rows span one dimension less than there are rows.
    largest = min(n_samples - 1, first.shape[1])
    wanted = min(int(components), largest) if components >= 1 else largest
    n_fit = min(max(_OVERSAMPLING * wanted, wanted + _SPARE), largest)
    batches = _plan_batches(chunks, n_fit)
    estimator = _primed_estimator(first[0], n_fit, _solver(batches, n_fit, first.shape[1]))
    is_flat = bool((first == first[0]).all())
    moments, spectrum = _fit_batches(estimator, batches, on_batch, is_flat=is_flat)
    model = _measured(estimator, moments)
    kept = keep_components(model, components, rank=_rank(estimator, n_samples))
    return replace(kept, exact_share=exact_share(moments, kept.components, spectrum))


def _plan_batches(chunks: Sequence[Chunk], n_fit: int) -> list[list[Chunk]]:
    """Group chunks to batches of more rows than components are fitted, as dask-ml demands."""
    least = max(_BATCH_ROWS, n_fit + 1)
    batches: list[list[Chunk]] = [[]]
    for chunk in chunks:
        if _n_rows(batches[-1]) >= least:
            batches.append([])
        batches[-1].append(chunk)
    if len(batches) > 1 and _n_rows(batches[-1]) <= n_fit:
        rest = batches.pop()
        batches[-1] += rest
    return batches


def _n_rows(batch: Sequence[Chunk]) -> int:
    return sum(chunk.n_rows for chunk in batch)


def _solver(batches: Sequence[Sequence[Chunk]], n_fit: int, n_features: int) -> str:
    """Choose the solver: random directions where a few are wanted, all of them otherwise."""
    smallest = min(n_features, *(_n_rows(batch) for batch in batches))
    return "randomized" if n_fit <= _RANDOMIZED_SHARE * smallest else "tsqr"


def _primed_estimator(origin: Matrix, n_fit: int, solver: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Start IncrementalPCA from the exact state after one row.

    From no row at all, dask-ml 2025.1.0 divides zero by zero in its running mean, and the log of
    every worker says so. After one row the mean is that row and all variances are zero.
    """
    from dask_ml.decomposition import IncrementalPCA  # noqa: PLC0415 - takes 2 s to import

    estimator = IncrementalPCA(
        n_components=n_fit, svd_solver=solver, iterated_power=_POWER_ITERATIONS, random_state=0
    )
    estimator.n_samples_seen_ = 1
    estimator.mean_ = origin
    estimator.var_ = np.zeros_like(origin)
    estimator.components_ = np.zeros((n_fit, len(origin)))
    estimator.singular_values_ = np.zeros(n_fit)
    return estimator


def _fit_batches(  # type: ignore[no-untyped-def]
    estimator,  # noqa: ANN001
    batches: Sequence[Sequence[Chunk]],
    on_batch: Callable[[int], None],
    *,
    is_flat: bool,
) -> tuple[Moments, Matrix]:
    """Show all batches to the estimator; gather the moments of the same rows and their spectrum.

    `is_flat` says that all rows that are known before are equal.
    """
    n_features = len(estimator.mean_)
    moments: Delayed | None = None
    for n_done, batch in enumerate(batches):
        on_batch(n_done)
        # Held, because partial_fit computes twice and the moments need them too.
        rows = cast("db.Bag", bag_of(batch, _load)).persist()
        of_batch = merge_all(rows).to_delayed()
        merged = of_batch if moments is None else delayed(Moments.merge)(moments, of_batch)
        moments = merged.persist()
        if n_done == len(batches) - 1:
            spectrum = delayed(eigenvalues)(moments).persist()  # beside the last fit
        is_flat = is_flat and moments.total_variance.compute() == 0
        if is_flat:  # dask-ml would divide 0 by 0; the primed state is right, but for the count
            estimator.n_samples_seen_ = sum(_n_rows(b) for b in batches[: n_done + 1])
        else:
            estimator.partial_fit(_matrix(rows, batch, n_features)[int(n_done == 0) :])
        del rows  # before the next ones are read
    if is_flat:
        raise all_same(estimator.n_samples_seen_)
    on_batch(len(batches))
    total, values = dask.compute(moments, spectrum)
    return total, values


def _load(chunk: Chunk) -> Matrix:
    return load_chunk(chunk).astype(np.float64)


def _matrix(rows: db.Bag, batch: Sequence[Chunk], n_features: int) -> da.Array:
    """Describe chunks that the workers hold as one array of known shape, as dask-ml needs it."""
    import dask.array as da  # noqa: PLC0415 - takes 0.5 s to import

    blocks = [
        da.from_delayed(block[0], shape=(chunk.n_rows, n_features), dtype=np.float64)
        for block, chunk in zip(rows.to_delayed(), batch, strict=True)
    ]
    return da.concatenate(blocks)


def _rank(estimator, n_samples: int) -> int:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Count the components that are more than rounding."""
    values = np.asarray(estimator.singular_values_)
    scale = float(np.abs(estimator.mean_).max()) * np.sqrt(n_samples)
    tolerance = max(values[0], scale) * max(estimator.components_.shape) * np.finfo(np.float64).eps
    return int((values > tolerance).sum())


def _measured(estimator, moments: Moments) -> PcaModel:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Take over the components, with the variance that they have.

    What dask-ml says of it is of the rows that it kept: after several batches too little.
    """
    components = turn_positive(np.asarray(estimator.components_, dtype=np.float64))
    squares = np.maximum(captured(moments, components), 0)
    order = np.argsort(-squares, kind="stable")
    variances = squares[order] / (moments.n_rows - 1)
    return PcaModel(
        components=components[order],
        mean=moments.mean,
        explained_variance=variances,
        explained_variance_ratio=variances / moments.total_variance,
        singular_values=np.sqrt(squares[order]),
        n_samples=moments.n_rows,
    )
