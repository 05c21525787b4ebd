"""Moments that merge: any cut and any order give what numpy says of all rows at once."""

from __future__ import annotations

import functools
import itertools
import pickle

import dask
import numpy as np
import pytest
from dask.sizeof import sizeof
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fruits_dask.reduce.moments import Moments, eigenvalues, exact_share, merge_all
from fruits_dask.tasks import bag_of
from reduced import decaying

# Products of smaller numbers are no longer of full precision.
NUMBERS = st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-9 else 0.0)
TABLES = st.tuples(st.integers(1, 30), st.integers(1, 6)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=NUMBERS)
)


def of_all(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scatter with twice the digits."""
    wide = rows.astype(np.longdouble)
    mean = wide.mean(axis=0)
    return mean, (wide - mean).T @ (wide - mean)


def assert_moments_of(found: Moments, rows: np.ndarray) -> None:
    mean, scatter = of_all(rows)
    size = float(np.abs(rows).max())
    assert found.n_rows == len(rows)
    np.testing.assert_allclose(found.mean, mean.astype(float), rtol=1e-12, atol=1e-13 * size)
    limit = 1e-11 * max(float(np.trace(scatter)), 1e-16 * len(rows) * size**2)
    np.testing.assert_allclose(found.scatter, scatter.astype(float), rtol=0, atol=limit)


@given(rows=TABLES, data=st.data())
@settings(deadline=None)
def test_any_cut_in_any_order_gives_the_moments_of_all(
    rows: np.ndarray, data: st.DataObject
) -> None:
    """Pieces may be empty, or one row."""
    edges = st.lists(st.integers(0, len(rows)), max_size=6).map(sorted)
    cuts = [0, *data.draw(edges), len(rows)]
    pieces = [rows[a:b] for a, b in itertools.pairwise(cuts)]
    order = data.draw(st.permutations(range(len(pieces))))
    merged = functools.reduce(Moments.merge, [Moments.of(pieces[i]) for i in order])
    assert_moments_of(merged, rows)


@given(rows=TABLES)
@settings(deadline=None)
def test_no_row_changes_nothing(rows: np.ndarray) -> None:
    found, none = Moments.of(rows), Moments.of_none(rows.shape[1])
    for merged in (found.merge(none), none.merge(found)):
        assert merged.n_rows == found.n_rows
        np.testing.assert_array_equal(merged.mean, found.mean)
        np.testing.assert_array_equal(merged.scatter, found.scatter)


def test_no_rows_at_all() -> None:
    none = Moments.of(np.empty((0, 3), np.float32)).merge(Moments.of_none(3))
    assert none.n_rows == 0
    np.testing.assert_array_equal(none.scatter, np.zeros((3, 3)))


@given(rows=TABLES)
@settings(deadline=None)
def test_one_row_has_no_scatter(rows: np.ndarray) -> None:
    found = Moments.of(rows[:1])
    np.testing.assert_array_equal(found.mean, rows[0].astype(np.float64))
    np.testing.assert_array_equal(found.scatter, 0)


@given(value=NUMBERS, cut=st.integers(1, 49))
@settings(deadline=None)
def test_equal_rows_have_exactly_no_scatter(value: float, cut: int) -> None:
    rows = np.full((50, 3), value, np.float32)
    found = Moments.of(rows[:cut]).merge(Moments.of(rows[cut:]))
    assert found.total_variance == 0


@given(
    cut=st.integers(1, 999),
    seed=st.integers(0, 10),
    offset=st.sampled_from([1e4, -1e4]),
)
@settings(deadline=None, max_examples=30)
def test_a_mean_far_from_zero_costs_no_digits(cut: int, seed: int, offset: float) -> None:
    """Doubles whose spread is 1e-4 around 1e4: the sum of their squares has no digit of it."""
    random = np.random.default_rng(seed)
    rows = offset + 1e-4 * random.normal(size=(1000, 4))
    found = Moments.of(rows[:cut]).merge(Moments.of(rows[cut:]))
    mean, scatter = of_all(rows)
    assert np.abs(found.mean - mean).max() <= 4 * abs(offset) * np.finfo(np.float64).eps
    assert np.abs(found.scatter - scatter).max() <= 1e-9 * np.trace(scatter)


def test_total_variance_is_that_of_all_columns() -> None:
    rows = decaying(50, 7)
    expected = rows.astype(np.float64).var(axis=0, ddof=1).sum()
    assert Moments.of(rows).total_variance == pytest.approx(expected)


def test_rows_are_not_changed() -> None:
    rows = decaying(50, 7).astype(np.float64)
    before = rows.copy()
    Moments.of(rows)
    np.testing.assert_array_equal(rows, before)


# ---------------------------------------------------------------- the tree


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 9, 50])
def test_no_task_merges_more_than_two(n_chunks: int) -> None:
    """What a worker holds does not grow with the rows."""
    bag = bag_of(range(n_chunks), lambda i: decaying(10, 3, seed=i))
    graph = dict(merge_all(bag).__dask_graph__())
    dependencies, _ = dask.core.get_deps(graph)
    assert max(map(len, dependencies.values())) <= 2


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 9, 50])
def test_the_tree_gives_the_moments_of_all(n_chunks: int) -> None:
    bag = bag_of(range(n_chunks), lambda i: decaying(10, 3, seed=i))
    with dask.config.set(scheduler="synchronous"):
        found = merge_all(bag).compute()
    assert_moments_of(found, np.concatenate([decaying(10, 3, seed=i) for i in range(n_chunks)]))


def test_dask_knows_how_large_they_are() -> None:
    """It spills, moves and pauses by this number, which by default would be some 50 bytes."""
    assert sizeof(Moments.of_none(100)) >= 100 * 100 * 8
    assert sizeof([Moments.of_none(100)]) >= 100 * 100 * 8


def test_they_travel() -> None:
    found = Moments.of(decaying(20, 4))
    again = pickle.loads(pickle.dumps(found))  # noqa: S301 - our own
    np.testing.assert_array_equal(again.scatter, found.scatter)
    assert again.n_rows == 20


# ---------------------------------------------------------------- what is kept


def test_the_share_of_the_best_directions_is_one() -> None:
    moments = Moments.of(decaying(200, 12))
    values, vectors = np.linalg.eigh(moments.scatter)
    np.testing.assert_allclose(eigenvalues(moments), values, rtol=1e-9)
    assert exact_share(moments, vectors.T[-4:], values) == pytest.approx(1, abs=1e-12)
    assert exact_share(moments, vectors.T[-4:], values[-4:]) == pytest.approx(1, abs=1e-12)


def test_the_share_of_other_directions_is_what_they_keep() -> None:
    rows = decaying(200, 12).astype(np.float64)
    basis, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(12, 3)))
    moments = Moments.of(rows)
    kept = ((rows - rows.mean(axis=0)) @ basis).var(axis=0).sum()
    best = np.sort(np.linalg.eigvalsh(np.cov(rows.T, bias=True)))[-3:].sum()
    found = exact_share(moments, basis.T, eigenvalues(moments))
    assert found == pytest.approx(kept / best)
    assert found < 0.9
