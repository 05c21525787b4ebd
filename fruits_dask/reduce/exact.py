"""The exact reducer: eigenvectors of the covariance, which the workers gather in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from dask import delayed

from ..tasks import bag_of
from .model import Matrix, PcaModel, all_same, keep_components, turn_positive
from .moments import Moments, exact_share, merge_all
from .rows import Chunk, load_chunk


def prepare_worker() -> None:
    """Import what takes time to import on a worker; where the run is, nothing does."""
    import scipy.linalg  # noqa: F401, PLC0415


def fit_exact(
    chunks: Sequence[Chunk], components: float, on_batch: Callable[[int], None]
) -> PcaModel:
    """Fit an exact PCA in one pass over the rows.

    Parameters
    ----------
    chunks : sequence of Chunk
        The rows; at least two.
    components : int or float
        How many, or the share of the variance that they must explain.
    on_batch : callable
        Told 0 at the start and 1 at the end: all rows are one batch.

    Returns
    -------
    PcaModel
        Equal to scikit-learn's ``PCA(svd_solver="full")`` up to rounding.

    Raises
    ------
    ReduceError
        If all rows are equal.
    """
    on_batch(0)
    bag = bag_of(chunks, load_chunk)
    # By a worker: it computes with one thread, as fast as several here do, and sends a tenth.
    model: PcaModel = delayed(decompose)(merge_all(bag), components).compute()
    on_batch(1)
    return model


def decompose(moments: Moments, components: float) -> PcaModel:
    """Turn moments into a model.

    Parameters
    ----------
    moments : Moments
        Of at least two rows.
    components : int or float
        How many, or the share of the variance that they must explain.

    Returns
    -------
    PcaModel
        With as many components as asked for, or as many as the rows allow.

    Raises
    ------
    ReduceError
        If all rows are equal.
    """
    if moments.total_variance == 0:
        raise all_same(moments.n_rows)
    n_features = len(moments.mean)
    # Centred rows span one dimension less than there are rows.
    largest = min(moments.n_rows - 1, n_features)
    wanted = min(int(components), largest) if components >= 1 else largest
    ascending, vectors = _strongest(moments.scatter, wanted)
    eigenvalues = ascending[::-1]
    # An eigenvalue below this is rounding of the largest one.
    rank = int((eigenvalues > eigenvalues[0] * n_features * np.finfo(np.float64).eps).sum())
    squares = np.maximum(eigenvalues, 0)
    variances = squares / (moments.n_rows - 1)
    model = PcaModel(
        components=turn_positive(vectors.T[::-1]),
        mean=moments.mean,
        explained_variance=variances,
        explained_variance_ratio=variances / moments.total_variance,
        singular_values=np.sqrt(squares),
        n_samples=moments.n_rows,
    )
    kept = keep_components(model, components, rank=rank)
    return replace(kept, exact_share=exact_share(moments, kept.components, ascending))


def _strongest(scatter: Matrix, k: int) -> tuple[Matrix, Matrix]:
    """Compute the k largest eigenvalues, ascending, and their eigenvectors as columns."""
    from scipy.linalg import eigh  # noqa: PLC0415 - takes time to import

    d = len(scatter)
    values, vectors = eigh(scatter, subset_by_index=[d - k, d - 1])
    return values, vectors
