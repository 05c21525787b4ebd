"""`results`: what a result was made from, if it may be written, and what is removed of it."""

from __future__ import annotations

import csv
import hashlib
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Place
from fruits_dask import __version__, layout
from fruits_dask.errors import OutputExistsError, ResultError
from fruits_dask.features import vector_table, write_table
from fruits_dask.records import FORMAT_VERSION
from fruits_dask.reduce import write_scores_csv
from fruits_dask.results import (
    Identity,
    check_ours,
    check_same,
    is_complete,
    new_record,
    read_record,
    remove_result,
    remove_temporaries,
    write_record,
    write_success,
)
from fruits_dask.storage import LocalStore

IDENTITY = Identity(
    values={
        "format_version": 1,
        "input": "s3://fruits/p\u00eache",
        "limit": None,
        "components": 0.95,
    }
)
VALUES = st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
WHOLE = (
    "_SUCCESS",
    "run.json",
    "manifest.parquet",
    "features/part-00000.parquet",
    "failures/part-00000.parquet",
    "pca/model.npz",
    "pca/scores/part-00000.parquet",
    "pca/scores.csv",
    "report.html",
    "report/dask-performance.html",
    "report/thumbnails/part-00000.parquet",
)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(kind="local", store=LocalStore(), root=str(tmp_path / "out"))


@given(values=st.dictionaries(st.text(max_size=5), VALUES, max_size=6))
@settings(deadline=None, max_examples=50)
def test_a_fingerprint_does_not_know_the_order_of_names(values: dict[str, Any]) -> None:
    backwards = dict(reversed(values.items()))
    assert Identity(values=values).fingerprint == Identity(values=backwards).fingerprint


@given(name=st.sampled_from(sorted(IDENTITY.values)), value=VALUES)
@settings(deadline=None, max_examples=50)
def test_a_fingerprint_changes_with_any_value(name: str, value: object) -> None:
    other = Identity(values={**IDENTITY.values, name: value})
    is_same = json.dumps(IDENTITY.values[name]) == json.dumps(value)
    assert (other.fingerprint == IDENTITY.fingerprint) == is_same


def test_a_fingerprint_survives_versions() -> None:
    text = r'{"components":0.95,"format_version":1,"input":"s3://fruits/p\u00eache","limit":null}'
    assert IDENTITY.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_a_record_makes_the_round_trip(place: Place) -> None:
    record = new_record(IDENTITY)
    write_record(place.store, place.root, record)
    found = read_record(place.store, place.root)
    assert found == record
    assert Identity(values=found["identity"]).fingerprint == found["fingerprint"]


def test_a_new_record_says_what_made_it() -> None:
    record = new_record(IDENTITY)
    assert record["format_version"] == FORMAT_VERSION
    assert record["fingerprint"] == IDENTITY.fingerprint
    assert record["stages"] == {}
    assert record["versions"]["numpy"] == np.__version__
    assert record["versions"]["fruits_dask"] == __version__


def test_a_record_is_readable_json(local: Place) -> None:
    write_record(local.store, local.root, new_record(IDENTITY))
    text = Path(local.at("run.json")).read_text("utf-8")
    assert "p\u00eache" in text
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_no_record_is_none(place: Place) -> None:
    assert read_record(place.store, place.root) is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"format_version": 1', b"\xff\xfe"])
def test_a_damaged_record_is_told(local: Place, content: bytes) -> None:
    local.store.write(local.at("run.json"), content)
    with pytest.raises(ResultError, match=r"run\.json is damaged .*--overwrite"):
        read_record(local.store, local.root)


@pytest.mark.parametrize(
    "content", [[], None, {}, {"format_version": FORMAT_VERSION + 1}, {"format_version": "1"}]
)
def test_another_format_is_refused(local: Place, content: object) -> None:
    local.store.write(local.at("run.json"), json.dumps(content).encode())
    with pytest.raises(ResultError, match=f"not of format {FORMAT_VERSION}.*{__version__}"):
        read_record(local.store, local.root)


@pytest.mark.parametrize("lost", ["identity", "stages", "fingerprint"])
def test_a_record_that_lacks_something_is_refused(local: Place, lost: str) -> None:
    record = new_record(IDENTITY)
    del record[lost]
    write_record(local.store, local.root, record)
    with pytest.raises(ResultError, match=r"run\.json"):
        read_record(local.store, local.root)


def test_the_same_settings_may_resume() -> None:
    stored = json.loads(json.dumps(new_record(IDENTITY)))
    check_same(stored, IDENTITY, "/out")


def test_other_settings_are_refused_with_every_difference() -> None:
    now = Identity(values={**IDENTITY.values, "limit": 5, "components": 100, "engine": "new"})
    with pytest.raises(OutputExistsError) as caught:
        check_same(new_record(IDENTITY), now, "/the/output")
    message = str(caught.value)
    assert "/the/output holds a result of other settings" in message
    assert "  components: there 0.95, now 100\n" in message
    assert "  limit: there None, now 5\n" in message
    assert "  engine: there None, now 'new'\n" in message
    assert "input:" not in message
    assert "--overwrite" in message


def test_a_setting_that_is_gone_is_a_difference_too() -> None:
    now = Identity(values={k: v for k, v in IDENTITY.values.items() if k != "input"})
    with pytest.raises(OutputExistsError, match="input: there 's3://fruits/p\u00eache', now None"):
        check_same(new_record(IDENTITY), now, "/out")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        (),
        ("run.json",),
        (*WHOLE, ".locks/0123.json"),
        (".locks/0123.json",),
        (".run.json.0a1b2c3d.fruits-tmp", ".locks/.0.json.0a1b2c3d.fruits-tmp"),
        ("run.json", "features/.part-00001.parquet.0a1b2c3d.fruits-tmp"),
    ],
)
def test_a_result_and_what_a_killed_run_left_are_ours(
    names: tuple[str, ...], overwrite: bool
) -> None:
    check_ours(names, "/out", overwrite=overwrite)


STRANGE = (
    *("thesis.txt", "photos/a.jpg", "features2/a", "Run.json", ".git/x", ".locksmith"),
    *("features/a.jpg", "features/part-00000.parquet/x", "report/thesis.txt", "pca/part-1.parquet"),
)


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("names", [WHOLE, ()])
def test_strange_files_are_never_removed(strange: str, names: tuple[str, ...]) -> None:
    with pytest.raises(OutputExistsError, match="1 files that are not of fruits_dask") as caught:
        check_ours([*names, strange], "/the/output", overwrite=True)
    assert strange in str(caught.value)
    assert "/the/output" in str(caught.value)


@pytest.mark.parametrize("strange", STRANGE)
def test_strange_files_do_not_hinder_a_resumption(strange: str) -> None:
    check_ours([*WHOLE, strange], "/the/output", overwrite=False)
    with pytest.raises(OutputExistsError):
        check_ours([strange], "/the/output", overwrite=False)


@pytest.mark.parametrize("name", [".DS_Store", "features/Thumbs.db", "", "console/", ".doctor-1"])
def test_what_desktops_and_consoles_leave_is_ignored(name: str) -> None:
    check_ours([*WHOLE, name], "/out", overwrite=True)
    check_ours([name], "/out", overwrite=False)


@pytest.mark.parametrize("name", ["features/part-00000.parquet", "_SUCCESS"])
def test_files_without_a_record_are_only_replaced_when_asked(name: str) -> None:
    with pytest.raises(OutputExistsError, match="--overwrite") as caught:
        check_ours([name], "/out", overwrite=False)
    assert name in str(caught.value)
    check_ours([name], "/out", overwrite=True)


def test_a_removal_takes_the_result_and_nothing_else(place: Place) -> None:
    others = [
        ".locks/0123.json",
        "features2/part-00000.parquet",
        "pca.txt",
        "report.html.bak",
        "run.json.old",
    ]
    place.fill(*WHOLE, *others)
    beside = f"{place.root}-2/run.json"
    place.store.write(beside, b"{}")
    remove_result(place.store, place.root)
    assert place.names() == others
    assert place.store.exists(beside)


def test_a_removal_begins_with_what_makes_a_result(local: Place) -> None:
    class Watched(LocalStore):
        removed: list[str] = []  # noqa: RUF012 - one instance

        def remove(self, path: str) -> None:
            self.removed.append(path)

    remove_result(Watched(), local.root)
    assert Watched.removed[:2] == [local.at("_SUCCESS"), local.at("run.json")]
    assert len(Watched.removed) == len(layout.RESULT_NAMES)


def test_left_behind_temporaries_are_removed_and_locks_kept(local: Place) -> None:
    kept = [".locks/.0123.json.0a1b2c3d.fruits-tmp", ".locks/0123.json", "run.json"]
    gone = [".run.json.0a1b2c3d.fruits-tmp", "features/.part-00000.parquet.0a1b2c3d.fruits-tmp"]
    local.fill(*kept, *gone)
    remove_temporaries(local.store, local.root, local.names())
    assert local.names() == kept


def test_a_result_is_complete_with_its_last_mark(place: Place) -> None:
    place.fill(*(name for name in WHOLE if name != "_SUCCESS"))
    assert not is_complete(place.store, place.root)
    write_success(place.store, place.root)
    assert is_complete(place.store, place.root)
    assert place.store.read(place.at("_SUCCESS")) == b""


def test_scores_are_joined_to_one_table(place: Place) -> None:
    rows = [("s3://b/A, 1/a.jpg", "A, 1", "Test"), ('s3://b/"q"/\u00e9.jpg', '"q"', None)]
    for index, (path, label, split) in enumerate(rows):
        keys = pa.table({"path": [path], "label": [label], "split": pa.array([split], pa.string())})
        scores = np.array([[0.1, -2.5, index]], np.float32)
        table = vector_table(keys, scores, "scores", {"model": "m"})
        write_table(place.store, layout.part_path(place.root, layout.SCORES, index), table)
    write_scores_csv(place.store, place.root, [0, 1])
    text = place.store.read(place.at("pca/scores.csv")).decode()
    assert list(csv.reader(StringIO(text))) == [
        ["path", "label", "split", "pc_001", "pc_002", "pc_003"],
        [*rows[0], "0.1", "-2.5", "0"],
        [rows[1][0], '"q"', "", "0.1", "-2.5", "1"],
    ]
