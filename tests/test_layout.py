"""`layout`: the same names below a folder and below a prefix."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fruits_dask import layout

NUMBERS = st.integers(0, 10_000_000)


@pytest.mark.parametrize("root", ["/data/out", "/data/out/", "s3://bucket/out", "s3://bucket/out/"])
def test_names_are_joined_with_single_slashes(root: str) -> None:
    base = root.rstrip("/")
    assert layout.join(root, "a", "b.json") == f"{base}/a/b.json"
    assert layout.join(root, "a/", "/b/") == f"{base}/a/b"
    assert layout.join(root) == base


def test_a_bucket_alone_is_a_root() -> None:
    assert layout.join("s3://bucket", "run.json") == "s3://bucket/run.json"


def test_a_part_is_where_the_design_says() -> None:
    path = layout.part_path("s3://bucket/out", layout.FEATURES, 7)
    assert path == "s3://bucket/out/features/part-00007.parquet"
    assert layout.part_path("/o", layout.SCORES, 0) == "/o/pca/scores/part-00000.parquet"


@given(number=NUMBERS)
@settings(deadline=None)
def test_a_name_tells_its_number(number: int) -> None:
    assert layout.part_index(layout.part_name(number)) == number
    assert layout.part_index(f"features/{layout.part_name(number)}") == number


@given(numbers=st.sets(st.integers(0, 99_999)))
@settings(deadline=None)
def test_names_sort_like_their_numbers(numbers: set[int]) -> None:
    names = sorted(layout.part_name(number) for number in numbers)
    assert [layout.part_index(name) for name in names] == sorted(numbers)


@pytest.mark.parametrize(
    "name",
    [
        "part-.parquet",
        "part-a.parquet",
        "part-00000.parquet.bak",
        ".part-00000.parquet.0a1b2c3d.fruits-tmp",
        "00000.parquet",
        "part-00000.csv",
        "part-00000",
        "part-1.parquet",
        "part-\u00b2.parquet",
        "part--0001.parquet",
        "",
    ],
)
def test_other_files_are_no_parts(name: str) -> None:
    assert layout.part_index(name) is None


@given(stem=st.text("0123456789\u00b2\u0663-+_. part", max_size=8))
@settings(deadline=None, max_examples=200)
def test_only_names_that_are_written_are_read(stem: str) -> None:
    name = f"part-{stem}.parquet"
    index = layout.part_index(name)
    assert index is None or layout.part_name(index) == name


def test_a_removal_cut_short_never_looks_complete() -> None:
    assert layout.RESULT_NAMES[:2] == (layout.SUCCESS, layout.RUN_JSON)
    assert len(set(layout.RESULT_NAMES)) == len(layout.RESULT_NAMES)


def test_everything_written_is_below_a_name_that_is_removed() -> None:
    written = {
        value
        for name, value in vars(layout).items()
        if name.isupper() and isinstance(value, str) and name not in ("LOCKS", "PROBE")
    }
    assert {name.split("/")[0] for name in written} <= set(layout.RESULT_NAMES)
