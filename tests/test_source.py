"""`source`: the listing of the input, its order, its labels and its samples."""

from __future__ import annotations

import doctest
import os
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Place
from fruits_dask import source
from fruits_dask.errors import InputError, NotFoundError
from fruits_dask.partition import partition_rows
from fruits_dask.records import IMAGE_SUFFIXES, SPLIT_NAMES, ObjectInfo, RowRange
from fruits_dask.source import (
    MANIFEST_SCHEMA,
    ManifestInfo,
    balanced_sample,
    label_and_split,
    read_manifest_info,
    read_rows,
    write_manifest,
)
from fruits_dask.storage import LocalStore

SMALL_GROUP_ROWS = 10


class Listing(LocalStore):
    """A store whose listing is given."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def list_images(self, root: str, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
        return (ObjectInfo(path=path, etag="e", size_bytes=1) for path in self.paths)


def manifest_of(paths: list[str], folder: Path, limit: int | None = None) -> pa.Table:
    """Make a manifest of a listing and read it back."""
    target = folder / "manifest.parquet"
    write_manifest(Listing(paths), "s3://b", LocalStore(), str(target), limit=limit)
    return pq.read_table(target)


def test_the_manifest_is_what_the_design_says(place: Place, tmp_path: Path) -> None:
    place.fill(
        "Training/Banana/1.jpg", "Test/Banana/2.jpg", "Training/Apple 1/\u00e9+ #.jpg", "x.txt"
    )
    target = place.at("out/manifest.parquet")
    info = write_manifest(place.store, place.root, place.store, target)
    table = pq.read_table(BytesIO(place.store.read(target)))
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert table.schema.names == ["path", "etag", "size_bytes", "label", "split"]
    assert table.select(["path", "label", "split"]).to_pylist() == [
        {"path": place.at("Test/Banana/2.jpg"), "label": "Banana", "split": "Test"},
        {
            "path": place.at("Training/Apple 1/\u00e9+ #.jpg"),
            "label": "Apple 1",
            "split": "Training",
        },
        {"path": place.at("Training/Banana/1.jpg"), "label": "Banana", "split": "Training"},
    ]
    n_bytes = sum(len(place.store.read(path)) for path in table["path"].to_pylist())
    assert info == ManifestInfo(
        n_images=3,
        n_bytes=n_bytes,
        labels={"Apple 1": 1, "Banana": 2},
        splits={"Test": 1, "Training": 2},
    )


def test_real_photos_are_all_listed(shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "fruits360"
    target = tmp_path / "manifest.parquet"
    info = write_manifest(LocalStore(), str(root), LocalStore(), str(target))
    files = [path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = pq.read_table(target)["path"].to_pylist()
    assert sorted(paths) == sorted(str(path) for path in files)
    assert paths == sorted(paths, key=os.fsencode)
    assert info.n_images == sum(info.labels.values()) == sum(info.splits.values()) == len(files)
    assert info.n_bytes == sum(path.stat().st_size for path in files)
    assert set(info.labels) == {path.name for path in root.glob("*/*") if path.is_dir()}


def test_the_same_input_gives_the_same_bytes(photos: list[Path], tmp_path: Path) -> None:
    root = str(photos[0].parent)
    targets = [tmp_path / "1", tmp_path / "2"]
    for target in targets:
        write_manifest(LocalStore(), root, LocalStore(), str(target))
    assert targets[0].read_bytes() == targets[1].read_bytes()


def test_an_input_without_images_is_refused(place: Place) -> None:
    place.fill("a.txt", "b/c.json")
    with pytest.raises(InputError, match=r"no image below .*\.jpeg"):
        write_manifest(place.store, place.root, place.store, place.at("manifest.parquet"))
    assert not place.store.exists(place.at("manifest.parquet"))


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        write_manifest(LocalStore(), str(tmp_path / "absent"), LocalStore(), str(tmp_path / "m"))


def test_the_input_is_never_written(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"1")
    before = [(path, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]]
    write_manifest(LocalStore(), str(folder), LocalStore(), str(tmp_path / "out" / "m"))
    assert [(path, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]] == before


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_ROW_GROUP_ROWS", SMALL_GROUP_ROWS)
    told: list[int] = []
    listing = Listing([f"s3://b/{number:03d}.jpg" for number in range(25)])
    write_manifest(listing, "s3://b", LocalStore(), str(tmp_path / "m"), on_listed=told.append)
    assert told == [10, 20, 25]


@given(names=st.lists(st.text("aB-/.\u00e9\u00ff\U0001f34e", max_size=5), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_any_listing_order_gives_byte_order(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    paths = [f"s3://b/{name}.jpg" for name in names]
    folder = tmp_path_factory.mktemp("order")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_ROW_GROUP_ROWS", 4)
        found = manifest_of(paths, folder)["path"].to_pylist()
    assert found == sorted(paths, key=str.encode)


# Labels


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/a.jpg", (None, None)),
        ("s3://bucket/Banana/a.jpg", ("Banana", None)),
        ("s3://bucket/train/Banana/a.jpg", ("Banana", "train")),
        ("s3://bucket/Training/Banana/more/a.jpg", ("more", None)),
        ("s3://bucket/training/Banana/a.jpg", ("Banana", None)),
        ("s3://Training/Banana/a.jpg", ("Banana", None)),
        ("s3://bucket/Training/a.jpg", ("Training", None)),
        ("s3://bucket/Training//a.jpg", (None, "Training")),
        ("/a.jpg", (None, None)),
        ("/Test/a.jpg", ("Test", None)),
        ("/Test/P\u00eache 1/a.jpg", ("P\u00eache 1", "Test")),
        ("/data/val/x/a.jpg", ("x", "val")),
    ],
)
def test_label_and_split_are_the_folders(
    path: str, expected: tuple[str | None, str | None]
) -> None:
    assert label_and_split(path) == expected


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_every_known_split_is_found(split: str) -> None:
    assert label_and_split(f"/data/{split}/Banana/a.jpg") == ("Banana", split)


def test_images_without_label_are_counted_but_not_named(tmp_path: Path) -> None:
    write_manifest(
        Listing(["s3://b/1.jpg", "s3://b/x/2.jpg"]), "s3://b", LocalStore(), str(tmp_path / "m")
    )
    with (tmp_path / "m").open("rb") as stream:
        info = read_manifest_info(stream)
    assert (info.n_images, info.labels, info.splits) == (2, {"x": 1}, {})


def test_examples() -> None:
    outcome = doctest.testmod(source)
    assert outcome.attempted
    assert not outcome.failed


# Rows of a partition


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sorted manifest of 95 images in row groups of 10."""
    target = tmp_path_factory.mktemp("rows") / "manifest.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_ROW_GROUP_ROWS", SMALL_GROUP_ROWS)
        listing = Listing([f"s3://b/{number:03d}.jpg" for number in range(95)])
        write_manifest(listing, "s3://b", LocalStore(), str(target))
    assert pq.ParquetFile(target).num_row_groups == 10
    return target


@given(size=st.integers(1, 100))
@settings(deadline=None, max_examples=40)
def test_the_rows_of_all_partitions_are_the_manifest(manifest: Path, size: int) -> None:
    parts = [read_rows(LocalStore(), str(manifest), rows) for rows in partition_rows(95, size)]
    assert all(part.schema.equals(MANIFEST_SCHEMA) for part in parts)
    assert pa.concat_tables(parts).equals(pq.read_table(manifest))


def test_a_partition_reads_little_more_than_its_rows(place: Place, manifest: Path) -> None:
    place.store.write(place.at("m"), manifest.read_bytes())
    table = read_rows(place.store, place.at("m"), RowRange(index=3, start=28, stop=42))
    assert table["path"].to_pylist() == [f"s3://b/{number:03d}.jpg" for number in range(28, 42)]


# Samples

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=60)


def codes_of(labels: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Give the labels numbers from 0 without a gap, as a dictionary does."""
    return np.unique(np.array(labels, np.int64), return_inverse=True)[1].astype(np.int64)


@given(labels=LABELS, limit=st.integers(1, 80))
@settings(deadline=None)
def test_a_sample_has_its_size_and_is_sorted(labels: list[int], limit: int) -> None:
    chosen = balanced_sample(codes_of(labels), limit).tolist()
    assert len(chosen) == min(limit, len(labels))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(len(labels)))


@given(labels=LABELS, limit=st.integers(1, 80))
@settings(deadline=None)
def test_a_sample_is_fair(labels: list[int], limit: int) -> None:
    codes = codes_of(labels)
    chosen = Counter(codes[balanced_sample(codes, limit)].tolist())
    most = max(chosen.values())
    for label, n_there in Counter(codes.tolist()).items():
        assert chosen[label] == n_there or chosen[label] >= most - 1


def test_a_sample_is_spread_over_its_label() -> None:
    chosen = balanced_sample(np.zeros(1000, np.int64), 10)
    assert np.diff(chosen).tolist() == [100] * 9
    assert 0 < chosen[0] < 100


def test_a_limit_takes_a_balanced_sorted_sample(tmp_path: Path) -> None:
    paths = [
        f"s3://b/{label}/{n:02d}.jpg" for label, many in (("a", 50), ("b", 3)) for n in range(many)
    ]
    table = manifest_of(paths, tmp_path, limit=9)
    assert Counter(table["label"].to_pylist()) == {"a": 6, "b": 3}
    assert table["path"].to_pylist() == sorted(table["path"].to_pylist())
    assert table.schema.equals(MANIFEST_SCHEMA)


def test_a_limit_above_the_number_takes_all(tmp_path: Path) -> None:
    paths = [f"s3://b/{number}.jpg" for number in range(5)]
    assert manifest_of(paths, tmp_path, limit=100)["path"].to_pylist() == paths


def test_a_limit_knows_images_without_label(tmp_path: Path) -> None:
    paths = [f"s3://b/{number}.jpg" for number in range(20)] + ["s3://b/x/1.jpg"]
    table = manifest_of(paths, tmp_path, limit=4)
    assert Counter(table["label"].to_pylist()) == {None: 3, "x": 1}
