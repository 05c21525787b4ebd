"""The PCA over stored parts by both reducers, held against scikit-learn's on the same rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from pathlib import Path

import dask
import numpy as np
import pytest

from fruits_dask import layout
from fruits_dask.errors import ReduceError, ResultError
from fruits_dask.reduce import PcaModel, Reducer, fit_pca, incremental, rows
from fruits_dask.reduce import exact as exact_reducer
from fruits_dask.reduce.moments import Moments
from fruits_dask.reduce.rows import plan_chunks
from jobs import OPTIONS, Delegate
from reduced import (
    REDUCERS,
    STORE,
    Rows,
    captured,
    decaying,
    exact,
    fit,
    small_batches,
    store_parts,
)

# Captured variance may fall short of the exact one by this share of it.
LOSS = 1e-4

both_reducers = pytest.mark.parametrize("reducer", REDUCERS)


@pytest.fixture(autouse=True)
def without_workers() -> Iterator[None]:
    with dask.config.set(scheduler="synchronous"):
        yield


def assert_same_model(found: PcaModel, expected: PcaModel) -> None:
    for name in PcaModel.__slots__:
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


# ---------------------------------------------------------------- the exact reducer


@pytest.fixture(scope="module")
def table() -> Rows:
    return decaying(1500, 64)


@pytest.fixture(scope="module")
def exact_model(table: Rows, tmp_path_factory: pytest.TempPathFactory) -> PcaModel:
    with dask.config.set(scheduler="synchronous"):
        return fit(tmp_path_factory.mktemp("exact"), table, components=10, reducer="exact")


def assert_equals_scikit(found: PcaModel, rows: Rows) -> None:
    """Up to the signs of the components, which scikit-learn chooses in another way."""
    expected = exact(rows, len(found.components))
    for name in ("explained_variance", "explained_variance_ratio", "singular_values", "mean"):
        wanted = getattr(expected, f"{name}_")
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-6, err_msg=name)
    signs = np.sign((found.components * expected.components_).sum(axis=1))
    turned = expected.components_ * signs[:, None]
    np.testing.assert_allclose(found.components, turned, atol=1e-6)
    scale = np.abs(rows).max()
    scores = expected.transform(rows.astype(np.float64)) * signs
    np.testing.assert_allclose(found.transform(rows), scores, atol=1e-6 * scale)


def test_the_exact_reducer_equals_scikit_learn(exact_model: PcaModel, table: Rows) -> None:
    assert_equals_scikit(exact_model, table)
    assert exact_model.exact_share == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("n_features", [1, 2, 100])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_the_cut_changes_nothing_about_the_exact_reducer(
    chunk: int, n_features: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch, chunk=chunk)
    rows = decaying(200, n_features, power=0.5)
    counts = store_parts(tmp_path, rows, size=5)
    k = min(n_features, 20)
    found = fit_pca(str(tmp_path), OPTIONS, counts, components=k, reducer="exact")
    assert_equals_scikit(found, rows)


def test_the_exact_reducer_is_exact_far_from_zero(tmp_path: Path) -> None:
    """With a mean that is 10,000 times the spread, E[x²] - E[x]² would have no digit left."""
    rows = (decaying(500, 16) + np.float32(1e4)).astype(np.float32)
    assert_equals_scikit(fit(tmp_path, rows, components=3, reducer="exact"), rows)


def test_the_exact_reducer_measures_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is not taken for granted: with other vectors it would be less than 1."""

    def weakest(scatter: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(scatter)
        return values[-k:], vectors[:, :k]

    moments = Moments.of(decaying(100, 8))
    monkeypatch.setattr(exact_reducer, "_strongest", weakest)
    share = exact_reducer.decompose(moments, 2).exact_share
    assert share is not None
    assert 0 < share < 0.2


# ---------------------------------------------------------------- the incremental one, one batch


@pytest.fixture(scope="module")
def model(table: Rows, tmp_path_factory: pytest.TempPathFactory) -> PcaModel:
    with dask.config.set(scheduler="synchronous"):
        return fit(tmp_path_factory.mktemp("one"), table, components=10)


def test_one_batch_of_few_columns_is_exact(model: PcaModel, table: Rows) -> None:
    assert_equals_scikit(model, table)
    assert model.n_samples == 1500
    assert model.exact_share == pytest.approx(1, abs=1e-9)


@pytest.fixture
def solvers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Solvers that were chosen."""
    seen: list[str] = []
    choose = incremental._solver

    def noted(*given: object) -> str:
        seen.append(choose(*given))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(incremental, "_solver", noted)
    return seen


@pytest.mark.parametrize("power", [0.75, 1.0, 2.0])
def test_the_randomized_solver_loses_next_to_nothing(
    power: float, tmp_path: Path, solvers: list[str]
) -> None:
    rows = decaying(700, 300, power=power)
    found = fit(tmp_path, rows, components=20)
    assert solvers == ["randomized"]
    best = float(exact(rows, 20).explained_variance_.sum())
    assert best * (1 - LOSS) <= captured(found, rows) <= best * (1 + 1e-9)
    assert found.exact_share == pytest.approx(captured(found, rows) / best, abs=1e-9)
    np.testing.assert_allclose(found.explained_variance.sum(), best, rtol=LOSS)


def test_the_share_tells_a_bad_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dask-ml's defaults would be: no power iteration, no oversampling."""
    monkeypatch.setattr(incremental, "_POWER_ITERATIONS", 0)
    monkeypatch.setattr(incremental, "_OVERSAMPLING", 1)
    monkeypatch.setattr(incremental, "_SPARE", 0)
    rows = decaying(700, 300, power=0.5)
    found = fit(tmp_path, rows, components=20)
    best = float(exact(rows, 20).explained_variance_.sum())
    assert found.exact_share == pytest.approx(captured(found, rows) / best, abs=1e-9)
    assert found.exact_share < 0.95


def test_many_components_are_solved_exactly(tmp_path: Path, solvers: list[str]) -> None:
    rows = decaying(700, 300)
    found = fit(tmp_path, rows, components=120)
    assert solvers == ["tsqr"]
    np.testing.assert_allclose(
        found.explained_variance, exact(rows, 120).explained_variance_, rtol=1e-9
    )


# ---------------------------------------------------------------- what both have in common


@both_reducers
def test_components_are_orthonormal(reducer: Reducer, tmp_path: Path, table: Rows) -> None:
    found = fit(tmp_path, table, components=10, reducer=reducer)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(10), atol=1e-12)


@both_reducers
def test_signs_are_chosen_by_the_largest_element(
    reducer: Reducer, tmp_path: Path, table: Rows
) -> None:
    found = fit(tmp_path, table, components=10, reducer=reducer)
    largest = np.abs(found.components).argmax(axis=1)
    assert (found.components[range(10), largest] > 0).all()


@both_reducers
def test_all_arrays_are_double(reducer: Reducer, tmp_path: Path, table: Rows) -> None:
    found = fit(tmp_path, table, components=3, reducer=reducer)
    arrays = (found.components, found.mean, found.explained_variance, found.singular_values)
    assert {array.dtype for array in arrays} == {np.dtype(np.float64)}


@both_reducers
def test_the_same_rows_give_the_same_bits(
    reducer: Reducer, table: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the counts come in another order, as they do from workers."""
    small_batches(monkeypatch)
    counts = store_parts(tmp_path, table)
    first, again = (
        fit_pca(str(tmp_path), OPTIONS, given, components=10, reducer=reducer)
        for given in (counts, counts[::-1])
    )
    assert_same_model(again, first)


@dataclass(slots=True, kw_only=True)
class CountingStore(Delegate):
    """Remembers how often each object was read."""

    reads: Counter[str] = field(default_factory=Counter)

    def read(self, path: str) -> bytes:
        self.reads[Path(path).name] += 1
        return self.inner.read(path)


@both_reducers
def test_every_part_is_read_once(
    reducer: Reducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first, of which the incremental reducer must know a row to begin with."""
    small_batches(monkeypatch)
    store = CountingStore(inner=STORE)
    counts = store_parts(tmp_path, decaying(1000, 16))
    monkeypatch.setattr(rows, "open_store", lambda address, options: store)
    fit_pca(str(tmp_path), OPTIONS, counts, components=3, reducer=reducer)
    first = store.reads.pop("part-00000.parquet")
    assert first == (1 if reducer == "exact" else 2)
    assert store.reads == {layout.part_name(index): 1 for index in range(1, 10)}


# ---------------------------------------------------------------- several batches

# Images in a part, rows in a chunk and in a batch, columns, components.
CUTS = {
    "four batches": (400, 128, 300, 64, 10),
    "parts that do not divide the chunks": (37, 100, 300, 64, 10),
    "chunks of fewer rows than columns": (64, 64, 256, 96, 20),
    "batches that just hold the components": (64, 64, 128, 96, 40),
    "parts of one image": (1, 50, 100, 20, 5),
    "a few of many columns": (64, 128, 256, 250, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_several_batches_keep_the_variance(
    cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many batches, where the exact PCA sees all rows at once."""
    size, chunk, batch, n_features, k = CUTS[cut]
    small_batches(monkeypatch, chunk=chunk, batch=batch)
    rows = decaying(1200 if size > 1 else 350, n_features)
    batches: list[int] = []
    counts = store_parts(tmp_path, rows, size=size)
    found = fit_pca(str(tmp_path), OPTIONS, counts, components=k, on_batch=batches.append)
    best = float(exact(rows, k).explained_variance_.sum())
    assert best * (1 - LOSS) <= captured(found, rows) <= best * (1 + 1e-9)
    assert found.exact_share == pytest.approx(captured(found, rows) / best, abs=1e-9)
    assert batches == list(range(batches[-1] + 1))
    assert batches[-1] > 2
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(k), atol=1e-9)
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-9)


def test_several_batches_report_what_they_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reported variances, which dask-ml makes too small after several batches."""
    small_batches(monkeypatch, chunk=128, batch=256)
    rows = decaying(800, 64)
    found = fit(tmp_path, rows, components=10)
    assert found.explained_variance.sum() == pytest.approx(captured(found, rows), rel=1e-9)
    assert (np.diff(found.explained_variance) < 0).all()
    np.testing.assert_allclose(found.singular_values**2, found.explained_variance * 799)
    expected = exact(rows, 10)
    assert found.explained_variance.sum() == pytest.approx(
        expected.explained_variance_.sum(), rel=LOSS
    )
    assert found.explained_variance_ratio.sum() == pytest.approx(
        expected.explained_variance_ratio_.sum(), rel=LOSS
    )
    total = float(rows.astype(np.float64).var(axis=0, ddof=1).sum())
    np.testing.assert_allclose(
        found.explained_variance / found.explained_variance_ratio, total, rtol=1e-6
    )


@pytest.mark.slow
def test_rows_that_drift_from_batch_to_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted paths make batches of one kind of fruit each: nothing is like its neighbours."""
    small_batches(monkeypatch)
    random = np.random.default_rng(1)
    centres = np.repeat(random.normal(size=(20, 64)) * 2, 100, axis=0)
    rows = (decaying(2000, 64) + centres).astype(np.float32)
    found = fit(tmp_path, rows, components=10)
    assert captured(found, rows) >= exact(rows, 10).explained_variance_.sum() * (1 - LOSS)


@both_reducers
def test_low_rank_is_kept_whole(
    reducer: Reducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch)
    random = np.random.default_rng(2)
    rows = (random.normal(size=(1500, 6)) @ random.normal(size=(6, 64))).astype(np.float32)
    found = fit(tmp_path, rows, components=6, reducer=reducer)
    assert found.explained_variance_ratio.sum() == pytest.approx(1, abs=1e-6)


@both_reducers
@pytest.mark.parametrize("n_equal", [100, 256, 512, 600])
def test_equal_images_at_the_beginning_are_no_matter(
    n_equal: int, reducer: Reducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part, a batch and more of them; dask-ml would divide by their variance of 0."""
    small_batches(monkeypatch, chunk=128, batch=256)
    rows = decaying(1000, 32)
    rows[:n_equal] = rows[0]
    found = fit(tmp_path, rows, components=5, reducer=reducer)
    best = float(exact(rows, 5).explained_variance_.sum())
    assert captured(found, rows) >= best * (1 - LOSS)
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-9)
    assert found.n_samples == 1000


# ---------------------------------------------------------------- how the rows are cut


@pytest.mark.parametrize(
    ("n_rows", "size", "expected"),
    [
        (5_113, 64, [2560, 2553]),
        (1_500, 100, [1000, 500]),
        (900, 100, [900]),
        (20_000, 2048, [*[2048] * 9, 1568]),
        (20_000, 100, [*[2600] * 7, 1800]),
        (9_000, 5000, [5000, 4000]),
    ],
)
def test_chunks_are_worth_a_task(n_rows: int, size: int, expected: list[int]) -> None:
    counts = [
        rows.PartCount(index=i, n_features=min(size, n_rows - start), n_training=0, n_failures=0)
        for i, start in enumerate(range(0, n_rows, size))
    ]
    chunks = plan_chunks("/out", OPTIONS, counts)
    assert [chunk.n_rows for chunk in chunks] == expected
    assert [count for chunk in chunks for count in chunk.counts] == counts


def test_a_batch_is_bounded() -> None:
    """However many rows there are."""
    counts = [
        rows.PartCount(index=i, n_features=2048, n_training=0, n_failures=0) for i in range(500)
    ]
    chunks = plan_chunks("/out", OPTIONS, counts)
    sizes = [sum(c.n_rows for c in b) for b in incremental._plan_batches(chunks, 200)]
    assert sum(sizes) == 500 * 2048
    assert max(sizes) <= 16_384


# ---------------------------------------------------------------- which rows, how many components


@both_reducers
@pytest.mark.parametrize("name", ["Training", "train"])
def test_only_the_training_split_counts_when_there_is_one(
    name: str, reducer: Reducer, tmp_path: Path
) -> None:
    rows = decaying(600, 32)
    splits = [name if number % 3 else "Test" for number in range(600)]
    rows[::3] *= 50  # would turn every component
    found = fit(tmp_path, rows, components=5, splits=splits, reducer=reducer)
    training = rows[np.arange(600) % 3 != 0]
    assert found.n_samples == len(training) == 400
    np.testing.assert_allclose(
        found.explained_variance, exact(training, 5).explained_variance_, rtol=1e-9
    )
    assert found.exact_share == pytest.approx(1)


@both_reducers
def test_all_rows_count_when_none_is_for_training(reducer: Reducer, tmp_path: Path) -> None:
    rows = decaying(300, 16)
    splits = ["Test", None, "Validation"] * 100
    assert fit(tmp_path, rows, components=3, splits=splits, reducer=reducer).n_samples == 300


@both_reducers
def test_parts_without_a_training_row_are_passed_over(reducer: Reducer, tmp_path: Path) -> None:
    rows = decaying(500, 16)
    splits = ["Test"] * 200 + ["Training"] * 300
    found = fit(tmp_path, rows, components=3, splits=splits, reducer=reducer)
    np.testing.assert_allclose(found.mean, rows[200:].astype(np.float64).mean(axis=0), rtol=1e-9)


@both_reducers
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 0.999])
def test_a_share_gives_the_fewest_components_that_reach_it(
    share: float, reducer: Reducer, tmp_path: Path
) -> None:
    rows = decaying(900, 40, power=0.7)
    found = fit(tmp_path, rows, components=share, reducer=reducer)
    reached = np.cumsum(exact(rows, 40).explained_variance_ratio_)
    assert len(found.components) == int((reached < share).sum()) + 1
    assert found.explained_variance_ratio.sum() >= share
    assert found.exact_share == pytest.approx(1)


@pytest.mark.slow
def test_a_share_over_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    rows = decaying(1600, 40, power=0.7)
    found = fit(tmp_path, rows, components=0.95)
    reached = np.cumsum(exact(rows, 40).explained_variance_ratio_)
    assert len(found.components) == int((reached < 0.95).sum()) + 1


@both_reducers
@pytest.mark.parametrize("n_rows", [2, 3, 8])
def test_few_rows_give_as_many_components_as_they_can(
    n_rows: int, reducer: Reducer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = decaying(n_rows, 32)
    with caplog.at_level(logging.WARNING, "fruits_dask"):
        found = fit(tmp_path, rows, components=10, reducer=reducer)
    k = n_rows - 1
    assert len(found.components) == k
    np.testing.assert_allclose(
        found.explained_variance, exact(rows, k).explained_variance_, rtol=1e-8
    )
    message = caplog.records[-1].getMessage()
    assert "10" in message
    assert str(k) in message


@both_reducers
def test_no_more_components_than_columns(reducer: Reducer, tmp_path: Path) -> None:
    found = fit(tmp_path, decaying(50, 8), components=100, reducer=reducer)
    assert len(found.components) == 8
    assert found.explained_variance_ratio.sum() == pytest.approx(1)


@both_reducers
@pytest.mark.parametrize("components", [8, 0.999999])
def test_as_many_as_asked_for_is_nothing_to_talk_about(
    components: float, reducer: Reducer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, decaying(50, 8), components=components, reducer=reducer)
    assert caplog.records == []


@both_reducers
def test_copies_of_three_images_span_a_plane(reducer: Reducer, tmp_path: Path) -> None:
    rows = np.repeat(decaying(3, 32), 40, axis=0)
    found = fit(tmp_path, rows, components=10, reducer=reducer)
    assert len(found.components) == 2
    np.testing.assert_allclose(found.explained_variance, exact(rows, 2).explained_variance_)


@both_reducers
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e6])
@pytest.mark.parametrize("n_rows", [40, 700])
def test_equal_images_have_no_components(
    n_rows: int, value: float, reducer: Reducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch and in several."""
    small_batches(monkeypatch, batch=256)
    table = np.full((n_rows, 16), value, np.float32)
    with pytest.raises(ReduceError, match=f"all {n_rows} images have the same features"):
        fit(tmp_path, table, components=3, reducer=reducer)


@both_reducers
@pytest.mark.parametrize("components", [1, 5, 0.95])
def test_one_image_is_too_few(components: float, reducer: Reducer, tmp_path: Path) -> None:
    with pytest.raises(ReduceError, match="at least 2 images, found 1"):
        fit(tmp_path, decaying(1, 16), components=components, reducer=reducer)


@both_reducers
def test_no_image_is_too_few(reducer: Reducer, tmp_path: Path) -> None:
    with pytest.raises(ReduceError, match="at least 2 images, found 0"):
        fit_pca(str(tmp_path), OPTIONS, [], components=1, reducer=reducer)


@both_reducers
def test_one_training_image_is_too_few(reducer: Reducer, tmp_path: Path) -> None:
    splits = ["Training", "Test", "Test"]
    with pytest.raises(ReduceError, match="in the training split"):
        fit(tmp_path, decaying(3, 16), components=1, splits=splits, reducer=reducer)


@both_reducers
def test_tiny_features_are_no_rounding(reducer: Reducer, tmp_path: Path) -> None:
    """Weights that were just initialised give features near 1e-11: small, and still different."""
    rows = decaying(300, 16) * np.float32(1e-11)
    found = fit(tmp_path, rows, components=4, reducer=reducer)
    assert len(found.components) == 4
    np.testing.assert_allclose(
        found.explained_variance_ratio, exact(rows, 4).explained_variance_ratio_, rtol=1e-6
    )


@both_reducers
def test_a_column_that_never_changes_is_no_division_by_zero(
    reducer: Reducer, tmp_path: Path
) -> None:
    """ReLU features of a network have such columns; numpy would warn, and warnings are errors."""
    rows = decaying(400, 32)
    rows[:, [3, 17]] = 0
    found = fit(tmp_path, rows, components=5, reducer=reducer)
    np.testing.assert_allclose(found.components[:, [3, 17]], 0, atol=1e-12)


@both_reducers
def test_parts_that_changed_meanwhile_are_noticed(reducer: Reducer, tmp_path: Path) -> None:
    counts = store_parts(tmp_path, decaying(200, 16))
    store_parts(tmp_path, decaying(199, 16))
    with pytest.raises(ResultError, match="changed while it was read"):
        fit_pca(str(tmp_path), OPTIONS, counts, components=3, reducer=reducer)


# ---------------------------------------------------------------- real features, real workers


@pytest.fixture(scope="module")
def real_features(shared: Path) -> Rows:
    """Features of real photos by the bundled weights."""
    from fruits_dask.decode import decode  # noqa: PLC0415
    from fruits_dask.featurize import build_featurizer  # noqa: PLC0415
    from fruits_dask.featurize.weights import load_weights  # noqa: PLC0415

    weights = load_weights("fruits", None, OPTIONS)
    spec = weights.spec(engine="tensorflow")
    paths = sorted((shared / "data").rglob("*.jpg"))[::4]
    pixels = [decode(path.read_bytes(), image_px=spec.image_px) for path in paths]
    return build_featurizer(spec, weights.data)(np.stack(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("k", [20, 100])
def test_real_features_keep_their_variance(
    k: int, real_features: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fruit after fruit in the order of their paths, in three batches."""
    small_batches(monkeypatch, chunk=256, batch=700)
    batches: list[int] = []
    counts = store_parts(tmp_path, real_features, size=64)
    found = fit_pca(str(tmp_path), OPTIONS, counts, components=k, on_batch=batches.append)
    assert batches[-1] >= 3
    best = float(exact(real_features, k).explained_variance_.sum())
    assert captured(found, real_features) >= best * (1 - LOSS)


@pytest.mark.slow
def test_real_features_in_one_batch(
    real_features: Rows, tmp_path: Path, solvers: list[str]
) -> None:
    found = fit(tmp_path, real_features, components=100, size=64)
    assert solvers == ["randomized"]
    assert found.exact_share is not None
    assert found.exact_share >= 1 - LOSS


@pytest.mark.slow
def test_real_features_by_the_exact_reducer(real_features: Rows, tmp_path: Path) -> None:
    found = fit(tmp_path, real_features, components=100, size=64, reducer="exact")
    np.testing.assert_allclose(
        found.explained_variance, exact(real_features, 100).explained_variance_, rtol=1e-8
    )


@pytest.mark.slow
@both_reducers
def test_real_workers_agree_and_have_nothing_to_complain_of(
    reducer: Reducer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their number; neither numpy on a worker nor the scheduler (dask#9888) warns."""
    from distributed import Client, LocalCluster  # noqa: PLC0415

    small_batches(monkeypatch, chunk=256, batch=1024)
    counts = store_parts(tmp_path, decaying(4000, 64))
    handler = BufferingHandler(capacity=1000)
    handler.setLevel(logging.WARNING)
    with (
        dask.config.set(scheduler=None),
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        client.run(_make_warnings_errors)
        logging.getLogger("distributed").addHandler(handler)
        try:
            two = fit_pca(str(tmp_path), OPTIONS, counts, components=10, reducer=reducer)
            logs = client.get_worker_logs()
        finally:
            logging.getLogger("distributed").removeHandler(handler)
        client.retire_workers(list(client.scheduler_info()["workers"])[:1])
        one = fit_pca(str(tmp_path), OPTIONS, counts, components=10, reducer=reducer)
    assert [record.getMessage() for record in handler.buffer] == []
    assert [line for lines in logs.values() for line in lines if line[0] != "INFO"] == []
    assert_same_model(one, two)


def _make_warnings_errors() -> None:
    import warnings  # noqa: PLC0415

    warnings.simplefilter("error", RuntimeWarning)
    np.seterr(all="raise", under="ignore")
