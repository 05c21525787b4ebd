"""Both reducers on many rows: seconds, rows a second, memory, and what the components keep.

    python benchmarks/reduce_rows.py --json rows.json          # 100,000 and 1,000,000 rows
    python benchmarks/reduce_rows.py --rows 100000             # 0.5 GB of disk, a minute

The rows are made from a seed: 300 directions whose variances fall like those of MobileNetV2
features (the i-th as i ** -1.5), in noise. They are stored as the feature parts of a result, 2,048
rows each, some 5 GB for a million, and removed at the end. What is measured is the fit, as `reduce`
does it: reading the parts, and all that follows up to the model. Every fit has a new process and
new workers, which have imported what they need, so that peaks of memory are its own. The parts were
just written, so they come from the cache of the disk.
"""

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from common import (
    JsonFile,
    Row,
    conclude,
    in_new_process,
    mib,
    peak_memory_bytes,
    print_table,
)

from fruits_dask import layout
from fruits_dask.cluster.local import open_local
from fruits_dask.features import vector_table, write_table
from fruits_dask.records import Features, PartCount, StoreOptions
from fruits_dask.reduce import Reducer, fit_pca, prepare, prepare_worker
from fruits_dask.storage import LocalStore
from fruits_dask.tasks import bag_of

N_FEATURES = 1280
PART_ROWS = 2048
RANK = 300
NOISE = 1e-3
SEED = 20_240_601
# Random digits are hardly compressed.
ROW_BYTES = N_FEATURES * 4
REDUCERS: tuple[Reducer, ...] = ("incremental", "exact")


def main(
    rows: Annotated[list[int] | None, typer.Option(help="How many; may be given again")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the parts are kept meanwhile")] = None,
    components: Annotated[int, typer.Option(min=1)] = 100,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: one a core")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure both reducers."""
    sizes = rows or [100_000, 1_000_000]
    root = folder or Path(tempfile.gettempdir())
    check_disk(root, max(sizes))
    found: list[Row] = []
    for n_rows in sizes:
        with tempfile.TemporaryDirectory(dir=root, prefix="fruits-rows-") as output:
            in_new_process(store_rows, output, n_rows, workers)
            found += [
                in_new_process(measure, output, n_rows, workers, components, reducer)
                for reducer in REDUCERS
            ]
    show(found)
    conclude(json_file, found, {"components": components, "part_rows": PART_ROWS, "seed": SEED})


def check_disk(folder: Path, n_rows: int) -> None:
    """Refuse what would fill the disk."""
    needed = int(n_rows * ROW_BYTES * 1.2)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise typer.BadParameter(
            f"{n_rows:,} rows take {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB left; "
            "give another --folder or fewer --rows"
        )


def part_rows(index: int, n_rows: int) -> Features:
    """Make the rows of one part; the same for the same number."""
    common = np.random.default_rng(SEED)
    directions = common.normal(size=(RANK, N_FEATURES)) / np.sqrt(N_FEATURES)
    scales = np.arange(1, RANK + 1) ** -0.75
    mean = common.uniform(0, 3, N_FEATURES)
    random = np.random.default_rng([SEED, index])
    clean = random.normal(size=(n_rows, RANK)) * scales @ directions + mean
    noise = random.standard_normal((n_rows, N_FEATURES), dtype=np.float32)
    made: Features = (clean + NOISE * noise).astype(np.float32)
    return made


def counts(n_rows: int) -> list[PartCount]:
    """Count the rows of all parts."""
    starts = range(0, n_rows, PART_ROWS)
    sizes = [min(PART_ROWS, n_rows - start) for start in starts]
    return [
        PartCount(index=index, n_features=size, n_training=0, n_failures=0)
        for index, size in enumerate(sizes)
    ]


def write_part(output: str, count: PartCount) -> int:
    """Store one part as `extract` does."""
    vectors = part_rows(count.index, count.n_features)
    names = [f"/photos/{count.index:05d}-{number:04d}.jpg" for number in range(len(vectors))]
    keys = pa.table(
        {
            "path": names,
            "label": pa.array(["none"] * len(names)),
            "split": pa.nulls(len(names), pa.string()),
        }
    )
    path = layout.part_path(output, layout.FEATURES, count.index)
    write_table(LocalStore(), path, vector_table(keys, vectors, "features", {}))
    return len(names)


def store_rows(output: str, n_rows: int, n_workers: int | None) -> Row:
    """Store all parts, as workers do it."""
    with open_local(
        n_workers=n_workers, memory_limit=None, dashboard_address="127.0.0.1:0"
    ) as workers:
        n_stored = sum(workers.run(bag_of(counts(n_rows), partial(write_part, output))))
    return {"rows": n_stored}


def measure(
    output: str, n_rows: int, n_workers: int | None, components: int, reducer: Reducer
) -> Row:
    """Fit once."""
    prepare(reducer)
    with open_local(
        n_workers=n_workers, memory_limit=None, dashboard_address="127.0.0.1:0"
    ) as workers:
        workers.each(prepare_worker, reducer)
        before = max(workers.each(peak_memory_bytes))
        start = time.perf_counter()
        model = fit_pca(
            output, StoreOptions(), counts(n_rows), components=components, reducer=reducer
        )
        seconds = time.perf_counter() - start
        return {
            "rows": n_rows,
            "reducer": reducer,
            "seconds": round(seconds, 2),
            "rows_per_second": round(n_rows / seconds),
            "driver_peak_bytes": peak_memory_bytes(),
            "worker_peak_bytes": workers.each(peak_memory_bytes),
            "worker_start_bytes": before,
            "exact_share": model.exact_share,
            "explained_variance_ratio": float(model.explained_variance_ratio.sum()),
        }


def show(found: list[Row]) -> None:
    """Print one line a fit."""
    print_table(
        "Reducers",
        ("rows", "reducer", "seconds", "rows/s", "driver MiB", "workers MiB", "at start", "kept"),
        (
            (
                f"{row['rows']:,}",
                row["reducer"],
                f"{row['seconds']:.1f}",
                f"{row['rows_per_second']:,}",
                mib(row["driver_peak_bytes"]),
                " ".join(mib(n) for n in row["worker_peak_bytes"]),
                mib(row["worker_start_bytes"]),
                f"{row['exact_share']:.7f}",
            )
            for row in found
        ),
    )


if __name__ == "__main__":
    typer.run(main)
