"""The model's file, the projection of all parts, and their table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import dask
import numpy as np
import pyarrow as pa
import pytest

from fruits_dask import layout
from fruits_dask.errors import NotFoundError, ResultError
from fruits_dask.reduce import (
    PcaModel,
    fit_pca,
    read_model,
    scores_bag,
    write_model,
    write_scores_csv,
)
from fruits_dask.reduce import scores as scores_module
from fruits_dask.reduce.rows import ahead
from fruits_dask.reduce.scores import flat_scores, write_scores
from jobs import OPTIONS, Delegate, names, read_rows, vectors_of
from reduced import STORE, decaying, fit, store_parts


@pytest.fixture(autouse=True)
def without_workers() -> Iterator[None]:
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PcaModel:
    with dask.config.set(scheduler="synchronous"):
        return fit(tmp_path_factory.mktemp("model"), decaying(200, 16), components=5)


def assert_same_model(found: PcaModel, expected: PcaModel) -> None:
    for name in PcaModel.__slots__:
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


# ---------------------------------------------------------------- the file


def test_a_model_is_read_as_it_was_written(model: PcaModel, tmp_path: Path) -> None:
    write_model(STORE, str(tmp_path), model)
    again = read_model(STORE, str(tmp_path))
    assert_same_model(again, model)
    assert isinstance(again.exact_share, float)
    assert isinstance(again.n_samples, int)
    with np.load(tmp_path / layout.PCA_MODEL, allow_pickle=False) as stored:
        assert set(stored.files) == set(PcaModel.__slots__)


def test_a_model_that_was_not_measured_says_so(model: PcaModel, tmp_path: Path) -> None:
    """As those of earlier versions."""
    write_model(STORE, str(tmp_path), replace(model, exact_share=None))
    with np.load(tmp_path / layout.PCA_MODEL, allow_pickle=False) as stored:
        assert "exact_share" not in stored.files
    assert read_model(STORE, str(tmp_path)).exact_share is None


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


# ---------------------------------------------------------------- scores


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


@dataclass(slots=True, kw_only=True)
class ReadingStore(Delegate):
    """Remembers what was read, in order."""

    reads: list[str] = field(default_factory=list)

    def read(self, path: str) -> bytes:
        self.reads.append(Path(path).name)
        return self.inner.read(path)


def test_a_task_projects_several_parts_and_reads_the_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = store_parts(tmp_path, decaying(200, 16), size=10)
    write_model(STORE, str(tmp_path), fit_pca(str(tmp_path), OPTIONS, counts, components=3))
    store = ReadingStore(inner=STORE)
    monkeypatch.setattr(scores_module, "open_store", lambda address, options: store)
    bag = scores_bag(str(tmp_path), OPTIONS, range(20))
    assert bag is not None
    assert bag.compute() == [10] * 20
    assert bag.npartitions < 20
    assert store.reads.count("model.npz") == bag.npartitions
    assert len(store.reads) == 20 + bag.npartitions


def test_scores_keep_the_keys_and_metadata_of_their_part(tmp_path: Path) -> None:
    rows = decaying(30, 16)
    write_model(STORE, str(tmp_path), fit(tmp_path, rows, components=3))
    assert write_scores(str(tmp_path), OPTIONS, [0]) == [30]
    part = tmp_path / "pca/scores/part-00000.parquet"
    features = read_rows(tmp_path / "features/part-00000.parquet")
    keys = ("path", "label", "split")
    assert [[row[k] for k in keys] for row in read_rows(part)] == [
        [row[k] for k in keys] for row in features
    ]
    assert pa.parquet.read_schema(part).metadata == {b"model": b"none"}


def test_planning_scores_computes_nothing(tmp_path: Path) -> None:
    store_parts(tmp_path, decaying(300, 16))
    before = names(tmp_path)
    scores_bag(str(tmp_path), OPTIONS, [0, 1, 2])
    assert scores_bag(str(tmp_path), OPTIONS, []) is None
    assert names(tmp_path) == before


# ---------------------------------------------------------------- the table


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Store a result of 205 rows in 21 parts, twelve components."""
    splits = [None if number % 4 else "Test" for number in range(205)]
    found = fit(tmp_path, decaying(205, 16), components=12, size=10, splits=splits)
    write_model(STORE, str(tmp_path), found)
    write_scores(str(tmp_path), OPTIONS, range(21))
    return tmp_path


def test_flat_scores_have_numbered_columns(scored: Path) -> None:
    tables = list(flat_scores(STORE, str(scored), range(21)))
    assert 1 < len(tables) < 21
    table = pa.concat_tables(tables)
    assert table.column_names == [
        *("path", "label", "split"),
        *(f"pc_{number:03d}" for number in range(1, 13)),
    ]
    np.testing.assert_array_equal(table["pc_012"], vectors_of(scored, layout.SCORES)[:, 11])


def test_the_table_holds_all_rows_in_their_order(scored: Path) -> None:
    write_scores_csv(STORE, str(scored), range(21))
    with (scored / layout.SCORES_CSV).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [f"/in/{number:05d}.jpg" for number in range(205)]
    assert {row["split"] for row in rows} == {"", "Test"}
    found = np.array([[row[f"pc_{i:03d}"] for i in range(1, 13)] for row in rows], np.float32)
    np.testing.assert_array_equal(found, vectors_of(scored, layout.SCORES))


def test_a_part_that_is_missing_leaves_no_table(scored: Path) -> None:
    (scored / "pca/scores/part-00017.parquet").unlink()
    with pytest.raises(NotFoundError):
        write_scores_csv(STORE, str(scored), range(21))
    assert not (scored / layout.SCORES_CSV).exists()


# ---------------------------------------------------------------- reading ahead


def test_ahead_keeps_the_order_and_a_bound() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    results = ahead(lambda number: number * 2, items())
    for expected in range(50):
        assert next(results) == expected * 2
        assert len(taken) - expected <= 8
    assert next(results, None) is None


def test_ahead_raises_what_went_wrong() -> None:
    results = ahead(lambda number: 1 // (3 - number), range(50))
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        list(results)
