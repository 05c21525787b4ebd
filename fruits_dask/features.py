"""The stored parts: one Parquet file a partition for features, failures and thumbnails."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import __version__, layout
from .errors import NotFoundError, ResultError, StorageError
from .records import (
    FORMAT_VERSION,
    TRAINING_SPLITS,
    Failure,
    Features,
    FeaturizerSpec,
    PartCount,
)
from .storage import Store

FAILURES_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("path", "stage", "error", "message")]
)
THUMBNAILS_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("jpeg", pa.binary(), nullable=False),
    ]
)
_KEYS = ("path", "label", "split")
# Columns whose values repeat; a dictionary of any other takes more time and space than its values.
_REPEATED = ["label", "split", "stage", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of one stored part, with the vectors as a matrix."""

    keys: pa.Table
    """Columns path, label, split."""
    vectors: Features
    """(n_rows, n_columns) float32, in the order of `keys`."""
    metadata: dict[str, str]
    """How the vectors were made."""


def metadata(spec: FeaturizerSpec) -> dict[str, str]:
    """Describe how features were made, for the schema metadata of every part."""
    return {
        "model": spec.backbone,
        "engine": spec.engine,
        "precision": spec.precision,
        "weights_sha256": spec.weights_sha256,
        "preprocessing": f"{spec.image_px} px, bilinear (Pillow); {spec.preprocessing}",
        "package_version": __version__,
        "format_version": str(FORMAT_VERSION),
    }


def vector_table(
    keys: pa.Table, vectors: Features, name: str, described: Mapping[str, str]
) -> pa.Table:
    """Join keys and vectors to a table.

    Parameters
    ----------
    keys : pyarrow.Table
        Columns path, label, split, perhaps more.
    vectors : ndarray, (n_rows, n_columns) float32
        One row for every row of `keys`.
    name : str
        Name of the vector column, ``features`` or ``scores``.
    described : mapping of str to str
        Schema metadata.

    Returns
    -------
    pyarrow.Table
        path, label, split, and `name` as fixed_size_list<float32>[n_columns].
    """
    kind = pa.list_(pa.float32(), vectors.shape[1])
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, type=kind)
    table = keys.select(_KEYS).append_column(pa.field(name, kind, nullable=False), column)
    return table.replace_schema_metadata(dict(described))


def write_table(store: Store, path: str, table: pa.Table) -> None:
    """Write a table as one Parquet object, in one step."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=_REPEATED)
    store.write(path, buffer.getvalue())


def write_failures(store: Store, output: str, index: int, failures: Sequence[Failure]) -> None:
    """Store the failures of a partition; an empty part says that there were none."""
    rows = [asdict(failure) for failure in failures]
    table = pa.Table.from_pylist(rows, schema=FAILURES_SCHEMA)
    write_table(store, layout.part_path(output, layout.FAILURES, index), table)


def write_thumbnails(store: Store, output: str, index: int, jpegs: Mapping[str, bytes]) -> None:
    """Store small pictures of some images of a partition, path -> JPEG."""
    rows = [{"path": path, "jpeg": jpeg} for path, jpeg in jpegs.items()]
    table = pa.Table.from_pylist(rows, schema=THUMBNAILS_SCHEMA)
    write_table(store, layout.part_path(output, layout.THUMBNAILS, index), table)


def read_table(store: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet object, or some columns of it.

    Raises
    ------
    ResultError
        If the object is no Parquet file.
    """
    try:
        if columns is None:
            return pq.ParquetFile(io.BytesIO(store.read(path))).read()
        with store.open(path) as stream:
            return pq.ParquetFile(stream).read(columns=list(columns))
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as exc:
        raise ResultError(f"{path} is damaged ({exc}); remove it and run again") from exc


def read_vectors(store: Store, path: str, name: str) -> Part:
    """Read a part with its vectors as a matrix.

    Parameters
    ----------
    store : Store
        Where the part is.
    path : str
        Its address.
    name : str
        Name of the vector column, ``features`` or ``scores``.

    Returns
    -------
    Part
        Keys and vectors.
    """
    table = read_table(store, path)
    if name not in table.column_names:
        raise ResultError(f"{path} has no column {name!r}; remove it and run again")
    column = table[name].combine_chunks()
    n_columns = column.type.list_size
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), n_columns)
    return Part(keys=table.select(_KEYS), vectors=vectors, metadata=_decoded(table.schema))


def count_part(store: Store, output: str, index: int) -> PartCount:
    """Count the rows of one stored partition, without reading its vectors.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.
    index : int
        Number of the partition.

    Returns
    -------
    PartCount
        The counts; those of a missing failures part are 0.
    """
    splits = read_table(store, layout.part_path(output, layout.FEATURES, index), ["split"])["split"]
    try:
        failed = read_table(store, layout.part_path(output, layout.FAILURES, index), ["path"])
    except NotFoundError:
        failed = FAILURES_SCHEMA.empty_table()
    return PartCount(
        index=index,
        n_features=len(splits),
        n_training=pc.sum(pc.is_in(splits, pa.array(TRAINING_SPLITS))).as_py() or 0,
        n_failures=len(failed),
    )


def part_indices(store: Store, output: str, kind: str) -> list[int]:
    """List the numbers of the stored parts of a kind, sorted."""
    names = (item.name for item in store.list_folder(layout.join(output, kind)))
    return sorted(index for name in names if (index := layout.part_index(name)) is not None)


def _decoded(schema: pa.Schema) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def to_json(values: object) -> bytes:
    """Encode JSON the way all files of a result have it: sorted, indented, one final newline."""
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
