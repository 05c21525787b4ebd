"""Count, mean and scatter of rows, in pieces that merge: the exact covariance in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import dask.bag as db
import numpy as np
from numpy.typing import NDArray

from .model import Matrix

# Pieces that one task merges. A piece of 1,280 columns is 13 MB; with two, a worker that merges
# holds three of them, and pieces are merged as soon as they are there.
_SPLIT_EVERY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What the covariance of rows needs, of any number of rows."""

    n_rows: int
    """Rows that were seen."""
    mean: Matrix
    """(d,) their mean; 0 of no row."""
    scatter: Matrix
    """(d, d) sum of the outer products of the centred rows: (n - 1) times the covariance."""

    @classmethod
    def of(cls, rows: NDArray[np.float32] | NDArray[np.float64]) -> Moments:
        """Compute the moments of rows, in double precision.

        Parameters
        ----------
        rows : ndarray, (n_rows, d) float
            Rows, which may be none.

        Returns
        -------
        Moments
            Those of equal rows have a scatter of exactly 0.
        """
        if len(rows) == 0:
            return cls.of_none(rows.shape[1])
        # Seen from the first row, a mean far from 0 costs no digits.
        origin = rows[0].astype(np.float64)
        centred = rows - origin
        mean = centred.mean(axis=0)
        centred -= mean
        return cls(n_rows=len(rows), mean=origin + mean, scatter=centred.T @ centred)

    @classmethod
    def of_none(cls, n_features: int) -> Moments:
        """Return the moments of no row, which change nothing when they are merged."""
        shape = (n_features, n_features)
        return cls(n_rows=0, mean=np.zeros(n_features), scatter=np.zeros(shape))

    def merge(self, other: Moments) -> Moments:
        """Compute the moments of both sets of rows together.

        Parameters
        ----------
        other : Moments
            Of other rows.

        Returns
        -------
        Moments
            Those of all rows.

        References
        ----------
        Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance: Analysis and
        Recommendations", The American Statistician 37(3), 1983: the pairwise update, here of
        vectors.
        """
        if not (self.n_rows and other.n_rows):
            return self if self.n_rows else other
        n_rows = self.n_rows + other.n_rows
        step = other.mean - self.mean
        scatter = np.outer(step, step * (self.n_rows * other.n_rows / n_rows))
        scatter += self.scatter
        scatter += other.scatter
        mean = self.mean + step * (other.n_rows / n_rows)
        return Moments(n_rows=n_rows, mean=mean, scatter=scatter)

    def __sizeof__(self) -> int:
        """Size in bytes; Dask asks for it before it moves or keeps an object."""
        return int(self.mean.nbytes + self.scatter.nbytes)

    @property
    def total_variance(self) -> float:
        """Sum of the variances of all columns, divisor n - 1; 0 if all rows are equal."""
        return float(np.trace(self.scatter)) / (self.n_rows - 1)


def merge_all(chunks: db.Bag) -> db.Item:
    """Describe the moments of all rows in a bag as a tree of tasks.

    Parameters
    ----------
    chunks : dask.bag.Bag
        Of matrices, one in each partition.

    Returns
    -------
    dask.bag.Item
        `Moments`. The workers merge pairs, then pairs of pairs, always the same ones.
    """
    return chunks.map(Moments.of).fold(Moments.merge, split_every=_SPLIT_EVERY)


def eigenvalues(moments: Moments) -> Matrix:
    """Compute all eigenvalues of the scatter, ascending, (d,) float64."""
    return np.asarray(np.linalg.eigvalsh(moments.scatter), dtype=np.float64)


def captured(moments: Moments, components: Matrix) -> Matrix:
    """Sum the squares of all centred rows along each component.

    Parameters
    ----------
    moments : Moments
        Of the rows.
    components : ndarray, (k, d) float64
        Orthonormal rows.

    Returns
    -------
    ndarray, (k,) float64
        The diagonal of C S C^T.
    """
    squares: Matrix = ((components @ moments.scatter) * components).sum(axis=1)
    return squares


def exact_share(moments: Moments, components: Matrix, spectrum: Matrix) -> float:
    """Measure how much of the variance that k components could keep these components keep.

    Parameters
    ----------
    moments : Moments
        Of the rows.
    components : ndarray, (k, d) float64
        Orthonormal rows.
    spectrum : ndarray, (m,) float64
        The largest eigenvalues of the scatter, at least k of them, ascending.

    Returns
    -------
    float
        trace(C S C^T) over the sum of the k largest eigenvalues of S; 1 at best, up to rounding.
    """
    return float(captured(moments, components).sum()) / float(spectrum[-len(components) :].sum())
