"""A fitted principal component analysis: what it is, how much of it to keep, and its file."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields, replace
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from .. import layout
from ..errors import ReduceError, ResultError, StorageError
from ..storage import Store

Matrix = NDArray[np.float64]

_SCALARS = ("n_samples", "exact_share")


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
    exact_share: float | None = None
    """What the components keep of the variance that k components could keep at best, 0 to 1; None
    if it was not measured."""

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


def turn_positive(components: Matrix) -> Matrix:
    """Choose signs that do not depend on the solver: the largest element of each row is positive.

    Parameters
    ----------
    components : ndarray, (k, d) float64
        Rows whose signs are arbitrary.

    Returns
    -------
    ndarray, (k, d) float64
        The same rows, some of them turned.
    """
    largest = np.abs(components).argmax(axis=1)
    values = np.take_along_axis(components, largest[:, None], axis=1)
    return components * np.where(values < 0, -1.0, 1.0)


def keep_components(model: PcaModel, components: float, *, rank: int) -> PcaModel:
    """Keep the wanted components of a model that has more.

    Parameters
    ----------
    model : PcaModel
        With all components that could be wanted.
    components : int or float
        How many, or the share of the variance that they must explain.
    rank : int
        How many of those in the model are more than rounding.

    Returns
    -------
    PcaModel
        With as many as are wanted, or as many as there are.

    Raises
    ------
    ReduceError
        If there is none.
    """
    if rank == 0:
        raise all_same(model.n_samples)
    wanted = int(components)
    if components < 1:
        reached = np.cumsum(model.explained_variance_ratio[:rank])
        wanted = int(np.searchsorted(reached, components)) + 1
    k = min(wanted, rank)
    return replace(
        model,
        components=model.components[:k],
        explained_variance=model.explained_variance[:k],
        explained_variance_ratio=model.explained_variance_ratio[:k],
        singular_values=model.singular_values[:k],
    )


def all_same(n_samples: int) -> ReduceError:
    """Say that there is no variance."""
    return ReduceError(
        f"all {n_samples} images have the same features, so there is no variance to explain; "
        "check that the input holds different photos"
    )


def write_model(store: Store, output: str, model: PcaModel) -> None:
    """Store a model as ``pca/model.npz``, plain arrays without pickle."""
    known = {field.name: getattr(model, field.name) for field in fields(model)}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in known.items() if value is not None})
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
        scalars = {name: arrays[name].item() for name in _SCALARS if name in arrays}
        return PcaModel(**{**arrays, **scalars})
    except StorageError:
        raise
    except (ValueError, TypeError, KeyError, OSError, EOFError, BadZipFile) as exc:
        raise ResultError(f"{path} is damaged ({exc}); run `reduce` again") from exc
