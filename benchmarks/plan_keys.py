"""How planning grows with the number of keys, up to what no folder of this machine holds.

    python benchmarks/plan_keys.py --json plan.json            # 1 and 10 million keys, some minutes
    python benchmarks/plan_keys.py --keys 100000 --keys 200000

Simulated is one thing, the listing: `SimulatedBucket` makes the keys of a Fruits-360 of any size in
the order in which S3 lists them, without network. What S3 and botocore take to list comes on top in
reality. From there on it is the real code: `write_manifest` into a LocalStore, the cut into
partitions, the bag, and its graph as `Client.compute` of distributed 2026.8 serializes it. Each
size is measured in a new process, so that the peak of memory is that of planning alone.

With `--submit` (default) the same graph then runs on a local cluster of two workers, through
`open_local`, `Workers.run` and the performance report as in a run. Only `extract_partition` is
replaced on the workers by a function that returns at once. The driver holds client and scheduler.
"""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import psutil
import typer
from common import JsonFile, Row, conclude, in_new_process, mib, peak_memory_bytes, print_table

from fruits_dask import extract
from fruits_dask.cluster.local import open_local
from fruits_dask.extract import ExtractJob, extraction_bag
from fruits_dask.featurize.backbones import DEFAULT_BACKBONE, find_backbone
from fruits_dask.partition import partition_rows, partition_size
from fruits_dask.records import (
    EXTRACT_OPERATIONS,
    FeaturizerSpec,
    ObjectInfo,
    PartitionSummary,
    RowRange,
    StoreOptions,
)
from fruits_dask.source import read_rows, write_manifest
from fruits_dask.storage import LocalStore

ROOT = "s3://fruits/photos"
N_LABELS = 131
N_WORKERS = 2
# More than a row group, so that Parquet cannot make use of the repetition.
_POOL = 65_536
_N_LOOKUPS = 20


class SimulatedBucket(LocalStore):
    """A store that lists keys which are nowhere; a quarter of them in Test, as in Fruits-360.

    Parameters
    ----------
    n_keys : int
        How many.
    """

    def __init__(self, n_keys: int) -> None:
        self._n_keys = n_keys

    def list_images(self, root: str, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
        """Stream the keys in byte order, each made when it is asked for."""
        generator = random.Random(0)  # noqa: S311
        etags = [generator.randbytes(16).hex() for _ in range(_POOL)]
        sizes = [generator.randrange(2_500, 8_000) for _ in range(_POOL)]
        number = 0
        for folder, stop in _folders(root, self._n_keys):
            for photo in range(stop - number):
                yield ObjectInfo(
                    path=f"{folder}/{photo:06d}.jpg",
                    etag=etags[number % _POOL],
                    size_bytes=sizes[number % _POOL],
                )
                number += 1


def _folders(root: str, n_keys: int) -> Iterator[tuple[str, int]]:
    """Yield the folders in byte order, each with the number of keys up to its end."""
    fruits = ("Apple Braeburn", "Banana", "Cherry Rainier", "Grape White", "Pear Williams")
    labels = sorted(f"{fruits[i % len(fruits)]} {i}/".encode() for i in range(N_LABELS))
    first, last = n_keys // 4, n_keys
    for split, start, stop in (("Test", 0, first), ("Training", first, last)):
        for i, label in enumerate(labels, start=1):
            folder = f"{root}/{split}/{label.decode().rstrip('/')}"
            yield folder, start + (stop - start) * i // N_LABELS


def extract_job(output: str, n_images: int) -> ExtractJob:
    """Describe the job as the pipeline does; there are no weights, because nothing runs."""
    backbone = find_backbone(DEFAULT_BACKBONE)
    spec = FeaturizerSpec(
        backbone=backbone.name,
        engine="tensorflow",
        weights_sha256="0" * 64,
        image_px=backbone.image_px,
        n_features=backbone.n_features,
        preprocessing=backbone.preprocessing,
    )
    return ExtractJob(
        output=output,
        options=StoreOptions(),
        spec=spec,
        max_megapixels=64.0,
        concurrent_reads=16,
        thumbnail_step=-(-n_images // 1500),
    )


def measure_plan(n_keys: int) -> Row:
    """Plan a simulated bucket, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="fruits-benchmark-") as folder:
        return _measure_plan(n_keys, folder)


def _measure_plan(n_keys: int, folder: str) -> Row:
    before = peak_memory_bytes()
    path = f"{folder}/manifest.parquet"
    start = time.perf_counter()
    info = write_manifest(SimulatedBucket(n_keys), ROOT, LocalStore(), path)
    seconds = time.perf_counter() - start
    row = {"keys": n_keys, "seconds": seconds, "keys_per_second": n_keys / seconds}
    rows = partition_rows(info.n_images, partition_size(info.n_images))
    row |= _measure_graph(extract_job(folder, info.n_images), rows)
    row |= {"peak_bytes": peak_memory_bytes(), "peak_bytes_before": before}
    row |= {"manifest_bytes": Path(path).stat().st_size, "partitions": len(rows)}
    row["lookup_seconds"] = _measure_lookups(path, rows)
    start = time.perf_counter()
    assert sum(1 for _ in SimulatedBucket(n_keys).list_images(ROOT, ())) == info.n_images
    return row | {"simulation_seconds": time.perf_counter() - start}


def _measure_graph(job: ExtractJob, rows: list[RowRange]) -> Row:
    """Build the graph and do with it what `Client.compute` does before it sends it."""
    from dask._expr import FinalizeCompute  # noqa: PLC0415 - belongs to what is measured
    from dask.base import collections_to_expr  # noqa: PLC0415
    from distributed.protocol import serialize, to_serialize  # noqa: PLC0415
    from distributed.utils import nbytes  # noqa: PLC0415

    start = time.perf_counter()
    bag = extraction_bag(job, rows)
    assert bag is not None
    expression = FinalizeCompute(collections_to_expr(bag.to_delayed())).optimize()
    header, frames = serialize(to_serialize(expression), on_error="raise")
    seconds = time.perf_counter() - start
    return {
        "graph_seconds": seconds,
        "graph_bytes": nbytes(header) + sum(map(nbytes, frames)),
        "scheduler_tasks": len(expression.__dask_graph__()),
    }


def _measure_lookups(path: str, rows: list[RowRange]) -> float:
    """Time what each task does first: find its rows in the manifest. The file is in the cache."""
    chosen = rows[:: -(-len(rows) // _N_LOOKUPS)]
    start = time.perf_counter()
    for partition in chosen:
        read_rows(LocalStore(), path, partition)
    return (time.perf_counter() - start) / len(chosen)


def measure_submit(n_keys: int) -> Row:
    """Run the graph with nothing to do on two workers."""
    rows = partition_rows(n_keys, partition_size(n_keys))
    driver = psutil.Process()
    with open_local(
        n_workers=N_WORKERS, memory_limit="2GiB", dashboard_address="127.0.0.1:0"
    ) as workers:
        workers._client.run(replace_work)
        before = peak_memory_bytes()
        with workers.performance_report(lambda html: None):
            start, cpu = time.perf_counter(), sum(driver.cpu_times()[:2])
            n_done = sum(1 for _ in workers.run(extraction_bag(extract_job(ROOT, n_keys), rows)))
            seconds = time.perf_counter() - start
            cpu = sum(driver.cpu_times()[:2]) - cpu
            peak = peak_memory_bytes()
    assert n_done == len(rows)
    return {
        "keys": n_keys,
        "partitions": len(rows),
        "seconds": seconds,
        "seconds_per_partition": seconds / len(rows),
        "driver_cpu_share": cpu / seconds,
        "peak_bytes_before": before,
        "peak_bytes": peak,
        "peak_bytes_with_report": peak_memory_bytes(),
    }


def replace_work() -> None:
    """Put a function that does nothing in the place of the work, on a worker."""
    extract.extract_partition = do_nothing


def do_nothing(job: ExtractJob, rows: RowRange) -> PartitionSummary:  # noqa: ARG001
    """Return what `extract_partition` would, in shape."""
    return PartitionSummary(
        n_images=rows.stop - rows.start,
        n_failures=0,
        seconds=dict.fromkeys(EXTRACT_OPERATIONS, 0.0),
        worker="simulated-1",
        peak_memory_bytes=peak_memory_bytes(),
    )


def main(
    keys: Annotated[list[int] | None, typer.Option(help="How many; may be repeated")] = None,
    *,
    submit: Annotated[bool, typer.Option(help="Also run the graph on two workers")] = True,
    json_file: JsonFile = None,
) -> None:
    """Plan simulated buckets of several sizes."""
    keys = keys or [1_000_000, 10_000_000]
    plans = [in_new_process(measure_plan, n_keys) for n_keys in keys]
    print_table(
        "planning; of the seconds, those of the simulated listing in brackets",
        ["keys", "seconds", "keys/s", "peak MiB", "(imports)", "manifest MiB", "partitions"],
        [
            [
                *(f"{r['keys']:,}", f"{r['seconds']:.1f} ({r['simulation_seconds']:.1f})"),
                *(f"{r['keys_per_second']:,.0f}", mib(r["peak_bytes"])),
                *(mib(r["peak_bytes_before"]), f"{r['manifest_bytes'] / 2**20:,.1f}"),
                f"{r['partitions']:,}",
            ]
            for r in plans
        ],
    )
    print_table(
        "its graph, and what a task takes to find its rows",
        ["keys", "scheduler tasks", "graph KiB", "seconds to build", "lookup ms"],
        [
            [
                *(
                    f"{r['keys']:,}",
                    f"{r['scheduler_tasks']:,}",
                    f"{r['graph_bytes'] / 2**10:,.0f}",
                ),
                *(f"{r['graph_seconds']:.2f}", f"{r['lookup_seconds'] * 1e3:.1f}"),
            ]
            for r in plans
        ],
    )
    runs = [in_new_process(measure_submit, n_keys) for n_keys in keys] if submit else []
    if runs:
        _print_runs(runs)
    conclude(json_file, [*plans, *runs], {"keys": keys, "submit": submit})


def _print_runs(runs: list[Row]) -> None:
    print_table(
        "the same graph with nothing to do; driver = client and scheduler",
        [
            "keys",
            "partitions",
            "seconds",
            "ms each",
            "driver CPU",
            "before MiB",
            "peak MiB",
            "with report",
        ],
        [
            [
                *(f"{r['keys']:,}", f"{r['partitions']:,}", f"{r['seconds']:.1f}"),
                *(f"{r['seconds_per_partition'] * 1e3:.2f}", f"{r['driver_cpu_share']:.0%}"),
                *(mib(r["peak_bytes_before"]), mib(r["peak_bytes"])),
                mib(r["peak_bytes_with_report"]),
            ]
            for r in runs
        ],
    )


if __name__ == "__main__":
    typer.run(main)
