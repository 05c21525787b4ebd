"""How the manifest is cut: row ranges, from the number of images alone.

The cut does not depend on the number of workers, so any cluster gives the same parts.
"""

from __future__ import annotations

from .records import RowRange

# At least this many partitions where there are enough images: work for some 100 workers, and little
# to do again after a kill.
_TARGET_PARTITIONS = 256
# Below this many the partitions are as small as they can be; above, a task has two steps at least,
# which spreads what it costs beside its images.
_FEW_PARTITIONS = 64
# Multiples of the largest batch of the featurizers, so that only the last partition has a rest.
_STEP = 64
# A task should take seconds to a minute, and 10 million images should make a few thousand tasks.
_MAX_SIZE = 2048


def partition_size(n_images: int) -> int:
    """Choose the number of images of one task.

    Parameters
    ----------
    n_images : int
        Rows of the manifest.

    Returns
    -------
    int
        A multiple of 64, between 64 and 2,048.

    Examples
    --------
    >>> partition_size(6_833), partition_size(90_000), partition_size(10_000_000)
    (128, 384, 2048)
    """
    steps = -(-n_images // (_TARGET_PARTITIONS * _STEP))
    few = -(-n_images // (_FEW_PARTITIONS * _STEP))
    return min(max(steps, min(few, 2), 1) * _STEP, _MAX_SIZE)


def partition_rows(n_images: int, size: int) -> list[RowRange]:
    """Cut the rows of a manifest into ranges.

    Parameters
    ----------
    n_images : int
        Rows of the manifest.
    size : int
        Rows of each range; the last may have fewer.

    Returns
    -------
    list of RowRange
        In order, without gap or overlap.
    """
    starts = range(0, n_images, size)
    return [
        RowRange(index=index, start=start, stop=min(start + size, n_images))
        for index, start in enumerate(starts)
    ]
