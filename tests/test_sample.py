"""The synthetic photos: deterministic, complete, clean at the border, and worth classifying."""

from __future__ import annotations

import io
import re
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fruits_dask.sample import LABELS, n_sample_images, sample_images

N_PER_LABEL = 12
IMAGE_PX = 100
NEAR_WHITE = 232
NOT_WHITE = 200
MIN_FRUIT_SHARE = 0.12
MIN_FRAME_DIFFERENCE = 2.0
MIN_ACCURACY = 0.8
THUMBNAIL_PX = 8

Images = dict[str, bytes]


@pytest.fixture(scope="module")
def images() -> Images:
    """Render a small set once for all tests of the module."""
    return dict(sample_images(n_per_label=N_PER_LABEL))


def pixels(jpeg: bytes) -> NDArray[np.float64]:
    """Decode to (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(jpeg)), np.float64)


def rows_of(images: Images, split: str) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Thumbnails (n_images, n_values) and labels (n_images,) of one split."""
    chosen = [(key.split("/")[1], jpeg) for key, jpeg in images.items() if key.startswith(split)]
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    thumbnails = [Image.open(io.BytesIO(jpeg)).resize(size) for _, jpeg in chosen]
    rows = np.stack([np.asarray(thumbnail, np.float64).ravel() for thumbnail in thumbnails])
    return rows, np.asarray([label for label, _ in chosen])


def test_the_same_arguments_give_the_same_bytes(images: Images) -> None:
    """Also after other arguments have filled the caches."""
    list(sample_images(n_per_label=1, seed=1))
    assert dict(sample_images(n_per_label=N_PER_LABEL)) == images


def test_a_larger_set_contains_the_smaller_one(images: Images) -> None:
    """An image does not depend on how many are asked for."""
    assert dict(sample_images(n_per_label=2)).items() <= images.items()


def test_another_seed_gives_other_images_under_the_same_keys() -> None:
    """Seeds change pixels, not names."""
    first, second = (dict(sample_images(n_per_label=1, seed=seed)) for seed in (0, 1))
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_keys_are_unique_and_sorted_in_byte_order() -> None:
    """As S3 lists them."""
    keys = [key.encode() for key, _ in sample_images(n_per_label=N_PER_LABEL, image_px=16)]
    assert keys == sorted(set(keys))


def test_keys_have_the_shape_of_fruits_360(images: Images) -> None:
    """Split, label, number and size."""
    shape = re.compile(r"(Training|Test)/[A-Z][A-Za-z ]+ \d/r_\d+_100\.jpg")
    assert [key for key in images if not shape.fullmatch(key)] == []


def test_every_label_has_three_quarters_in_training(images: Images) -> None:
    """And the rest in the test split."""
    for label in LABELS:
        counts = [
            sum(key.startswith(f"{split}/{label}/") for key in images)
            for split in ("Training", "Test")
        ]
        assert counts == [N_PER_LABEL * 3 // 4, N_PER_LABEL // 4]


def test_labels_are_unique_and_sorted() -> None:
    """So that they can be compared with a listing."""
    assert list(LABELS) == sorted(set(LABELS))


@pytest.mark.parametrize("n_per_label", [0, 1, 5])
def test_the_count_is_what_comes(n_per_label: int) -> None:
    """n_sample_images agrees with sample_images."""
    n_yielded = sum(1 for _ in sample_images(n_per_label=n_per_label, image_px=16))
    assert n_yielded == n_sample_images(n_per_label=n_per_label) == n_per_label * len(LABELS)


@pytest.mark.parametrize("arguments", [{"n_per_label": -1}, {"seed": -1}, {"image_px": 15}])
def test_arguments_out_of_range_are_refused_at_the_call(arguments: dict[str, int]) -> None:
    """Before the first image is asked for."""
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        sample_images(**arguments)


def test_every_image_is_a_jpeg_of_the_expected_size(images: Images) -> None:
    """Format, mode and size."""
    for jpeg in images.values():
        image = Image.open(io.BytesIO(jpeg))
        image.load()
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (IMAGE_PX, IMAGE_PX))


def test_another_size_is_rendered_not_cut() -> None:
    """A larger frame shows the same fruit."""
    small, other = (jpeg for _, jpeg in islice(sample_images(n_per_label=2, image_px=50), 2))
    large = Image.open(io.BytesIO(next(sample_images(n_per_label=2, image_px=150))[1]))
    assert large.size == (150, 150)
    shrunk = np.asarray(large.resize((50, 50), Image.Resampling.LANCZOS), np.float64)
    to_itself, to_other = (np.abs(shrunk - pixels(jpeg)).mean() for jpeg in (small, other))
    assert to_itself < to_other / 2


def test_no_fruit_touches_the_border(images: Images) -> None:
    """All four borders are near white."""
    for key, jpeg in images.items():
        image = pixels(jpeg)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert border.min() >= NEAR_WHITE, key


def test_every_image_shows_a_fruit_in_one_piece(images: Images) -> None:
    """Enough coloured pixels, and no white row between the first and the last."""
    for key, jpeg in images.items():
        inside = pixels(jpeg).min(axis=2) < NOT_WHITE
        assert inside.mean() > MIN_FRUIT_SHARE, key
        rows = np.flatnonzero(inside.any(axis=1))
        assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1)), key


def test_frames_of_one_label_differ(images: Images) -> None:
    """Every pair differs by more than the noise of the JPEG format."""
    for label in LABELS:
        frames = np.stack([pixels(jpeg) for key, jpeg in images.items() if f"/{label}/" in key])
        differences = np.abs(frames[:, None] - frames[None]).mean(axis=(2, 3, 4))
        others = differences[~np.eye(len(frames), dtype=bool)]
        assert others.min() > MIN_FRAME_DIFFERENCE, label


def test_labels_are_separable(images: Images) -> None:
    """The nearest centroid of small thumbnails names most images of the test split."""
    accuracy = nearest_centroid_accuracy(rows_of(images, "Training/"), rows_of(images, "Test/"))
    assert accuracy > MIN_ACCURACY


def nearest_centroid_accuracy(
    training: tuple[NDArray[np.float64], NDArray[np.str_]],
    test: tuple[NDArray[np.float64], NDArray[np.str_]],
) -> float:
    """Share of the test rows whose nearest label mean is their own."""
    centroids = np.stack([training[0][training[1] == label].mean(axis=0) for label in LABELS])
    distances = ((test[0][:, None] - centroids[None]) ** 2).sum(axis=2)
    return float((np.asarray(LABELS)[distances.argmin(axis=1)] == test[1]).mean())
