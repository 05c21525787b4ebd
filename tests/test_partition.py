"""`partition`: row ranges without gap or overlap, the same for any cluster."""

from __future__ import annotations

import doctest

from hypothesis import given, settings
from hypothesis import strategies as st

from fruits_dask import partition
from fruits_dask.partition import partition_rows, partition_size

N_IMAGES = st.integers(0, 50_000_000)


@given(n_images=st.integers(0, 5000), size=st.integers(1, 6000))
@settings(deadline=None)
def test_ranges_cover_every_row_once(n_images: int, size: int) -> None:
    ranges = partition_rows(n_images, size)
    rows = [row for item in ranges for row in range(item.start, item.stop)]
    assert rows == list(range(n_images))
    assert [item.index for item in ranges] == list(range(len(ranges)))


@given(n_images=st.integers(1, 5000), size=st.integers(1, 6000))
@settings(deadline=None)
def test_only_the_last_range_is_short(n_images: int, size: int) -> None:
    *full, last = (item.stop - item.start for item in partition_rows(n_images, size))
    assert all(n_rows == size for n_rows in full)
    assert 1 <= last <= size


@given(n_images=N_IMAGES)
@settings(deadline=None)
def test_a_size_is_a_whole_number_of_batches_within_bounds(n_images: int) -> None:
    size = partition_size(n_images)
    assert size % 64 == 0
    assert 64 <= size <= 2048


@given(n_images=N_IMAGES, n_more=st.integers(0, 1_000_000))
@settings(deadline=None)
def test_a_size_never_falls_with_more_images(n_images: int, n_more: int) -> None:
    assert partition_size(n_images) <= partition_size(n_images + n_more)


@given(n_images=st.integers(64 * 256, 2048 * 256))
@settings(deadline=None)
def test_there_is_work_for_a_hundred_workers(n_images: int) -> None:
    n_partitions = -(-n_images // partition_size(n_images))
    assert 100 < n_partitions <= 256


def test_ten_million_images_are_a_few_thousand_tasks() -> None:
    n_images = 10_000_000
    ranges = partition_rows(n_images, partition_size(n_images))
    assert 2000 < len(ranges) < 5000
    assert ranges[-1].stop == n_images


def test_no_images_are_no_partitions() -> None:
    assert partition_rows(0, partition_size(0)) == []


def test_examples() -> None:
    outcome = doctest.testmod(partition)
    assert outcome.attempted
    assert not outcome.failed
