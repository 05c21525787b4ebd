"""Synthetic photos in the shape of Fruits-360: what the first run and the tests work on.

Each label is one solid with a painted skin, turned and lit a little differently in every frame and
cropped to its outline on white, as the rotating fruits of Fruits-360 [1]_ were photographed.

References
----------
.. [1] H. Muresan, M. Oltean, "Fruit recognition from images using deep learning",
   Acta Univ. Sapientiae, Informatica 10(1), 2018. https://www.kaggle.com/datasets/moltean/fruits
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import product

from .fruits import FRUITS, Fruit
from .render import render_frame

__all__ = ["LABELS", "n_sample_images", "sample_images"]

_TEST_EVERY = 4
_JPEG_QUALITY = 92
_MIN_IMAGE_PX = 16

LABELS: tuple[str, ...] = tuple(fruit.label for fruit in FRUITS)
"""Labels of the set, in byte order."""


def sample_images(
    *, n_per_label: int = 40, seed: int = 0, image_px: int = 100
) -> Iterator[tuple[str, bytes]]:
    """Render the set, image by image.

    An image depends on its key, `seed` and `image_px` alone: a larger set contains the smaller one.

    Parameters
    ----------
    n_per_label : int
        Images of each label; every fourth is in the test split.
    seed : int
        Another seed paints other skins and takes other frames; 0 or more.
    image_px : int
        Width and height of an image in pixels.

    Returns
    -------
    iterator of (str, bytes)
        Key (``Training/Banana 1/r_12_100.jpg``) and JPEG file, sorted by key in byte order; always
        the same bytes with the same Pillow and NumPy on the same kind of processor.

    Raises
    ------
    ValueError
        At the call, when a parameter is out of range.
    """
    n_sample_images(n_per_label=n_per_label)
    if seed < 0 or image_px < _MIN_IMAGE_PX:
        raise ValueError(
            f"seed is {seed} and image_px is {image_px}; expected 0 or more, "
            f"and {_MIN_IMAGE_PX} pixels or more"
        )
    return _sorted_images(n_per_label, seed, image_px)


def n_sample_images(*, n_per_label: int = 40) -> int:
    """Count what `sample_images` will yield, without rendering.

    Parameters
    ----------
    n_per_label : int
        Images of each label.

    Returns
    -------
    int
        Number of images of all labels and splits.

    Raises
    ------
    ValueError
        When `n_per_label` is negative.
    """
    if n_per_label < 0:
        raise ValueError(f"n_per_label is {n_per_label}; expected 0 or more")
    return n_per_label * len(FRUITS)


def _sorted_images(n_per_label: int, seed: int, image_px: int) -> Iterator[tuple[str, bytes]]:
    numbers = product(FRUITS, range(n_per_label))
    frames = {_key(fruit, number, image_px): (fruit, number) for fruit, number in numbers}
    for key, (fruit, number) in sorted(frames.items()):
        jpeg = io.BytesIO()
        image = render_frame(fruit, seed=seed, number=number, image_px=image_px)
        image.save(jpeg, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        yield key, jpeg.getvalue()


def _key(fruit: Fruit, number: int, image_px: int) -> str:
    split = "Test" if number % _TEST_EVERY == _TEST_EVERY - 1 else "Training"
    return f"{split}/{fruit.label}/r_{number}_{image_px}.jpg"
