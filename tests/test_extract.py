"""One partition's work: every image ends in exactly one place, whatever happens to it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed.protocol.pickle import dumps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fruits_dask import extract, featurize, layout
from fruits_dask.decode import decode, thumbnail
from fruits_dask.errors import AccessDeniedError, StorageError, WeightsError
from fruits_dask.extract import (
    Tally,
    counts_bag,
    extract_partition,
    extraction_bag,
    retry_bag,
    retry_partition,
)
from fruits_dask.features import count_part, metadata, read_vectors
from fruits_dask.records import Features, FeaturizerSpec, PartCount, Pixels, RowRange
from fruits_dask.storage import LocalStore, Store
from jobs import (
    OPTIONS,
    SPEC,
    SPOILED_LATER,
    SPOILERS,
    FailingStore,
    KillError,
    MeanColours,
    Planned,
    RecordingStore,
    RefusingStore,
    names,
    photo,
    plan_job,
    read_rows,
    schema_of,
    snapshot,
    tables,
    vectors_of,
    write_photos,
)

MAX_CHANGES = 4


@pytest.fixture(autouse=True)
def mean_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(featurize._featurizers, SPEC, MeanColours())


def do_all(planned: Planned) -> None:
    for rows in planned.partitions:
        extract_partition(planned.job, rows)


def use_store(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    """Let the unit of work meet this store."""
    monkeypatch.setattr(extract, "open_store", lambda address, options: store)


def assert_each_in_one_place(planned: Planned) -> None:
    features = [row["path"] for row in planned.rows(layout.FEATURES)]
    failures = [row["path"] for row in planned.rows(layout.FAILURES)]
    assert sorted(features + failures) == sorted(planned.listed())
    assert features == sorted(features, key=str.encode)


def the_failure(planned: Planned, path: Path) -> dict[str, str]:
    found = [row for row in planned.rows(layout.FAILURES) if row["path"] == str(path)]
    assert len(found) == 1
    return found[0]


# ---------------------------------------------------------------- good images


def test_rows_are_the_features_of_their_images(tmp_path: Path) -> None:
    """Not of their neighbours: each row is computed again, alone."""
    paths = write_photos(tmp_path / "in", 11)
    planned = plan_job(tmp_path / "in", tmp_path / "out", size=4)
    do_all(planned)
    rows = planned.rows(layout.FEATURES)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for path, row in zip(paths, rows, strict=True):
        alone = MeanColours()(decode(path.read_bytes(), image_px=16)[None])[0]
        np.testing.assert_array_equal(np.asarray(row["features"], np.float32), alone)
        assert (row["split"], row["label"]) == path.parts[-3:-1]


def test_parts_have_the_promised_columns_and_metadata(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 3)
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    do_all(planned)
    path = tmp_path / "out/features/part-00000.parquet"
    schema = schema_of(path)
    assert schema.names == ["path", "label", "split", "features"]
    assert str(schema.field("features").type) == "fixed_size_list<element: float>[48]"
    assert read_vectors(LocalStore(), str(path), "features").metadata == metadata(SPEC)
    failures = schema_of(tmp_path / "out/failures/part-00000.parquet")
    assert failures.names == ["path", "stage", "error", "message"]


def test_more_images_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the work is cut inside a partition does not show."""
    write_photos(tmp_path / "in", 23)
    whole = plan_job(tmp_path / "in", tmp_path / "whole", size=23)
    do_all(whole)
    monkeypatch.setattr(extract, "_CHUNK_IMAGES", 5)
    cut = plan_job(tmp_path / "in", tmp_path / "cut", size=23)
    do_all(cut)
    assert tables(cut.output) == tables(whole.output)


def test_no_more_than_a_chunk_is_decoded_before_it_is_featurized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels in memory do not grow with the partition."""
    sizes: list[int] = []

    class Counting(MeanColours):
        def __call__(self, pixels: Pixels) -> Features:
            sizes.append(len(pixels))
            return super().__call__(pixels)

    monkeypatch.setitem(featurize._featurizers, SPEC, Counting())
    monkeypatch.setattr(extract, "_CHUNK_IMAGES", 8)
    write_photos(tmp_path / "in", 20)
    do_all(plan_job(tmp_path / "in", tmp_path / "out", size=20))
    assert sizes == [8, 8, 4]


def test_the_summary_tells_what_is_stored(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "in", 6)
    paths[2].write_bytes(b"")
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    summary = extract_partition(planned.job, planned.partitions[0])
    assert (summary.n_images, summary.n_failures) == (6, 1)
    assert set(summary.seconds) == {"read", "decode", "featurize", "store"}
    assert all(seconds > 0 for seconds in summary.seconds.values())
    assert 10e6 < summary.peak_memory_bytes < 100e9


def test_repeating_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "in", 12)
    paths[7].write_bytes(b"text")
    planned = plan_job(tmp_path / "in", tmp_path / "out", size=5)
    do_all(planned)
    first = tables(planned.output)
    do_all(planned)
    assert tables(planned.output) == first


def test_the_input_is_not_touched(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "in", 5)
    paths[0].write_bytes(SPOILERS["truncated"][0])
    before = snapshot(tmp_path / "in")
    do_all(plan_job(tmp_path / "in", tmp_path / "out"))
    assert snapshot(tmp_path / "in") == before


# ---------------------------------------------------------------- bad images


@pytest.mark.parametrize("kind", SPOILERS)
def test_a_bad_file_is_a_row_and_the_others_go_on(kind: str, tmp_path: Path) -> None:
    content, error = SPOILERS[kind]
    paths = write_photos(tmp_path / "in", 9)
    paths[4].write_bytes(content)
    planned = plan_job(tmp_path / "in", tmp_path / "out", size=4)
    do_all(planned)
    assert_each_in_one_place(planned)
    assert len(planned.rows(layout.FEATURES)) == 8
    failure = the_failure(planned, paths[4])
    assert (failure["stage"], failure["error"]) == ("decode", error)
    assert len(failure["message"]) > 10
    assert "Traceback" not in failure["message"]


@pytest.mark.parametrize("kind", SPOILED_LATER)
def test_what_changed_since_the_plan_is_a_row(kind: str, tmp_path: Path) -> None:
    spoil, error = SPOILED_LATER[kind]
    paths = write_photos(tmp_path / "in", 5)
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    spoil(paths[1])
    do_all(planned)
    assert_each_in_one_place(planned)
    failure = the_failure(planned, paths[1])
    assert (failure["stage"], failure["error"]) == ("read", error)
    assert str(paths[1]) in failure["message"]


def test_a_vanished_file_says_that_it_was_there(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "in", 2)
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    paths[0].unlink()
    do_all(planned)
    assert "was there when the input was listed" in the_failure(planned, paths[0])["message"]


@pytest.mark.parametrize(
    "error", [AccessDeniedError("the bucket says no"), StorageError("the connection broke")]
)
def test_what_the_store_refuses_is_a_row(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_photos(tmp_path / "in", 6)
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    use_store(monkeypatch, RefusingStore(refused={str(paths[3]): error}))
    do_all(planned)
    assert_each_in_one_place(planned)
    failure = the_failure(planned, paths[3])
    assert failure["stage"] == "read"
    assert failure["error"] == type(error).__name__
    assert failure["message"] == str(error)


def test_a_folder_with_the_name_of_a_photo_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in/Training/x.jpg").mkdir(parents=True)
    (tmp_path / "in/Training/x.jpg/real.jpg").write_bytes(photo(0))
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    do_all(planned)
    assert [(row["label"], row["split"]) for row in planned.rows(layout.FEATURES)] == [
        ("x.jpg", "Training")
    ]


def test_a_name_that_is_no_text_is_a_row(tmp_path: Path) -> None:
    """It cannot be stored in a table as it is; it must not stop the others."""
    write_photos(tmp_path / "in", 2)
    Path(str(tmp_path / "in"), "a\udcff.jpg").write_bytes(photo(9))
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    do_all(planned)
    assert_each_in_one_place(planned)
    assert the_failure(planned, tmp_path / "in" / "a\\xff.jpg")["error"] == "NotFoundError"


def test_an_image_over_the_limit_is_not_decoded(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "in", 3, side_px=100)
    paths[0].write_bytes(photo(0, side_px=90))
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    planned = replace(planned, job=replace(planned.job, max_megapixels=0.009))
    do_all(planned)
    failures = planned.rows(layout.FAILURES)
    assert [row["path"] for row in failures] == [str(path) for path in paths[1:]]
    assert {row["error"] for row in failures} == {"PixelBombError"}


def test_a_partition_without_one_good_image(tmp_path: Path) -> None:
    for path in write_photos(tmp_path / "in", 5):
        path.write_bytes(b"")
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    do_all(planned)
    assert_each_in_one_place(planned)
    features = tmp_path / "out/features/part-00000.parquet"
    assert read_rows(features) == []
    assert str(schema_of(features).field("features").type) == "fixed_size_list<element: float>[48]"


class Broken(MeanColours):
    """Gives no number for images that are mostly red."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def __call__(self, pixels: Pixels) -> Features:
        features = super().__call__(pixels)
        is_red = pixels[..., 0].mean((1, 2)) > 2 * pixels[..., 1].mean((1, 2))
        features[is_red, 5] = self._value
        return features


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers_are_failures(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(featurize._featurizers, SPEC, Broken(value))
    paths = write_photos(tmp_path / "in", 8)
    for red in (paths[1], paths[6]):
        Image.new("RGB", (20, 20), (250, 10, 10)).save(red)
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    do_all(planned)
    assert_each_in_one_place(planned)
    failures = planned.rows(layout.FAILURES)
    bad = {str(paths[1]), str(paths[6])}
    assert {row["path"] for row in failures if row["stage"] == "featurize"} >= bad
    assert {row["error"] for row in failures} == {"FloatingPointError"}
    assert np.isfinite(vectors_of(planned.output, layout.FEATURES)).all()
    thumbnails = {row["path"] for row in planned.rows(layout.THUMBNAILS)}
    assert thumbnails.isdisjoint(bad)


def test_weights_that_never_arrived_stop_the_task(tmp_path: Path) -> None:
    """A defect of the run and not of its images: no row of failures."""
    write_photos(tmp_path / "in", 2)
    other = replace(SPEC, weights_sha256="1" * 64)
    planned = plan_job(tmp_path / "in", tmp_path / "out", spec=other)
    with pytest.raises(WeightsError, match="not on this worker"):
        do_all(planned)
    assert names(planned.output) == {layout.MANIFEST}


Fate = st.sampled_from(["good", *SPOILERS, *SPOILED_LATER])


@given(fates=st.lists(Fate, min_size=1, max_size=14), size=st.integers(1, 6))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_listed_image_is_in_exactly_one_place(fates: list[str], size: int) -> None:
    """Promise 1, over mixtures of good and bad files in any order and any cut."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in")
        paths = write_photos(source, len(fates))
        for path, fate in zip(paths, fates, strict=True):
            if fate in SPOILERS:
                path.write_bytes(SPOILERS[fate][0])
        planned = plan_job(source, Path(folder, "out"), size=size)
        for path, fate in zip(paths, fates, strict=True):
            if fate in SPOILED_LATER:
                SPOILED_LATER[fate][0](path)
        do_all(planned)
        assert_each_in_one_place(planned)
        good = [str(p) for p, fate in zip(paths, fates, strict=True) if fate == "good"]
        assert [row["path"] for row in planned.rows(layout.FEATURES)] == good


# ---------------------------------------------------------------- thumbnails


def test_every_nth_row_of_the_manifest_has_a_thumbnail(tmp_path: Path) -> None:
    """Counted over the whole manifest, not within a partition."""
    paths = write_photos(tmp_path / "in", 20)
    planned = plan_job(tmp_path / "in", tmp_path / "out", size=7, thumbnail_step=3)
    do_all(planned)
    rows = planned.rows(layout.THUMBNAILS)
    assert [row["path"] for row in rows] == [str(path) for path in paths[::3]]
    pixels = decode(paths[3].read_bytes(), image_px=16)
    assert rows[1]["jpeg"] == thumbnail(pixels)


def test_a_bad_image_has_no_thumbnail(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "in", 6)
    paths[2].write_bytes(b"")
    planned = plan_job(tmp_path / "in", tmp_path / "out", thumbnail_step=2)
    do_all(planned)
    shown = [row["path"] for row in planned.rows(layout.THUMBNAILS)]
    assert shown == [str(paths[0]), str(paths[4])]


def test_a_partition_between_two_thumbnails_stores_none(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 6)
    planned = plan_job(tmp_path / "in", tmp_path / "out", size=2, thumbnail_step=4)
    do_all(planned)
    folder = planned.output / layout.THUMBNAILS
    assert sorted(p.name for p in folder.iterdir()) == ["part-00000.parquet", "part-00002.parquet"]


# ---------------------------------------------------------------- kills


def test_the_features_part_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "in", 3)
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    store = RecordingStore()
    use_store(monkeypatch, store)
    do_all(planned)
    kinds = [path.removeprefix(f"{planned.output}/").rpartition("/")[0] for path in store.written]
    assert kinds == [layout.THUMBNAILS, layout.FAILURES, layout.FEATURES]


def fail_at(monkeypatch: pytest.MonkeyPatch, n: int, work: Callable[[], object]) -> bool:
    """Do some work with a store that fails at its n-th change; tell whether it came to that."""
    store = FailingStore(fails_at=n)
    with monkeypatch.context() as patch:
        use_store(patch, store)
        try:
            work()
        except KillError:
            return True
    assert not store.is_dead
    return False


def assert_no_features_without_failures(output: Path) -> None:
    features = {path.name for path in (output / layout.FEATURES).glob("*.parquet")}
    failures = {path.name for path in (output / layout.FAILURES).glob("*.parquet")}
    assert features <= failures


@pytest.mark.parametrize("n", range(MAX_CHANGES))
def test_a_kill_at_any_write_is_mended_by_repeating(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_photos(tmp_path / "in", 6)
    paths[3].write_bytes(b"")
    planned = plan_job(tmp_path / "in", tmp_path / "whole")
    do_all(planned)
    other = plan_job(tmp_path / "in", tmp_path / "cut")
    came_to_it = fail_at(monkeypatch, n, lambda: do_all(other))
    assert came_to_it == (n < 3)
    assert_no_features_without_failures(other.output)
    do_all(other)
    assert tables(other.output) == tables(planned.output)
    assert names(other.output) == names(planned.output)


# ---------------------------------------------------------------- second try


def spoil_and_extract(folder: Path, bad: tuple[int, ...] = (1, 4, 5)) -> tuple[Planned, list[Path]]:
    paths = write_photos(folder / "in", 9)
    good = {path: path.read_bytes() for path in paths}
    for number in bad:
        paths[number].write_bytes(b"spoiled")
    planned = plan_job(folder / "in", folder / "out", size=9)
    do_all(planned)
    for path, content in good.items():
        path.write_bytes(content)
    return planned, paths


def test_mended_images_move_to_the_features_in_manifest_order(tmp_path: Path) -> None:
    planned, paths = spoil_and_extract(tmp_path)
    paths[4].write_bytes(b"still no photo")
    summary = retry_partition(planned.job, planned.partitions[0])
    assert (summary.n_images, summary.n_failures) == (3, 1)
    assert_each_in_one_place(planned)
    assert the_failure(planned, paths[4])["error"] == "NotAnImageError"
    shown = [row["path"] for row in planned.rows(layout.FEATURES)]
    assert shown == [str(path) for path in paths if path != paths[4]]


def test_a_second_try_ends_like_a_first_one(tmp_path: Path) -> None:
    """Also the rows that were good before: their vectors are carried over, not mixed up."""
    planned, _ = spoil_and_extract(tmp_path)
    retry_partition(planned.job, planned.partitions[0])
    fresh = plan_job(tmp_path / "in", tmp_path / "fresh", size=9)
    do_all(fresh)
    for kind in (layout.FEATURES, layout.FAILURES):
        assert planned.rows(kind) == fresh.rows(kind)


def test_a_second_try_where_all_had_failed(tmp_path: Path) -> None:
    planned, paths = spoil_and_extract(tmp_path, bad=tuple(range(9)))
    retry_partition(planned.job, planned.partitions[0])
    assert [row["path"] for row in planned.rows(layout.FEATURES)] == [str(path) for path in paths]


def test_a_second_try_that_finds_nothing_new_changes_nothing(tmp_path: Path) -> None:
    planned, paths = spoil_and_extract(tmp_path)
    for number in (1, 4, 5):
        paths[number].write_bytes(b"spoiled")
    before = tables(planned.output)
    retry_partition(planned.job, planned.partitions[0])
    assert tables(planned.output) == before


@pytest.mark.parametrize("n", range(MAX_CHANGES))
def test_a_second_try_that_is_killed_loses_no_image(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask gives the task of a killed worker to another one, which repeats it."""
    planned, _ = spoil_and_extract(tmp_path)
    rows = planned.partitions[0]
    fail_at(monkeypatch, n, lambda: retry_partition(planned.job, rows))
    retry_partition(planned.job, rows)
    assert_each_in_one_place(planned)
    assert planned.rows(layout.FAILURES) == []


# ---------------------------------------------------------------- bags and sums


def test_a_bag_has_one_task_a_partition_and_computes_nothing_itself(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 10)
    planned = plan_job(tmp_path / "in", tmp_path / "out", size=3)
    bag = extraction_bag(planned.job, planned.partitions)
    assert bag is not None
    assert bag.npartitions == 4
    assert names(planned.output) == {layout.MANIFEST}
    summaries = bag.compute(scheduler="synchronous")
    assert [summary.n_images for summary in summaries] == [3, 3, 3, 1]
    counts = counts_bag(str(planned.output), OPTIONS, [0, 3])
    assert counts is not None
    assert counts.compute(scheduler="synchronous") == [
        PartCount(index=0, n_features=3, n_training=0, n_failures=0),
        PartCount(index=3, n_features=1, n_training=1, n_failures=0),
    ]


def test_the_graph_of_many_images_is_small(tmp_path: Path) -> None:
    """Promise of the design: a bag item is a row range, never bytes nor a list of keys."""
    write_photos(tmp_path / "in", 1)
    job = plan_job(tmp_path / "in", tmp_path / "out").job
    million = [
        RowRange(index=index, start=index * 2048, stop=(index + 1) * 2048) for index in range(4883)
    ]
    bag = extraction_bag(job, million)
    assert bag is not None
    assert len(dumps(dict(bag.dask))) < 5e6


def test_there_is_no_bag_of_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 1)
    job = plan_job(tmp_path / "in", tmp_path / "out").job
    assert extraction_bag(job, []) is None
    assert retry_bag(job, []) is None
    assert counts_bag(job.output, OPTIONS, []) is None


def test_a_missing_failures_part_counts_as_none(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 4)
    planned = plan_job(tmp_path / "in", tmp_path / "out")
    do_all(planned)
    (planned.output / "failures/part-00000.parquet").unlink()
    count = count_part(LocalStore(), str(planned.output), 0)
    assert (count.n_features, count.n_failures) == (4, 0)


def test_sums_go_on_from_an_earlier_run(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "in", 10)
    paths[0].write_bytes(b"")
    planned = plan_job(tmp_path / "in", tmp_path / "out", size=5)
    tally = Tally({"operations": {"read": 100.0}, "peak_memory_bytes": {"gone": 7}})
    for rows in planned.partitions:
        tally.add(extract_partition(planned.job, rows))
    counts = [count_part(LocalStore(), str(planned.output), index) for index in (0, 1)]
    facts = tally.facts(counts, n_workers=2)
    assert (tally.n_images, tally.n_failures) == (10, 1)
    assert (facts["n_features"], facts["n_failures"], facts["n_workers"]) == (9, 1, 2)
    assert facts["operations"]["read"] >= 100
    assert facts["peak_memory_bytes"]["gone"] == 7
    assert len(facts["peak_memory_bytes"]) == 2


def test_the_number_of_threads_is_no_part_of_what_a_featurizer_is() -> None:
    assert FeaturizerSpec(**{name: getattr(SPEC, name) for name in SPEC.__slots__}) == SPEC
    assert replace(SPEC, n_threads=8) == SPEC
