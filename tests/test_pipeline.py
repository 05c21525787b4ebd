"""Whole runs: what comes out, and that it comes out whatever happens on the way.

The first half does the tasks in this process, with a featurizer without an engine, so that a run
takes a second and can be cut at every single change of the store. The second half is the command
line with real workers and TensorFlow, on files and on S3.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import dask
import numpy as np
import psutil
import pytest

from fruits_dask import extract, layout, pipeline, reduce, residency, workspace
from fruits_dask.config import Settings
from fruits_dask.errors import (
    ConfigError,
    InputError,
    OutputExistsError,
    OutputLockedError,
    ReduceError,
    ResultError,
)
from fruits_dask.lock import OutputLock
from fruits_dask.pipeline import Outcome
from fruits_dask.storage import LocalStore, Store
from jobs import (
    FailingStore,
    KillError,
    MeanColours,
    SyncWorkers,
    assert_same_tables,
    command,
    copy_tree,
    names,
    photo,
    read_rows,
    rows_of,
    session_of,
    snapshot,
    start,
    tables,
    vectors_of,
    wait_until,
    write_photos,
)
from servers import REGION, RecordingMoto, S3Service

# ================================================================ in this process


@pytest.fixture
def without_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @contextmanager
    def open_here(settings: Settings, **_: object) -> Iterator[SyncWorkers]:
        yield SyncWorkers()

    monkeypatch.setattr(pipeline, "open_cluster", open_here)
    monkeypatch.setattr(extract, "get_featurizer", lambda spec: MeanColours(spec.n_features))
    with dask.config.set(scheduler="synchronous"):
        yield


def use_store(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    for module in (pipeline, workspace, extract, reduce.rows, reduce.scores, residency):
        monkeypatch.setattr(module, "open_store", lambda address, options: store)


def settings_of(folder: Path, **given: Any) -> Settings:
    usual = {
        "input": str(folder / "in"),
        "output": str(folder / "out"),
        "weights": "fruits",
        "components": 5,
        "partition_size": 7,
    }
    return Settings(**{**usual, **given})


def small_input(folder: Path) -> list[Path]:
    """Three partitions; one photo is broken."""
    paths = write_photos(folder / "in", 16)
    paths[9].write_bytes(b"broken")
    return paths


def assert_whole(output: Path) -> None:
    """Every listed image in one place, a score for every feature, and all files of a result."""
    listed = [row["path"] for row in read_rows(output / layout.MANIFEST)]
    features = [row["path"] for row in rows_of(output, layout.FEATURES)]
    failures = [row["path"] for row in rows_of(output, layout.FAILURES)]
    assert sorted(features + failures) == sorted(listed)
    assert [row["path"] for row in rows_of(output, layout.SCORES)] == features
    with (output / layout.SCORES_CSV).open(encoding="utf-8", newline="") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == features
    for name in (layout.PCA_MODEL, layout.REPORT, layout.DASK_REPORT, layout.SUCCESS):
        assert (output / name).is_file(), name
    assert not (output / layout.LOCKS).exists()
    assert not [name for name in names(output) if name.endswith(".fruits-tmp")]


def test_a_run_leaves_the_promised_files(without_workers: None, tmp_path: Path) -> None:
    """Design, section 3, name by name."""
    small_input(tmp_path)
    outcome = pipeline.run(settings_of(tmp_path))
    parts = [f"part-0000{index}.parquet" for index in range(3)]
    folders = (layout.FEATURES, layout.FAILURES, layout.SCORES, layout.THUMBNAILS)
    assert names(tmp_path / "out") == {
        *("run.json", "manifest.parquet", "_SUCCESS", "report.html"),
        *("report/dask-performance.html", "pca/model.npz", "pca/scores.csv"),
        *(f"{folder}/{part}" for folder in folders for part in parts),
    }
    assert_whole(tmp_path / "out")
    assert (outcome.n_features, outcome.n_failures) == (15, 1)
    assert outcome.failed_share == pytest.approx(1 / 16)


def test_a_complete_run_is_not_touched_again(without_workers: None, tmp_path: Path) -> None:
    small_input(tmp_path)
    pipeline.run(settings_of(tmp_path))
    before = snapshot(tmp_path / "out")
    outcome = pipeline.run(settings_of(tmp_path))
    assert outcome.did_nothing
    assert outcome.n_features == 15
    assert snapshot(tmp_path / "out") == before


def test_stages_one_by_one_end_like_a_run(without_workers: None, tmp_path: Path) -> None:
    small_input(tmp_path)
    pipeline.run(settings_of(tmp_path))
    apart = settings_of(tmp_path, output=str(tmp_path / "apart"))
    stages: tuple[Callable[[Settings], Outcome], ...] = (
        *(pipeline.plan, pipeline.extract, pipeline.reduce),
        pipeline.report,
    )
    for stage in stages:
        assert not stage(apart).did_nothing
    assert_same_tables(tables(tmp_path / "apart"), tables(tmp_path / "out"))
    assert names(tmp_path / "apart") == names(tmp_path / "out")


def test_a_stage_out_of_turn_names_the_one_before(without_workers: None, tmp_path: Path) -> None:
    small_input(tmp_path)
    settings = settings_of(tmp_path)
    pipeline.plan(settings)
    with pytest.raises(ResultError, match="no complete `extract` stage"):
        pipeline.reduce(settings)
    with pytest.raises(ResultError, match="no complete `extract` stage"):
        pipeline.retry_failed(settings)
    pipeline.extract(settings)
    with pytest.raises(ResultError, match="no complete `reduce` stage"):
        pipeline.report(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("components", 6), ("limit", 10), ("max_megapixels", 5.0)],
)
def test_other_settings_are_refused_by_name(
    name: str, value: float, without_workers: None, tmp_path: Path
) -> None:
    small_input(tmp_path)
    pipeline.run(settings_of(tmp_path))
    before = snapshot(tmp_path / "out")
    with pytest.raises(OutputExistsError, match=rf"(?s){name}: there .* now {value}.*--overwrite"):
        pipeline.run(settings_of(tmp_path, **{name: value}))
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", 7), ("concurrent_reads", 3), ("max_failed_share", 0.5), ("memory_limit", "1GiB")],
)
def test_settings_that_change_no_table_are_welcome(
    name: str, value: float, without_workers: None, tmp_path: Path
) -> None:
    small_input(tmp_path)
    pipeline.run(settings_of(tmp_path))
    assert pipeline.run(settings_of(tmp_path, **{name: value})).did_nothing


def test_overwriting_replaces_the_result_and_nothing_else(
    without_workers: None, tmp_path: Path
) -> None:
    small_input(tmp_path)
    pipeline.run(settings_of(tmp_path, partition_size=2))
    pipeline.run(settings_of(tmp_path), overwrite=True)
    assert_whole(tmp_path / "out")
    assert len(list((tmp_path / "out/features").iterdir())) == 3


def test_a_folder_of_somebody_else_is_refused(without_workers: None, tmp_path: Path) -> None:
    small_input(tmp_path)
    thesis = tmp_path / "out" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work", "utf-8")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
            pipeline.run(settings_of(tmp_path), overwrite=overwrite)
    assert names(tmp_path / "out") == {"thesis.tex"}


@pytest.mark.parametrize("where", ["in", "in/result", "in/Training/Lemon"])
def test_an_output_inside_the_input_is_refused(
    where: str, without_workers: None, tmp_path: Path
) -> None:
    small_input(tmp_path)
    before = snapshot(tmp_path / "in")
    with pytest.raises(InputError, match="inside"):
        pipeline.run(settings_of(tmp_path, output=str(tmp_path / where)))
    assert snapshot(tmp_path / "in") == before


def test_an_output_inside_the_input_through_a_link_is_refused(
    without_workers: None, tmp_path: Path
) -> None:
    """The input is never written, whatever name it is called by."""
    small_input(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    before = snapshot(tmp_path / "in")
    with pytest.raises(InputError, match="inside"):
        pipeline.run(settings_of(tmp_path, output=str(tmp_path / "alias" / "result")))
    assert snapshot(tmp_path / "in") == before


def test_an_output_beside_the_input_with_a_longer_name_is_fine(
    without_workers: None, tmp_path: Path
) -> None:
    small_input(tmp_path)
    pipeline.plan(settings_of(tmp_path, output=str(tmp_path / "in-result")))


def test_a_limit_is_balanced_over_the_labels(without_workers: None, tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 30, labels=("Lemon", "Plum", "Fig"), splits=("Training",))
    for path in sorted((tmp_path / "in").rglob("Fig/*.jpg"))[2:]:
        path.unlink()
    pipeline.run(settings_of(tmp_path, limit=12))
    labels = Counter(row["label"] for row in rows_of(tmp_path / "out", layout.FEATURES))
    assert labels == {"Fig": 2, "Lemon": 5, "Plum": 5}


def test_a_share_of_the_variance(without_workers: None, tmp_path: Path) -> None:
    small_input(tmp_path)
    outcome = pipeline.run(settings_of(tmp_path, components=0.8))
    facts = outcome.record["stages"]["reduce"]
    with np.load(tmp_path / "out" / layout.PCA_MODEL) as model:
        ratios = model["explained_variance_ratio"]
    assert ratios.sum() >= 0.8 > ratios[:-1].sum()
    assert facts["n_components"] == len(ratios)
    assert facts["explained_variance_ratio"] == pytest.approx(ratios.sum())


def test_one_image_keeps_its_features_and_says_what_is_missing(
    without_workers: None, tmp_path: Path
) -> None:
    write_photos(tmp_path / "in", 1)
    with pytest.raises(ReduceError, match="at least 2 images"):
        pipeline.run(settings_of(tmp_path))
    assert len(rows_of(tmp_path / "out", layout.FEATURES)) == 1
    assert not (tmp_path / "out" / layout.SUCCESS).exists()


def test_no_usable_image_says_why(without_workers: None, tmp_path: Path) -> None:
    for path in write_photos(tmp_path / "in", 9):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 9 images .*EmptyObjectError.*retry-failed"):
        pipeline.run(settings_of(tmp_path))
    assert len(rows_of(tmp_path / "out", layout.FAILURES)) == 9
    assert not (tmp_path / "out" / layout.SUCCESS).exists()


def test_no_usable_image_says_why_at_every_run(without_workers: None, tmp_path: Path) -> None:
    """Not something else, because the stage before was complete."""
    for path in write_photos(tmp_path / "in", 9):
        path.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match="none of the 9 images"):
            pipeline.run(settings_of(tmp_path))


def test_all_images_that_were_bad_and_are_mended(without_workers: None, tmp_path: Path) -> None:
    """What the message tells the user to do must work."""
    paths = write_photos(tmp_path / "in", 9)
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="retry-failed"):
        pipeline.run(settings_of(tmp_path))
    write_photos(tmp_path / "in", 9)
    outcome = pipeline.retry_failed(settings_of(tmp_path))
    assert (outcome.n_features, outcome.n_failures) == (9, 0)
    assert_whole(tmp_path / "out")


def test_an_empty_input_is_said(without_workers: None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="found no image"):
        pipeline.run(settings_of(tmp_path))


def test_a_locked_output_is_refused(without_workers: None, tmp_path: Path) -> None:
    small_input(tmp_path)
    with (
        OutputLock(LocalStore(), str(tmp_path / "out")),
        pytest.raises(OutputLockedError, match=f"process {os.getpid()}"),
    ):
        pipeline.run(settings_of(tmp_path))
    pipeline.run(settings_of(tmp_path))
    assert_whole(tmp_path / "out")


def test_no_cluster_is_opened_when_the_name_is_wrong(tmp_path: Path) -> None:
    small_input(tmp_path)
    with pytest.raises(ConfigError, match="tcp://"):
        pipeline.run(settings_of(tmp_path, cluster="kubernetes"))
    assert not (tmp_path / "out").exists()


def test_retried_images_take_their_places(without_workers: None, tmp_path: Path) -> None:
    """As if they had never failed: the same tables as a run on the mended photos."""
    paths = small_input(tmp_path)
    pipeline.run(settings_of(tmp_path))
    paths[9].write_bytes(photo(99))
    outcome = pipeline.retry_failed(settings_of(tmp_path))
    assert (outcome.n_features, outcome.n_failures) == (16, 0)
    assert_whole(tmp_path / "out")
    fresh = settings_of(tmp_path, output=str(tmp_path / "fresh"))
    pipeline.run(fresh)
    found, expected = tables(tmp_path / "out"), tables(tmp_path / "fresh")
    # The manifest says what was there at the time of the plan.
    assert found.pop(layout.MANIFEST) != expected.pop(layout.MANIFEST)
    assert_same_tables(found, expected)
    assert pipeline.retry_failed(settings_of(tmp_path)).did_nothing


def test_new_components_need_no_new_features(without_workers: None, tmp_path: Path) -> None:
    small_input(tmp_path)
    pipeline.run(settings_of(tmp_path))
    before = snapshot(tmp_path / "out" / layout.FEATURES)
    pipeline.reduce(settings_of(tmp_path, components=3))
    assert snapshot(tmp_path / "out" / layout.FEATURES) == before
    assert vectors_of(tmp_path / "out", layout.SCORES).shape == (15, 3)
    assert not (tmp_path / "out" / layout.SUCCESS).exists()
    pipeline.run(settings_of(tmp_path, components=3))
    assert_whole(tmp_path / "out")


# ---------------------------------------------------------------- cut at every change


def cut_at(monkeypatch: pytest.MonkeyPatch, n: int, work: Callable[[], object]) -> bool:
    """Do some work that dies at its n-th change of the store; False if it has fewer."""
    store = FailingStore(fails_at=n)
    with monkeypatch.context() as patch:
        use_store(patch, store)
        try:
            work()
        except KillError:
            return True
    return False


def all_cuts(
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[int], Callable[[], object]],
    check: Callable[[int], None],
) -> list[str]:
    """Cut some work at every change, and collect what the check does not like."""
    problems = []
    n = 0
    while cut_at(monkeypatch, n, prepare(n)):
        try:
            check(n)
        except (AssertionError, OSError, ValueError, ResultError) as exc:
            problems.append(f"after a cut at change {n}: {type(exc).__name__}: {str(exc)[:200]}")
        n += 1
    assert n > 5  # it did cut something
    return problems


@pytest.mark.slow
def test_a_run_cut_at_any_change_resumes_to_the_same_tables(
    without_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promises 2 and 3."""
    small_input(tmp_path)
    pipeline.run(settings_of(tmp_path, output=str(tmp_path / "whole")))
    expected = tables(tmp_path / "whole")

    def settings(n: int) -> Settings:
        return settings_of(tmp_path, output=str(tmp_path / f"cut-{n}"))

    def check(n: int) -> None:
        output = tmp_path / f"cut-{n}"
        assert not (output / layout.SUCCESS).exists()
        pipeline.run(settings(n))
        assert_whole(output)
        assert_same_tables(tables(output), expected)

    assert not all_cuts(monkeypatch, lambda n: lambda: pipeline.run(settings(n)), check)


@pytest.mark.slow
def test_a_retry_cut_at_any_change_resumes(
    without_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` makes the result whole again, and `retry-failed` then ends where it would have."""
    paths = small_input(tmp_path)
    broken = paths[9].read_bytes()
    before = tmp_path / "before"
    pipeline.run(settings_of(tmp_path, output=str(before)))
    after = copy_tree(before, tmp_path / "after")
    paths[9].write_bytes(photo(99))
    pipeline.retry_failed(settings_of(tmp_path, output=str(after)))
    expected = tables(after)
    assert broken != paths[9].read_bytes()

    def prepare(n: int) -> Callable[[], object]:
        copy_tree(before, tmp_path / f"cut-{n}")
        return lambda: pipeline.retry_failed(
            settings_of(tmp_path, output=str(tmp_path / f"cut-{n}"))
        )

    def check(n: int) -> None:
        output = tmp_path / f"cut-{n}"
        settings = settings_of(tmp_path, output=str(output))
        pipeline.run(settings)
        assert_whole(output)
        pipeline.retry_failed(settings)
        assert_whole(output)
        assert_same_tables(tables(output), expected)

    assert not all_cuts(monkeypatch, prepare, check)


@pytest.mark.slow
def test_a_second_reduction_cut_at_any_change_resumes(
    without_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the old components under the new settings."""
    small_input(tmp_path)
    before = tmp_path / "before"
    pipeline.run(settings_of(tmp_path, output=str(before)))
    pipeline.run(settings_of(tmp_path, output=str(tmp_path / "new"), components=3))
    expected = tables(tmp_path / "new")

    def settings(n: int) -> Settings:
        return settings_of(tmp_path, output=str(tmp_path / f"cut-{n}"), components=3)

    def prepare(n: int) -> Callable[[], object]:
        copy_tree(before, tmp_path / f"cut-{n}")
        return lambda: pipeline.reduce(settings(n))

    def check(n: int) -> None:
        pipeline.reduce(settings(n))
        pipeline.run(settings(n))
        assert_whole(tmp_path / f"cut-{n}")
        assert_same_tables(tables(tmp_path / f"cut-{n}"), expected)

    assert not all_cuts(monkeypatch, prepare, check)


@pytest.mark.slow
def test_overwriting_cut_at_any_change_is_never_a_mixture(
    without_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the old result and the new one; without --overwrite it may be refused, not mixed."""
    small_input(tmp_path)
    before = tmp_path / "before"
    pipeline.run(settings_of(tmp_path, output=str(before), partition_size=4, components=2))
    pipeline.run(settings_of(tmp_path, output=str(tmp_path / "new")))
    expected = tables(tmp_path / "new")

    def settings(n: int) -> Settings:
        return settings_of(tmp_path, output=str(tmp_path / f"cut-{n}"))

    def prepare(n: int) -> Callable[[], object]:
        copy_tree(before, tmp_path / f"cut-{n}")
        return lambda: pipeline.run(settings(n), overwrite=True)

    def check(n: int) -> None:
        output = tmp_path / f"cut-{n}"
        try:
            pipeline.run(settings(n))
        except OutputExistsError:
            pipeline.run(settings(n), overwrite=True)
        assert_whole(output)
        assert_same_tables(tables(output), expected)

    assert not all_cuts(monkeypatch, prepare, check)


# ================================================================ the command line, real workers

SECRET = "planted/Secret+0123456789abcdefghijklmn"  # noqa: S105
N_PHOTOS = 150
BAD = (3, 50, 51, 149)
RUN_SECONDS = 120
SEED = 20260


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run that was left alone, and what it said."""

    output: Path
    process: subprocess.CompletedProcess[str]
    input_before: dict[str, tuple[bytes, int, int]]
    input_after: dict[str, tuple[bytes, int, int]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `in`: 150 photos, four of them broken, and more files that are no photos."""
    folder = tmp_path_factory.mktemp("pipeline")
    paths = write_photos(folder / "in", N_PHOTOS, labels=("Lemon", "Plum", "Fig"), side_px=100)
    for number in BAD:
        paths[number].write_bytes(paths[number].read_bytes()[:300])
    (folder / "in" / "README.txt").write_text("about these photos", "utf-8")
    return folder


def flags(place: Path, output: str | Path, *more: str) -> list[str]:
    return [
        *("run", "--input", str(place / "in"), "--output", str(output), "--weights", "fruits"),
        *("--components", "10", "--partition-size", "12", "--max-failed-share", "0.05"),
        *("--dashboard-address", "127.0.0.1:0", *(more or ("--workers", "2"))),
    ]


@pytest.fixture(scope="module")
def finished(place: Path) -> Finished:
    before = snapshot(place / "in")
    process = command(*flags(place, "out"), cwd=place, AWS_SECRET_ACCESS_KEY=SECRET)
    return Finished(
        output=place / "out",
        process=process,
        input_before=before,
        input_after=snapshot(place / "in"),
    )


@contextmanager
def running(place: Path, output: str, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run, and leave no process of it behind."""
    process = start(*flags(place, output, *more), cwd=place)
    try:
        yield process
    finally:
        for pid in session_of(process):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def n_parts(place: Path, output: str) -> int:
    return len(list((place / output / layout.FEATURES).glob("part-*.parquet")))


def holds_the_lock(place: Path, output: str, process: subprocess.Popen[str]) -> bool:
    """Tell whether a run is at work: then it has its signal handlers, too."""
    for lock in (place / output / layout.LOCKS).glob("*.json"):
        with suppress(FileNotFoundError):
            if json.loads(lock.read_text())["pid"] == process.pid:
                return True
    return False


def wait_for_parts(place: Path, output: str, at_least: int, process: subprocess.Popen[str]) -> None:
    wait_until(
        lambda: holds_the_lock(place, output, process),
        seconds=RUN_SECONDS,
        what="the lock of the run",
    )
    wait_until(
        lambda: n_parts(place, output) >= at_least,
        seconds=RUN_SECONDS,
        what=f"{at_least} parts of features",
    )


@pytest.mark.slow
def test_the_command_succeeds_and_keeps_its_streams_apart(finished: Finished) -> None:
    assert finished.process.returncode == 0, finished.process.stderr
    assert "146 with features, 4 failures" in finished.process.stdout
    assert "10 components keep" in finished.process.stdout
    for word in ("seconds", "featurize (over all workers)", "scores"):
        assert word in finished.process.stdout
    assert "extract: 150 images" in finished.process.stderr
    assert "Dask dashboard: http://127.0.0.1" in finished.process.stderr
    for word in ("Traceback", "Warning", "WARNING", "ERROR", "run_spec"):
        assert word not in finished.process.stderr, finished.process.stderr


@pytest.mark.slow
def test_the_result_is_whole(finished: Finished) -> None:
    assert_whole(finished.output)
    assert n_parts(finished.output.parent, "out") == 13
    failures = rows_of(finished.output, layout.FAILURES)
    assert [failure["error"] for failure in failures] == ["TruncatedImageError"] * 4


@pytest.mark.slow
def test_the_pca_was_fitted_on_the_training_split(finished: Finished) -> None:
    rows = rows_of(finished.output, layout.FEATURES)
    training = [row["features"] for row in rows if row["split"] == "Training"]
    with np.load(finished.output / layout.PCA_MODEL) as model:
        assert model["n_samples"] == len(training)
        assert model["components"].shape == (10, 1280)
        np.testing.assert_allclose(model["mean"], np.mean(training, axis=0), atol=1e-6)


@pytest.mark.slow
def test_the_record_tells_what_was_done(finished: Finished) -> None:
    record = json.loads((finished.output / layout.RUN_JSON).read_text("utf-8"))
    assert set(record["stages"]) == {"plan", "extract", "reduce", "report"}
    assert record["stages"]["extract"]["n_workers"] == 2
    assert len(record["stages"]["extract"]["peak_memory_bytes"]) == 2
    assert all(stage["seconds"] > 0 for stage in record["stages"].values())
    assert record["identity"]["weights_sha256"]
    assert set(record["regions"].values()) == {"this machine"}


@pytest.mark.slow
def test_no_secret_is_written_anywhere(finished: Finished) -> None:
    """Neither the planted key nor its base64 or URL form."""
    forms = [SECRET, SECRET.replace("/", "%2F").replace("+", "%2B"), SECRET[8:30]]
    said = finished.process.stdout + finished.process.stderr
    for path in finished.output.rglob("*"):
        said += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert [form for form in forms if form in said] == []


@pytest.mark.slow
def test_the_input_is_as_it_was(finished: Finished) -> None:
    assert finished.input_after == finished.input_before


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_says_so(finished: Finished, place: Path) -> None:
    before = snapshot(finished.output)
    again = command(*flags(place, "out"), cwd=place)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    assert "worker" not in again.stderr
    assert snapshot(finished.output) == before


@pytest.mark.slow
def test_too_many_failures_are_an_exit_code(finished: Finished, place: Path) -> None:
    again = command(*flags(place, "out", "--max-failed-share", "0.01"), cwd=place)
    assert again.returncode == 3
    assert "2.7% of the photos failed" in again.stderr
    assert "retry-failed" in again.stderr


@pytest.mark.slow
def test_other_settings_are_an_error_of_one_message(finished: Finished, place: Path) -> None:
    before = snapshot(finished.output)
    other = command(*flags(place, "out", "--limit", "20"), cwd=place)
    assert other.returncode == 1
    assert "limit: there None, now 20" in other.stderr
    assert "Traceback" not in other.stderr
    assert other.stdout == ""
    assert snapshot(finished.output) == before


@pytest.mark.slow
def test_three_workers_give_the_same_tables_and_hold_the_output(
    finished: Finished, place: Path
) -> None:
    """And a second run that comes meanwhile gives way, naming the first."""
    with running(place, "three", "--workers", "3") as first:
        wait_for_parts(place, "three", 1, first)
        second = command(*flags(place, "three"), cwd=place)
        assert second.returncode == 1
        assert f"process {first.pid}" in second.stderr
        _, stderr = first.communicate(timeout=RUN_SECONDS)
        assert first.returncode == 0, stderr
    assert_whole(place / "three")
    assert_same_tables(tables(place / "three"), tables(finished.output))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_driver_killed_three_times_ends_with_the_same_tables(
    finished: Finished, place: Path
) -> None:
    """Promise 2, the hard way; no worker outlives its driver either."""
    choose = random.Random(SEED)  # noqa: S311
    moments = sorted(choose.sample(range(13), 3))
    delays = [round(choose.uniform(0, 0.3), 3) for _ in moments]
    print(f"seed {SEED}: killed at {moments} parts, {delays} s later")  # noqa: T201
    for moment, delay in zip(moments, delays, strict=True):
        with running(place, "killed") as process:
            wait_for_parts(place, "killed", moment, process)
            wait_a_little(process, delay)
            if process.poll() is None:
                process.kill()
            process.wait()
            wait_for_end(process, seconds=30)
    done = command(*flags(place, "killed"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert_whole(place / "killed")
    assert_same_tables(tables(place / "killed"), tables(finished.output))


def wait_for_end(process: subprocess.Popen[str], *, seconds: float) -> None:
    wait_until(lambda: not session_of(process), seconds=seconds, what="the workers end")


def wait_a_little(process: subprocess.Popen[str], seconds: float) -> None:
    """Give a process some more time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


@pytest.mark.slow
def test_a_killed_worker_is_replaced(finished: Finished, place: Path) -> None:
    with running(place, "worker") as process:
        wait_for_parts(place, "worker", 2, process)
        victim = worker_pids(process)[0]
        os.kill(victim, signal.SIGKILL)
        _, stderr = process.communicate(timeout=RUN_SECONDS)
        assert process.returncode == 0, stderr
        assert "Traceback" not in stderr
    assert_whole(place / "worker")
    assert_same_tables(tables(place / "worker"), tables(finished.output))


def worker_pids(process: subprocess.Popen[str]) -> list[int]:
    """Children that multiprocessing spawned for work, and not its resource tracker."""
    children = psutil.Process(process.pid).children()
    return sorted(c.pid for c in children if "spawn_main" in " ".join(c.cmdline()))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_interrupted_runs_stop_cleanly_and_resume(finished: Finished, place: Path) -> None:
    """Ctrl-C, then SIGTERM to the second try, then to the end."""
    for number, at_least in ((signal.SIGINT, 2), (signal.SIGTERM, 5)):
        with running(place, "interrupted") as process:
            wait_for_parts(place, "interrupted", at_least, process)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
            assert process.returncode == 130, stderr
            assert "stopped; what is stored stays" in stderr
            assert "Traceback" not in stderr, stderr
            assert stdout == ""
            wait_for_end(process, seconds=10)
        assert not (place / "interrupted" / layout.LOCKS).exists()
        assert not (place / "interrupted" / layout.SUCCESS).exists()
        assert not [n for n in names(place / "interrupted") if n.endswith(".fruits-tmp")]
    done = command(*flags(place, "interrupted"), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "done before" in done.stderr
    assert_same_tables(tables(place / "interrupted"), tables(finished.output))


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_all_processes(place: Path) -> None:
    """The terminal sends SIGINT to the workers, too."""
    with running(place, "terminal") as process:
        wait_for_parts(place, "terminal", 1, process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr, stderr
        wait_for_end(process, seconds=10)


@pytest.mark.slow
def test_mended_photos_join_the_result(finished: Finished, place: Path) -> None:
    paths = sorted((place / "in").rglob("*.jpg"))
    kept = {number: paths[number].read_bytes() for number in BAD}
    output = copy_tree(finished.output, place / "mended")
    try:
        for number in BAD[1:]:
            paths[number].write_bytes(photo(number, side_px=100))
        done = command(
            *("retry-failed", "--output", "mended", "--workers", "2"),
            *("--dashboard-address", "127.0.0.1:0"),
            cwd=place,
        )
    finally:
        for number, content in kept.items():
            paths[number].write_bytes(content)
    assert done.returncode == 0, done.stderr
    assert "149 with features, 1 failures" in done.stdout
    assert_whole(output)
    found = [row["path"] for row in rows_of(output, layout.FEATURES)]
    assert found == sorted(found, key=str.encode)
    assert {str(paths[number]) for number in BAD[1:]} < set(found)
    old = {row["path"]: row["features"] for row in rows_of(finished.output, layout.FEATURES)}
    new = {row["path"]: row["features"] for row in rows_of(output, layout.FEATURES)}
    assert {path: new[path] for path in old} == old
    assert tables(output)["pca/model.npz:mean"] != tables(finished.output)["pca/model.npz:mean"]


# ---------------------------------------------------------------- S3


@pytest.mark.slow
def test_a_run_on_s3_gives_the_same_numbers_with_one_request_an_image(
    finished: Finished, place: Path, moto_server: RecordingMoto, tmp_path: Path
) -> None:
    """Promise 6 over a whole run: one GET for each image, one LIST for 1,000 keys."""
    service = S3Service(name="moto", endpoint_url=moto_server.endpoint_url)
    source, target = service.new_bucket(), service.new_bucket()
    client = service.client()
    for path in sorted((place / "in").rglob("*.*")):
        key = path.relative_to(place / "in").as_posix()
        client.put_object(Bucket=source, Key=f"photos/{key}", Body=path.read_bytes())
    moto_server.forget()
    arguments = flags(place, f"s3://{target}/result", "--workers", "2")
    arguments[arguments.index("--input") + 1] = f"s3://{source}/photos"
    done = command(
        *(*arguments, "--endpoint-url", moto_server.endpoint_url),
        cwd=place,
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY=SECRET,
        AWS_EC2_METADATA_DISABLED="true",
    )
    assert done.returncode == 0, done.stderr
    of_source = [r for r in moto_server.requests if r.path.startswith(f"/{source}")]
    gets = Counter(r.path for r in of_source if r.method == "GET" and not r.is_list)
    assert sum(r.is_list for r in of_source) == 1
    assert len(gets) == N_PHOTOS
    assert set(gets.values()) == {1}
    heads = [r.path for r in of_source if r.method == "HEAD"]
    assert [path.strip("/") for path in heads] == [source] * len(heads)  # the region alone
    assert {r.method for r in of_source} <= {"GET", "HEAD"}
    output = tmp_path / "s3"
    for item in client.list_objects_v2(Bucket=target)["Contents"]:
        path = output / item["Key"].removeprefix("result/")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = client.get_object(Bucket=target, Key=item["Key"])["Body"].read()
        assert SECRET.encode() not in content, item["Key"]
        path.write_bytes(content)
    assert SECRET not in done.stdout + done.stderr
    assert_whole(output)
    assert names(output) == names(finished.output)
    for kind in (layout.FEATURES, layout.SCORES):
        assert np.array_equal(vectors_of(output, kind), vectors_of(finished.output, kind))
    record = json.loads((output / layout.RUN_JSON).read_text("utf-8"))
    assert record["regions"].pop("the workers") == "this machine"
    assert set(record["regions"].values()) == {REGION}


@pytest.mark.slow
def test_a_bucket_outside_the_allowed_regions_is_not_read(
    place: Path, moto_server: RecordingMoto
) -> None:
    service = S3Service(name="moto", endpoint_url=moto_server.endpoint_url)
    source, target = "fruits-abroad", service.new_bucket()
    boto3.client("s3", endpoint_url=service.endpoint_url, region_name="us-east-1").create_bucket(
        Bucket=source
    )
    service.client().put_object(Bucket=source, Key="photos/Lemon/1.jpg", Body=photo(1))
    moto_server.forget()
    arguments = flags(place, f"s3://{target}/result")
    arguments[arguments.index("--input") + 1] = f"s3://{source}/photos"
    done = command(
        *(*arguments, "--endpoint-url", moto_server.endpoint_url),
        cwd=place,
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY=SECRET,
        AWS_EC2_METADATA_DISABLED="true",
    )
    assert done.returncode == 2, done.stderr
    assert "us-east-1" in done.stderr
    assert "nothing was read" in done.stderr
    of_source = [(r.method, r.path) for r in moto_server.requests if source in r.path]
    assert set(of_source) == {("HEAD", f"/{source}")}  # where it is, and nothing that is in it
    assert {r.method for r in moto_server.requests} <= {"HEAD", "GET"}
