"""Vectors to scores: principal component analysis over the stored parts.

`fit_pca` gives the same kind of model with either reducer: ``incremental`` is dask-ml's
IncrementalPCA, ``exact`` the eigenvectors of the covariance that the workers gather in one pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Literal

from ..errors import ReduceError
from ..records import PartCount, StoreOptions
from . import exact, incremental
from .model import PcaModel, read_model, write_model
from .rows import plan_chunks
from .scores import scores_bag, write_scores_csv

__all__ = [
    "PcaModel",
    "Reducer",
    "fit_pca",
    "prepare",
    "prepare_worker",
    "read_model",
    "scores_bag",
    "write_model",
    "write_scores_csv",
]

logger = logging.getLogger(__name__)

Reducer = Literal["incremental", "exact"]


def prepare(reducer: Reducer = "incremental") -> None:
    """Import what `fit_pca` needs, up to 2 s; may be called in a thread beside other work.

    Parameters
    ----------
    reducer : str
        ``incremental`` or ``exact``.
    """
    if reducer == "incremental":
        incremental.prepare()


def prepare_worker(reducer: Reducer = "incremental") -> None:
    """Import what the tasks of `fit_pca` need on a worker, up to 0.5 s. See `prepare`."""
    (incremental if reducer == "incremental" else exact).prepare_worker()


def fit_pca(
    output: str,
    options: StoreOptions,
    counts: Iterable[PartCount],
    *,
    components: float,
    reducer: Reducer = "incremental",
    on_batch: Callable[[int], None] = lambda n_done: None,
) -> PcaModel:
    """Fit a PCA on the stored features.

    It is fitted on the training split alone when there is one. The work runs on the default Dask
    scheduler; the same rows give the same model whatever the number of workers.

    Parameters
    ----------
    output : str
        Address of a result with features.
    options : StoreOptions
        How to reach it.
    counts : iterable of PartCount
        Row counts of all parts.
    components : int or float
        How many, or the share of the variance that they must explain.
    reducer : str
        ``incremental`` or ``exact``.
    on_batch : callable
        Told the number of batches that are done.

    Returns
    -------
    PcaModel
        With as many components as asked for, or as many as the rows allow, and with its
        `exact_share` measured.

    Raises
    ------
    ReduceError
        If there are fewer than two rows, or all rows are equal.
    """
    chunks = plan_chunks(output, options, counts)
    n_samples = sum(chunk.n_rows for chunk in chunks)
    if n_samples < 2:  # noqa: PLR2004 - a variance needs two rows
        raise ReduceError(
            f"a principal component analysis needs at least 2 images, found {n_samples} with "
            f"features{' in the training split' if any(c.training_only for c in chunks) else ''}; "
            "the features are stored, look into failures/ or give more images"
        )
    fit = incremental.fit_incremental if reducer == "incremental" else exact.fit_exact
    model = fit(chunks, components, on_batch)
    k = len(model.components)
    if k < components:
        logger.warning(
            "%d components are all that the features of %d images allow; %d were asked for",
            k,
            n_samples,
            components,
        )
    return model
