"""The PCA over stored parts, held against scikit-learn's exact one on the same rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path

import dask
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from fruits_dask import layout, reduce
from fruits_dask.errors import NotFoundError, ReduceError, ResultError
from fruits_dask.features import count_part, vector_table, write_failures, write_table
from fruits_dask.records import PartCount
from fruits_dask.reduce import (
    PcaModel,
    fit_pca,
    iterate_scores,
    read_model,
    scores_bag,
    write_model,
    write_scores,
)
from fruits_dask.storage import LocalStore
from jobs import OPTIONS, names, read_rows, vectors_of

STORE = LocalStore()
# Captured variance may fall short of the exact one by this share of it.
LOSS = 1e-3

Rows = NDArray[np.float32]
Splits = Sequence[str | None]


@pytest.fixture(autouse=True)
def without_workers() -> Iterator[None]:
    with dask.config.set(scheduler="synchronous"):
        yield


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


def fit(output: Path, rows: Rows, *, components: float, **stored: object) -> PcaModel:
    counts = store_parts(output, rows, **stored)  # type: ignore[arg-type]
    return fit_pca(str(output), OPTIONS, counts, components=components)


def decaying(n_rows: int, n_features: int, *, power: float = 1.0, seed: int = 0) -> Rows:
    """Rows with variances that fall like those of real features, and a mean far from 0."""
    random = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(random.normal(size=(n_features, n_features)))
    scales = np.arange(1, n_features + 1) ** -power
    rows = random.normal(size=(n_rows, n_features)) * scales @ basis.T
    shifted: Rows = (rows + random.uniform(0, 3, n_features)).astype(np.float32)
    return shifted


def exact(rows: Rows, k: int) -> PCA:
    return PCA(n_components=k, svd_solver="full").fit(rows.astype(np.float64))


def captured(model: PcaModel, rows: Rows) -> float:
    """Variance of the rows in the space of the components, whatever the model says of itself."""
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    return float(((centred @ model.components.T) ** 2).sum() / (len(rows) - 1))


def small_batches(monkeypatch: pytest.MonkeyPatch, *, chunk: int = 128, batch: int = 512) -> None:
    monkeypatch.setattr(reduce, "_CHUNK_ROWS", chunk)
    monkeypatch.setattr(reduce, "_BATCH_ROWS", batch)


# ---------------------------------------------------------------- one batch


@pytest.fixture(scope="module")
def rows() -> Rows:
    return decaying(1500, 64)


@pytest.fixture(scope="module")
def model(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> PcaModel:
    with dask.config.set(scheduler="synchronous"):
        return fit(tmp_path_factory.mktemp("one"), rows, components=10)


def test_one_batch_is_exact(model: PcaModel, rows: Rows) -> None:
    expected = exact(rows, 10)
    for name in ("explained_variance", "explained_variance_ratio", "singular_values", "mean"):
        found = getattr(model, name)
        np.testing.assert_allclose(found, getattr(expected, f"{name}_"), rtol=1e-9, err_msg=name)
    cosines = np.abs((model.components * expected.components_).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, rtol=1e-9)
    assert model.n_samples == 1500


def test_components_are_orthonormal(model: PcaModel) -> None:
    np.testing.assert_allclose(model.components @ model.components.T, np.eye(10), atol=1e-12)


def test_signs_are_chosen_by_the_largest_element(model: PcaModel) -> None:
    largest = np.abs(model.components).argmax(axis=1)
    assert (model.components[range(10), largest] > 0).all()


def test_all_arrays_are_double(model: PcaModel) -> None:
    arrays = (model.components, model.mean, model.explained_variance, model.singular_values)
    assert {array.dtype for array in arrays} == {np.dtype(np.float64)}


def test_the_same_rows_give_the_same_bits(model: PcaModel, rows: Rows, tmp_path: Path) -> None:
    """Also when the counts come in another order, as they do from workers."""
    counts = store_parts(tmp_path, rows)
    again = fit_pca(str(tmp_path), OPTIONS, counts[::-1], components=10)
    for name in PcaModel.__slots__:
        assert np.array_equal(getattr(again, name), getattr(model, name)), name


# ---------------------------------------------------------------- several batches

# Images in a part, rows in a chunk and in a batch, columns, components.
CUTS = {
    "four batches": (400, 128, 300, 64, 10),
    "parts that do not divide the chunks": (37, 100, 300, 64, 10),
    "chunks of fewer rows than columns": (64, 64, 256, 96, 20),
    "batches that just hold the components": (64, 64, 128, 96, 40),
    "parts of one image": (1, 50, 100, 20, 5),
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
    assert batches == list(range(batches[-1] + 1))
    assert batches[-1] > 2
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(k), atol=1e-9)
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-9)


def test_several_batches_report_what_they_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reported variances, not only the components."""
    small_batches(monkeypatch, chunk=128, batch=256)
    rows = decaying(800, 64)
    found = fit(tmp_path, rows, components=10)
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


def test_low_rank_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    random = np.random.default_rng(2)
    rows = (random.normal(size=(1500, 6)) @ random.normal(size=(6, 64))).astype(np.float32)
    found = fit(tmp_path, rows, components=6)
    assert found.explained_variance_ratio.sum() == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------- which rows, how many components


@pytest.mark.parametrize("name", ["Training", "train"])
def test_only_the_training_split_counts_when_there_is_one(name: str, tmp_path: Path) -> None:
    rows = decaying(600, 32)
    splits = [name if number % 3 else "Test" for number in range(600)]
    rows[::3] *= 50  # would turn every component
    found = fit(tmp_path, rows, components=5, splits=splits)
    training = rows[np.arange(600) % 3 != 0]
    assert found.n_samples == len(training) == 400
    np.testing.assert_allclose(
        found.explained_variance, exact(training, 5).explained_variance_, rtol=1e-9
    )


def test_all_rows_count_when_none_is_for_training(tmp_path: Path) -> None:
    rows = decaying(300, 16)
    found = fit(tmp_path, rows, components=3, splits=["Test", None, "Validation"] * 100)
    assert found.n_samples == 300


def test_parts_without_a_training_row_are_passed_over(tmp_path: Path) -> None:
    rows = decaying(500, 16)
    splits = ["Test"] * 200 + ["Training"] * 300
    found = fit(tmp_path, rows, components=3, splits=splits)
    np.testing.assert_allclose(found.mean, rows[200:].astype(np.float64).mean(axis=0), rtol=1e-9)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95, 0.999])
def test_a_share_gives_the_fewest_components_that_reach_it(share: float, tmp_path: Path) -> None:
    rows = decaying(900, 40, power=0.7)
    found = fit(tmp_path, rows, components=share)
    reached = np.cumsum(exact(rows, 40).explained_variance_ratio_)
    assert len(found.components) == int((reached < share).sum()) + 1
    assert found.explained_variance_ratio.sum() >= share


@pytest.mark.slow
def test_a_share_over_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    rows = decaying(1600, 40, power=0.7)
    found = fit(tmp_path, rows, components=0.95)
    reached = np.cumsum(exact(rows, 40).explained_variance_ratio_)
    assert len(found.components) == int((reached < 0.95).sum()) + 1


@pytest.mark.parametrize("n_rows", [2, 3, 8])
def test_few_rows_give_as_many_components_as_they_can(
    n_rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = decaying(n_rows, 32)
    with caplog.at_level(logging.WARNING, "fruits_dask"):
        found = fit(tmp_path, rows, components=10)
    k = n_rows - 1
    assert len(found.components) == k
    np.testing.assert_allclose(
        found.explained_variance, exact(rows, k).explained_variance_, rtol=1e-8
    )
    message = caplog.records[-1].getMessage()
    assert "10" in message
    assert str(k) in message


def test_no_more_components_than_columns(tmp_path: Path) -> None:
    found = fit(tmp_path, decaying(50, 8), components=100)
    assert len(found.components) == 8
    assert found.explained_variance_ratio.sum() == pytest.approx(1)


def test_as_many_as_asked_for_is_nothing_to_talk_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, decaying(50, 8), components=8)
    assert caplog.records == []


def test_copies_of_three_images_span_a_plane(tmp_path: Path) -> None:
    rows = np.repeat(decaying(3, 32), 40, axis=0)
    found = fit(tmp_path, rows, components=10)
    assert len(found.components) == 2
    np.testing.assert_allclose(found.explained_variance, exact(rows, 2).explained_variance_)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e6])
def test_equal_images_have_no_components(value: float, tmp_path: Path) -> None:
    rows = np.full((40, 16), value, np.float32)
    with pytest.raises(ReduceError, match="same features"):
        fit(tmp_path, rows, components=3)


@pytest.mark.parametrize("components", [1, 5, 0.95])
def test_one_image_is_too_few(components: float, tmp_path: Path) -> None:
    with pytest.raises(ReduceError, match="at least 2 images, found 1"):
        fit(tmp_path, decaying(1, 16), components=components)


def test_one_training_image_is_too_few(tmp_path: Path) -> None:
    splits = ["Training", "Test", "Test"]
    with pytest.raises(ReduceError, match="in the training split"):
        fit(tmp_path, decaying(3, 16), components=1, splits=splits)


def test_tiny_features_are_no_rounding(tmp_path: Path) -> None:
    """Weights that were just initialised give features near 1e-11: small, and still different."""
    rows = decaying(300, 16) * np.float32(1e-11)
    found = fit(tmp_path, rows, components=4)
    assert len(found.components) == 4
    np.testing.assert_allclose(
        found.explained_variance_ratio, exact(rows, 4).explained_variance_ratio_, rtol=1e-6
    )


def test_a_column_that_never_changes_is_no_division_by_zero(tmp_path: Path) -> None:
    """ReLU features of a network have such columns; numpy would warn, and warnings are errors."""
    rows = decaying(400, 32)
    rows[:, [3, 17]] = 0
    found = fit(tmp_path, rows, components=5)
    np.testing.assert_allclose(found.components[:, [3, 17]], 0, atol=1e-12)


def test_parts_that_changed_meanwhile_are_noticed(tmp_path: Path) -> None:
    counts = store_parts(tmp_path, decaying(200, 16))
    store_parts(tmp_path, decaying(199, 16))
    with pytest.raises(ResultError, match="changed while it was read"):
        fit_pca(str(tmp_path), OPTIONS, counts, components=3)


# ---------------------------------------------------------------- model and scores


def test_a_model_is_read_as_it_was_written(model: PcaModel, tmp_path: Path) -> None:
    write_model(STORE, str(tmp_path), model)
    again = read_model(STORE, str(tmp_path))
    for name in PcaModel.__slots__:
        assert np.array_equal(getattr(again, name), getattr(model, name)), name
    with np.load(tmp_path / layout.PCA_MODEL, allow_pickle=False) as stored:
        assert set(stored.files) == set(PcaModel.__slots__)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut"])
def test_a_damaged_model_says_so(content: bytes, tmp_path: Path) -> None:
    STORE.write(str(tmp_path / layout.PCA_MODEL), content)
    with pytest.raises(ResultError, match="damaged"):
        read_model(STORE, str(tmp_path))


def test_a_model_with_an_array_missing_says_so(tmp_path: Path) -> None:
    (tmp_path / "pca").mkdir()
    np.savez(tmp_path / layout.PCA_MODEL, components=np.eye(2))
    with pytest.raises(ResultError, match="damaged"):
        read_model(STORE, str(tmp_path))


def test_a_missing_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_model(STORE, str(tmp_path))


def test_scores_are_projections_of_all_rows(tmp_path: Path) -> None:
    """Also of those that the model was not fitted on."""
    rows = decaying(250, 32)
    splits = ["Training" if number % 2 else "Test" for number in range(250)]
    found = fit(tmp_path, rows, components=4, splits=splits)
    write_model(STORE, str(tmp_path), found)
    bag = scores_bag(str(tmp_path), OPTIONS, [0, 1, 2])
    assert bag is not None
    assert bag.compute() == [100, 100, 50]
    expected = (rows.astype(np.float64) - found.mean) @ found.components.T
    scores = vectors_of(tmp_path, layout.SCORES)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.dtype == np.float32


def test_scores_keep_the_keys_and_metadata_of_their_part(tmp_path: Path) -> None:
    rows = decaying(30, 16)
    write_model(STORE, str(tmp_path), fit(tmp_path, rows, components=3))
    assert write_scores(str(tmp_path), OPTIONS, 0) == 30
    part = tmp_path / "pca/scores/part-00000.parquet"
    features = read_rows(tmp_path / "features/part-00000.parquet")
    keys = ("path", "label", "split")
    assert [[row[k] for k in keys] for row in read_rows(part)] == [
        [row[k] for k in keys] for row in features
    ]
    assert pa.parquet.read_schema(part).metadata == {b"model": b"none"}


def test_flat_scores_have_numbered_columns(tmp_path: Path) -> None:
    rows = decaying(30, 16)
    write_model(STORE, str(tmp_path), fit(tmp_path, rows, components=12))
    write_scores(str(tmp_path), OPTIONS, 0)
    (table,) = iterate_scores(STORE, str(tmp_path), [0])
    assert table.column_names == [
        *("path", "label", "split"),
        *(f"pc_{number:03d}" for number in range(1, 13)),
    ]
    np.testing.assert_array_equal(table["pc_012"], vectors_of(tmp_path, layout.SCORES)[:, 11])


def test_planning_scores_computes_nothing(tmp_path: Path) -> None:
    store_parts(tmp_path, decaying(300, 16))
    before = names(tmp_path)
    scores_bag(str(tmp_path), OPTIONS, [0, 1, 2])
    assert scores_bag(str(tmp_path), OPTIONS, []) is None
    assert names(tmp_path) == before


# ---------------------------------------------------------------- real features, real workers


@pytest.fixture(scope="module")
def real_features(shared: Path) -> Rows:
    """Features of real photos by the bundled weights."""
    from fruits_dask.decode import decode  # noqa: PLC0415
    from fruits_dask.featurize import get_featurizer, install_weights  # noqa: PLC0415
    from fruits_dask.featurize.weights import load_weights  # noqa: PLC0415

    weights = load_weights("fruits", None, OPTIONS)
    install_weights(weights.sha256, weights.data)
    spec = weights.spec(engine="tensorflow")
    paths = sorted((shared / "data").rglob("*.jpg"))[::4]
    pixels = [decode(path.read_bytes(), image_px=spec.image_px) for path in paths]
    return get_featurizer(spec)(np.stack(pixels))


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
def test_real_features_in_one_batch_are_exact(real_features: Rows, tmp_path: Path) -> None:
    found = fit(tmp_path, real_features, components=100, size=64)
    np.testing.assert_allclose(
        found.explained_variance, exact(real_features, 100).explained_variance_, rtol=1e-8
    )


@pytest.mark.slow
def test_real_workers_have_nothing_to_complain_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither numpy on a worker nor the scheduler ("Detected different run_spec", dask#9888)."""
    from distributed import Client, LocalCluster  # noqa: PLC0415

    small_batches(monkeypatch, chunk=256, batch=1024)
    rows = decaying(4000, 64)
    counts = store_parts(tmp_path, rows)
    here = fit_pca(str(tmp_path), OPTIONS, counts, components=10)
    handler = BufferingHandler(capacity=1000)
    handler.setLevel(logging.WARNING)
    with (
        dask.config.set(scheduler=None),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        client.run(_make_warnings_errors)
        logging.getLogger("distributed").addHandler(handler)
        try:
            there = fit_pca(str(tmp_path), OPTIONS, counts, components=10)
            logs = client.get_worker_logs()
        finally:
            logging.getLogger("distributed").removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer] == []
    assert [line for lines in logs.values() for line in lines if line[0] != "INFO"] == []
    for name in PcaModel.__slots__:
        assert np.array_equal(getattr(here, name), getattr(there, name)), name


def _make_warnings_errors() -> None:
    import warnings  # noqa: PLC0415

    warnings.simplefilter("error", RuntimeWarning)
    np.seterr(all="raise", under="ignore")
