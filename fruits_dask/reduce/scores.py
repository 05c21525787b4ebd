"""Rows to scores: every stored part is projected, and all scores are joined to one CSV file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import dask.bag as db
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from .. import layout
from ..features import read_vectors, vector_table, write_table
from ..records import StoreOptions
from ..storage import Store, open_store
from ..tasks import bag_of
from .model import PcaModel, read_model
from .rows import ahead

# Parts that one task projects: the model is read once for all of them.
_TASK_PARTS = 8
# Parts that make one piece of the CSV file.
_TABLE_PARTS = 8


def scores_bag(output: str, options: StoreOptions, indices: Sequence[int]) -> db.Bag | None:
    """Describe the projection of stored parts as a bag; nothing is computed.

    Parameters
    ----------
    output : str
        Address of a result with features and a model.
    options : StoreOptions
        How to reach it.
    indices : sequence of int
        Numbers of the parts.

    Returns
    -------
    dask.bag.Bag or None
        Of the number of rows of each part, some parts in each partition of the bag; None for no
        part.
    """
    groups = [indices[start : start + _TASK_PARTS] for start in range(0, len(indices), _TASK_PARTS)]
    bag = bag_of(groups, lambda group: write_scores(output, options, group))
    return bag if bag is None else bag.flatten()


def write_scores(output: str, options: StoreOptions, indices: Sequence[int]) -> list[int]:
    """Project stored parts and store their scores.

    Parameters
    ----------
    output : str
        Address of a result with features and a model.
    options : StoreOptions
        How to reach it.
    indices : sequence of int
        Numbers of the parts.

    Returns
    -------
    list of int
        Rows of each part.
    """
    store = open_store(output, options)
    model = read_model(store, output)
    return list(ahead(lambda index: _write_part(store, output, model, index), indices))


def _write_part(store: Store, output: str, model: PcaModel, index: int) -> int:
    part = read_vectors(store, layout.part_path(output, layout.FEATURES, index), "features")
    table = vector_table(part.keys, model.transform(part.vectors), "scores", part.metadata)
    write_table(store, layout.part_path(output, layout.SCORES, index), table)
    return len(table)


def write_scores_csv(store: Store, output: str, indices: Sequence[int]) -> None:
    """Join all stored scores to ``pca/scores.csv``.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.
    indices : sequence of int
        Numbers of the parts, in the order of the rows.
    """
    with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
        target = Path(folder, "scores.csv")
        tables = flat_scores(store, output, indices)
        first = next(tables)
        with pa_csv.CSVWriter(target, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
        store.upload(target, layout.join(output, layout.SCORES_CSV))


def flat_scores(store: Store, output: str, indices: Sequence[int]) -> Iterator[pa.Table]:
    """Read stored scores as flat tables, a few parts ahead of the consumer.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.
    indices : sequence of int
        Numbers of the parts, in the order of the rows.

    Yields
    ------
    pyarrow.Table
        Columns path, label, split, pc_001 .. pc_k, of the rows of some parts.
    """
    # A table has many columns, so one of few rows costs more than its rows.
    groups = (indices[i : i + _TABLE_PARTS] for i in range(0, len(indices), _TABLE_PARTS))
    yield from ahead(lambda group: _flat_table(store, output, group), groups)


def _flat_table(store: Store, output: str, indices: Sequence[int]) -> pa.Table:
    paths = [layout.part_path(output, layout.SCORES, index) for index in indices]
    parts = [read_vectors(store, path, "scores") for path in paths]
    table = pa.concat_tables([part.keys.replace_schema_metadata(None) for part in parts])
    columns = np.ascontiguousarray(np.concatenate([part.vectors for part in parts]).T)
    numbered = {f"pc_{number:03d}": column for number, column in enumerate(columns, start=1)}
    return pa.table({**{name: table[name] for name in table.column_names}, **numbered})
