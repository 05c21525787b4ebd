"""Rows for tests of the reduction, and results that hold them.

decaying                rows like those of real features
store_parts             rows as parts of a result, and their counts
fit                     a model of such a result
exact, captured         what scikit-learn says of the same rows
small_batches           makes few rows many batches
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from fruits_dask import layout
from fruits_dask.features import count_part, vector_table, write_failures, write_table
from fruits_dask.records import PartCount
from fruits_dask.reduce import PcaModel, Reducer, fit_pca, incremental, rows
from fruits_dask.storage import LocalStore
from jobs import OPTIONS

STORE = LocalStore()
REDUCERS: tuple[Reducer, ...] = ("incremental", "exact")

Rows = NDArray[np.float32]
Splits = Sequence[str | None]


def decaying(n_rows: int, n_features: int, *, power: float = 1.0, seed: int = 0) -> Rows:
    """Rows with variances that fall like those of real features, and a mean far from 0."""
    random = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(random.normal(size=(n_features, n_features)))
    scales = np.arange(1, n_features + 1) ** -power
    table = random.normal(size=(n_rows, n_features)) * scales @ basis.T
    shifted: Rows = (table + random.uniform(0, 3, n_features)).astype(np.float32)
    return shifted


def store_parts(
    output: Path, rows: Rows, *, size: int = 100, splits: Splits | None = None
) -> list[PartCount]:
    """Store rows as parts of a result, and count them."""
    splits = splits or [None] * len(rows)
    for index, start in enumerate(range(0, len(rows), size)):
        part = slice(start, start + size)
        keys = pa.table(
            {
                "path": [f"/in/{number:05d}.jpg" for number in range(len(rows))[part]],
                "label": pa.array(["fruit"] * len(rows[part]), pa.string()),
                "split": pa.array(splits[part], pa.string()),
            }
        )
        write_failures(STORE, str(output), index, [])
        path = layout.part_path(str(output), layout.FEATURES, index)
        write_table(STORE, path, vector_table(keys, rows[part], "features", {"model": "none"}))
    n_parts = -(-len(rows) // size)
    return [count_part(STORE, str(output), index) for index in range(n_parts)]


def fit(
    output: Path,
    rows: Rows,
    *,
    components: float,
    reducer: Reducer = "incremental",
    **stored: object,
) -> PcaModel:
    """Store rows and fit a model on them."""
    counts = store_parts(output, rows, **stored)  # type: ignore[arg-type]
    return fit_pca(str(output), OPTIONS, counts, components=components, reducer=reducer)


def exact(rows: Rows, k: int) -> PCA:
    """Fit scikit-learn's exact PCA."""
    return PCA(n_components=k, svd_solver="full").fit(rows.astype(np.float64))


def captured(model: PcaModel, rows: Rows) -> float:
    """Variance of the rows in the space of the components, whatever the model says of itself."""
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    return float(((centred @ model.components.T) ** 2).sum() / (len(rows) - 1))


def small_batches(monkeypatch: pytest.MonkeyPatch, *, chunk: int = 128, batch: int = 512) -> None:
    """Cut few rows into many chunks and batches."""
    monkeypatch.setattr(rows, "_LEAST_ROWS", 1)
    monkeypatch.setattr(rows, "_MOST_ROWS", chunk)
    monkeypatch.setattr(incremental, "_BATCH_ROWS", batch)
