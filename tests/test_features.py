"""`features`: the stored parts, exactly as the design has them."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import Place
from fruits_dask import __version__, layout
from fruits_dask.errors import NotFoundError, ResultError
from fruits_dask.features import (
    count_part,
    metadata,
    part_indices,
    read_table,
    read_vectors,
    to_json,
    vector_table,
    write_failures,
    write_table,
    write_thumbnails,
)
from fruits_dask.records import Failure, Features, FeaturizerSpec, PartCount
from fruits_dask.source import MANIFEST_SCHEMA
from fruits_dask.storage import LocalStore

N_FEATURES = 7
SPEC = FeaturizerSpec(
    backbone="mobilenet_v2",
    engine="tensorflow",
    weights_sha256="ab" * 32,
    image_px=224,
    n_features=N_FEATURES,
    preprocessing="RGB / 127.5 - 1",
)
FAILURE = Failure(
    path="s3://b/\u00e9.jpg", stage="decode", error="TruncatedImageError", message="m"
)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(kind="local", store=LocalStore(), root=str(tmp_path / "out"))


def keys_of(splits: list[str | None]) -> pa.Table:
    """Rows of a manifest, one for each split."""
    rows = [
        {"path": f"s3://b/{n}.jpg", "etag": "e", "size_bytes": n, "label": "Banana", "split": split}
        for n, split in enumerate(splits)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def vectors_of(n_rows: int, n_columns: int = N_FEATURES) -> Features:
    """Distinct numbers."""
    return np.arange(n_rows * n_columns, dtype=np.float32).reshape(n_rows, n_columns) / 3


def write_part(place: Place, index: int, splits: list[str | None]) -> str:
    """Store a features part."""
    table = vector_table(keys_of(splits), vectors_of(len(splits)), "features", metadata(SPEC))
    path = layout.part_path(place.root, layout.FEATURES, index)
    write_table(place.store, path, table)
    return path


@pytest.mark.parametrize("splits", [["Training", None], []])
def test_the_schema_is_that_of_the_design(local: Place, splits: list[str | None]) -> None:
    schema = pq.read_schema(write_part(local, 0, splits))
    assert schema.names == ["path", "label", "split", "features"]
    assert schema.types[:3] == [pa.string()] * 3
    assert schema.field("features").type == pa.list_(pa.float32(), N_FEATURES)
    assert not schema.field("path").nullable
    assert not schema.field("features").nullable
    assert schema.field("split").nullable


def test_the_metadata_says_how_features_were_made(place: Place) -> None:
    found = read_vectors(place.store, write_part(place, 0, ["Test"]), "features").metadata
    expected = {
        "model": "mobilenet_v2",
        "engine": "tensorflow",
        "weights_sha256": "ab" * 32,
        "package_version": __version__,
        "format_version": "1",
    }
    assert expected.items() <= found.items()
    assert "224 px" in found["preprocessing"]
    assert SPEC.preprocessing in found["preprocessing"]
    assert all(isinstance(value, str) for value in metadata(SPEC).values())


def test_vectors_make_the_round_trip(place: Place) -> None:
    part = read_vectors(place.store, write_part(place, 3, ["Training", None, "Test"]), "features")
    assert part.vectors.dtype == np.float32
    np.testing.assert_array_equal(part.vectors, vectors_of(3))
    assert (
        part.keys.to_pylist()
        == keys_of(["Training", None, "Test"]).select(["path", "label", "split"]).to_pylist()
    )


@given(
    vectors=arrays(
        np.float32,
        st.tuples(st.integers(0, 20), st.integers(1, 30)),
        elements=st.floats(width=32, allow_nan=False),
    )
)
@settings(deadline=None, max_examples=40)
def test_every_number_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, vectors: Features
) -> None:
    path = str(tmp_path_factory.mktemp("part") / "part")
    table = vector_table(keys_of([None] * len(vectors)), vectors, "scores", {})
    write_table(LocalStore(), path, table)
    found = read_vectors(LocalStore(), path, "scores").vectors
    assert found.shape == vectors.shape
    assert found.tobytes() == vectors.tobytes()


@pytest.mark.parametrize("order", ["C", "F"])
def test_any_memory_order_is_stored_row_by_row(local: Place, order: str) -> None:
    vectors = np.asarray(vectors_of(4), order="F" if order == "F" else "C")[::2]
    table = vector_table(keys_of([None] * 2), vectors, "features", {})
    np.testing.assert_array_equal(np.array(table["features"].to_pylist()), vectors_of(4)[::2])


def test_rows_and_keys_must_agree() -> None:
    with pytest.raises(pa.ArrowInvalid):
        vector_table(keys_of([None]), vectors_of(2), "features", {})


def test_the_same_rows_give_the_same_bytes(local: Place) -> None:
    paths = [write_part(local, index, ["Training", None]) for index in (0, 1)]
    assert local.store.read(paths[0]) == local.store.read(paths[1])


def test_other_tools_read_all_parts_as_one_table(local: Place) -> None:
    for index, splits in enumerate([["Training"], [], [None, "Test"]]):
        write_part(local, index, splits)
    table = ds.dataset(local.at("features")).to_table()
    assert table["split"].to_pylist() == ["Training", None, "Test"]
    assert table["features"].type == pa.list_(pa.float32(), N_FEATURES)


def test_rows_are_counted(place: Place) -> None:
    write_part(place, 2, ["Training", "train", "Test", None, "Validation"])
    write_failures(place.store, place.root, 2, [FAILURE, FAILURE])
    found = count_part(place.store, place.root, 2)
    assert found == PartCount(index=2, n_features=5, n_training=2, n_failures=2)


def test_a_partition_without_anything_counts_nothing(place: Place) -> None:
    write_part(place, 0, [])
    write_failures(place.store, place.root, 0, [])
    found = count_part(place.store, place.root, 0)
    assert found == PartCount(index=0, n_features=0, n_training=0, n_failures=0)


def test_a_missing_failures_part_counts_none(local: Place) -> None:
    write_part(local, 0, [None])
    assert count_part(local.store, local.root, 0).n_failures == 0


def test_a_missing_features_part_is_not_found(local: Place) -> None:
    with pytest.raises(NotFoundError):
        count_part(local.store, local.root, 0)


@pytest.mark.parametrize("failures", [[FAILURE], []])
def test_failures_make_the_round_trip(local: Place, failures: list[Failure]) -> None:
    write_failures(local.store, local.root, 0, failures)
    table = read_table(local.store, local.at("failures/part-00000.parquet"))
    assert table.schema.names == ["path", "stage", "error", "message"]
    assert table.schema.types == [pa.string()] * 4
    assert [Failure(**row) for row in table.to_pylist()] == failures


def test_thumbnails_make_the_round_trip(local: Place) -> None:
    write_thumbnails(local.store, local.root, 1, {"s3://b/a.jpg": b"\xff\xd8", "b": b""})
    table = read_table(local.store, local.at("report/thumbnails/part-00001.parquet"))
    assert table.to_pydict() == {"path": ["s3://b/a.jpg", "b"], "jpeg": [b"\xff\xd8", b""]}


def test_one_column_can_be_read_alone(place: Place) -> None:
    path = write_part(place, 0, ["Test", None])
    assert read_table(place.store, path, ["split"]).to_pydict() == {"split": ["Test", None]}


def test_parts_are_listed_by_number(place: Place) -> None:
    assert part_indices(place.store, place.root, layout.FEATURES) == []
    place.fill(
        "features/part-100000.parquet",
        "features/part-00009.parquet",
        "features/part-00010.parquet",
        "features/.part-00003.parquet.0a1b2c3d.fruits-tmp",
        "features/notes.txt",
        "failures/part-00001.parquet",
    )
    assert part_indices(place.store, place.root, layout.FEATURES) == [9, 10, 100000]


@pytest.mark.parametrize("columns", [None, ["split"]])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "head", "middle"])
def test_a_damaged_part_is_told_by_its_name(
    local: Place, damage: str, columns: list[str] | None
) -> None:
    path = write_part(local, 0, ["Training", None] * 50)
    data = bytearray(local.store.read(path))
    if damage == "middle":
        footer = int.from_bytes(data[-8:-4], "little") + 8
        data[4:-footer] = b"\xff" * (len(data) - footer - 4)
    damaged = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "text": b"no parquet " * 100,
        "head": data[100:],
        "middle": bytes(data),
    }
    local.store.write(path, bytes(damaged[damage]))
    with pytest.raises(ResultError, match=f"{path} is damaged"):
        read_table(local.store, path, columns)


def test_a_part_without_its_vectors_is_told(local: Place) -> None:
    write_failures(local.store, local.root, 0, [FAILURE])
    path = local.at("failures/part-00000.parquet")
    with pytest.raises(ResultError, match="features"):
        read_vectors(local.store, path, "features")


def test_a_part_appears_whole(local: Place) -> None:
    path = write_part(local, 0, ["Test"])
    assert [entry.name for entry in Path(path).parent.iterdir()] == ["part-00000.parquet"]
    assert pq.ParquetFile(BytesIO(local.store.read(path))).metadata.num_rows == 1


def test_json_is_sorted_and_readable() -> None:
    text = to_json({"b": "p\u00eache", "a": [1, None]}).decode()
    assert text == '{\n  "a": [\n    1,\n    null\n  ],\n  "b": "p\u00eache"\n}\n'
    assert json.loads(text) == {"a": [1, None], "b": "p\u00eache"}
