"""What is there: the listing of the input, as a manifest sorted by path."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import InputError
from .records import IMAGE_SUFFIXES, SPLIT_NAMES, ObjectInfo, RowRange
from .storage import Store

logger = logging.getLogger(__name__)

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
    ]
)

# A worker reads whole row groups: small, so that a partition reads little more than its own rows.
_ROW_GROUP_ROWS = 8192
# Paths and etags do not repeat, so a dictionary of them only costs time and bytes.
_PARQUET = {"compression": "zstd", "use_dictionary": ["label", "split"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestInfo:
    """What a stored manifest holds."""

    n_images: int
    """Rows."""
    n_bytes: int
    """Sum of the sizes of the listed objects."""
    labels: dict[str, int]
    """Images of each label, sorted by label; images without one are left out."""
    splits: dict[str, int]
    """Images of each split, sorted by split; images without one are left out."""


def label_and_split(path: str) -> tuple[str | None, str | None]:
    """Read label and split off the folders of a path.

    Parameters
    ----------
    path : str
        Address of an image.

    Returns
    -------
    label : str or None
        Name of the parent folder; None directly below a bucket or ``/``.
    split : str or None
        Name of the grandparent folder when it is a known split name.

    Examples
    --------
    >>> label_and_split("s3://fruits/Training/Banana 1/0_100.jpg")
    ('Banana 1', 'Training')
    >>> label_and_split("/photos/0_100.jpg")
    ('photos', None)
    """
    folders = path.removeprefix("s3://").split("/")[:-1]
    # The first is the bucket, or the empty name before a leading slash: neither is a folder.
    names = folders[1:]
    label = names[-1] if names else None
    split = names[-2] if len(names) > 1 and names[-2] in SPLIT_NAMES else None
    return label or None, split


def write_manifest(
    source: Store,
    root: str,
    destination: Store,
    path: str,
    *,
    limit: int | None = None,
    on_listed: Callable[[int], None] = lambda n_images: None,
) -> ManifestInfo:
    """List the images below `root` and store them as a manifest.

    The listing streams: memory does not grow with the number of images, unless `limit` is given.

    Parameters
    ----------
    source, destination : Store
        Where the images are, and where the manifest goes.
    root : str
        Address below which all images are taken.
    path : str
        Address of the manifest.
    limit : int, optional
        Take at most this many images, balanced over the labels.
    on_listed : callable
        Told the number of images listed so far, every now and then.

    Returns
    -------
    ManifestInfo
        Counts of what was stored.

    Raises
    ------
    InputError
        If there is no image.
    """
    with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
        listing = Path(folder, "listing.parquet")
        is_sorted = _stream(source.list_images(root, IMAGE_SUFFIXES), listing, on_listed)
        _check_not_empty(listing, root)
        if limit is not None or not is_sorted:
            listing = _rewrite(listing, limit)
        with listing.open("rb") as stream:
            info = read_manifest_info(stream)
        destination.upload(listing, path)
    return info


def read_manifest_info(stream: object) -> ManifestInfo:
    """Count what a manifest holds, a row group at a time.

    Parameters
    ----------
    stream : binary file object
        The manifest.

    Returns
    -------
    ManifestInfo
        The counts.
    """
    n_images = n_bytes = 0
    labels: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    for batch in pq.ParquetFile(stream).iter_batches(columns=["size_bytes", "label", "split"]):
        n_images += batch.num_rows
        n_bytes += pc.sum(batch["size_bytes"]).as_py() or 0
        for counter, name in ((labels, "label"), (splits, "split")):
            counts = pc.value_counts(batch[name]).to_pylist()
            counter.update({c["values"]: c["counts"] for c in counts if c["values"] is not None})
    return ManifestInfo(
        n_images=n_images,
        n_bytes=n_bytes,
        labels=dict(sorted(labels.items())),
        splits=dict(sorted(splits.items())),
    )


def read_rows(store: Store, path: str, rows: RowRange) -> pa.Table:
    """Read the rows of one partition, and little else, from a manifest.

    Parameters
    ----------
    store : Store
        Where the manifest is.
    path : str
        Its address.
    rows : RowRange
        The partition.

    Returns
    -------
    pyarrow.Table
        ``rows.stop - rows.start`` rows in `MANIFEST_SCHEMA`.
    """
    with store.open(path) as stream:
        file = pq.ParquetFile(stream)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        stops = np.cumsum(sizes)
        first = int(np.searchsorted(stops, rows.start, side="right"))
        last = int(np.searchsorted(stops, rows.stop, side="left"))
        table = file.read_row_groups(list(range(first, last + 1)))
    return table.slice(rows.start - (int(stops[first]) - sizes[first]), rows.stop - rows.start)


def balanced_sample(labels: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Choose rows so that every label has its fair share.

    Small labels are taken whole, and what they leave free goes to the larger ones. Within a label
    the rows are spread evenly, so that neighbouring frames of one fruit are not all there is.

    Parameters
    ----------
    labels : ndarray, (n_rows,) int64
        Number of the label of each row.
    limit : int
        How many rows to choose.

    Returns
    -------
    ndarray, (min(limit, n_rows),) int64
        Chosen row numbers, sorted.
    """
    groups = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    chosen: list[NDArray[np.int64]] = []
    left = limit
    for position, group in enumerate(sorted(groups, key=len)):
        quota = min(len(group), -(-left // (len(groups) - position)))
        # The middle of each of `quota` equal pieces.
        chosen.append(group[((np.arange(quota) + 0.5) * len(group) / max(quota, 1)).astype(int)])
        left -= quota
    return np.sort(np.concatenate(chosen))


def _stream(objects: Iterator[ObjectInfo], target: Path, on_listed: Callable[[int], None]) -> bool:
    """Write the listing as it comes; tell whether it came in byte order of the paths."""
    n_images, last, is_sorted = 0, "", True
    with pq.ParquetWriter(target, MANIFEST_SCHEMA, **_PARQUET) as writer:
        while batch := list(islice(objects, _ROW_GROUP_ROWS)):
            # Strings sort by code points, and so do their bytes in UTF-8.
            paths = [last, *(item.path for item in batch)]
            is_sorted = is_sorted and paths == sorted(paths)
            last = paths[-1]
            writer.write_table(_table(batch))
            n_images += len(batch)
            on_listed(n_images)
    return is_sorted


def _table(objects: Sequence[ObjectInfo]) -> pa.Table:
    paths = pa.array([o.path for o in objects], pa.string())
    # Label and split are those of the folder, and a folder holds many images: one look at each.
    parents = pc.list_element(pc.split_pattern(paths, "/", max_splits=1, reverse=True), 0)
    folders = parents.dictionary_encode()
    names = [label_and_split(f"{folder}/") for folder in folders.dictionary.to_pylist()]
    labels, splits = (
        pa.array(column, pa.string()).take(folders.indices) for column in zip(*names, strict=True)
    )
    etags, sizes = [o.etag for o in objects], [o.size_bytes for o in objects]
    return pa.table([paths, etags, sizes, labels, splits], schema=MANIFEST_SCHEMA)


def _check_not_empty(listing: Path, root: str) -> None:
    if pq.read_metadata(listing).num_rows == 0:
        raise InputError(
            f"found no image below {root}; expected files ending in {', '.join(IMAGE_SUFFIXES)}. "
            "Check the prefix of the input"
        )


def _rewrite(listing: Path, limit: int | None) -> Path:
    """Sort by path (a store may list in another order) and take the sample, in memory."""
    table = pq.read_table(listing)
    table = table.take(pc.sort_indices(table["path"].cast(pa.binary())))
    if limit is not None and limit < len(table):
        labels = pc.fill_null(table["label"], "").combine_chunks().dictionary_encode()
        codes = np.asarray(labels.indices).astype(np.int64)
        table = table.take(balanced_sample(codes, limit))
    target = listing.with_name("manifest.parquet")
    pq.write_table(table, target, row_group_size=_ROW_GROUP_ROWS, **_PARQUET)
    return target
