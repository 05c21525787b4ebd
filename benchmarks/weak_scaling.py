"""Weak scaling simulated on one machine: more workers, the same work for each of them.

    python benchmarks/weak_scaling.py --json scaling.json     # 1 to 64 workers, some minutes
    python benchmarks/weak_scaling.py --quick                 # 1, 2 and 4 workers, half a minute

Simulated is the neural network only: on every worker a featurizer is put in place that sleeps for
each image and returns numbers made from the pixels. Everything else is real: a manifest of photos
(as many as are needed, by listing a folder again through links), the bag, the scheduler and the
worker processes of `open_local`, reading, decoding, and storing of parts. One thing is set
otherwise than in a run: what idle processes of distributed do is done less often (`LESS_OFTEN`).

What is real costs 1.5 to 2.5 ms of CPU an image (the second table tells). All workers share the
cores of this machine for it, where workers of a cluster have their own, so the sleep must be long
enough to leave the cores free: 64 workers at the default of 120 ms an image make 533 images/s,
which is 0.8 to 1.3 seconds of CPU a second, 40 to 67 % of two cores. Real workers are some ten
times faster (MobileNetV2 takes 9 ms on one thread), but their tasks are longer: 2,048 images in
18 s in a large run, here 64 images in 7.7 s. So for the same number of workers the scheduler has
twice as many tasks a second to do here as there. 64 workers should have 12 GiB of memory.

Worker k of n begins as if it were at k/n of its first task, because workers of a long run do not
work in step; in step they would all decode at the same moment. Speed and idle time are those
between the end of the first round of calls of the featurizers and the end of the last call, by the
clock of the workers. A featurizer is idle while its worker waits for tasks or bytes, or stores.
Starting the workers, and some tasks of one image to make them warm, are not part of it; how long
that took is stated.
"""

import tempfile
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import dask
import numpy as np
import psutil
import typer
from common import (
    PHOTOS,
    JsonFile,
    Row,
    conclude,
    in_new_process,
    link_copies,
    mib,
    peak_memory_bytes,
    print_table,
)
from distributed import Worker, WorkerPlugin

from fruits_dask import featurize
from fruits_dask.cluster.local import open_local
from fruits_dask.cluster.workers import Workers
from fruits_dask.extract import ExtractJob, extraction_bag
from fruits_dask.featurize.backbones import DEFAULT_BACKBONE, find_backbone
from fruits_dask.partition import partition_rows
from fruits_dask.records import Features, FeaturizerSpec, PartitionSummary, Pixels, StoreOptions
from fruits_dask.source import write_manifest
from fruits_dask.storage import LocalStore

N_WORKERS = (1, 2, 4, 8, 16, 32, 64)
# Few workers leave the cores free even when they are fast.
QUICK_N_WORKERS, QUICK_N_TASKS, QUICK_SECONDS_PER_IMAGE = (1, 2, 4), 3, 0.02
PARTITION_SIZE = 64  # the smallest that the package chooses
# What processes of distributed do all the time: 64 idle workers would keep 1.4 cores busy with it,
# and their 64 nannies the driver, where a worker of a cluster has a core and a nanny of its own.
LESS_OFTEN = {
    "distributed.admin.tick.interval": "1s",
    "distributed.worker.memory.monitor-interval": "5s",
    "distributed.worker.profile.enabled": False,
}

# When a call of a featurizer began and ended, in seconds since 1970.
Call = tuple[float, float]


class SleepingFeaturizer:
    """Takes its time, and gives numbers that compress as badly as features do.

    Parameters
    ----------
    n_features : int
        Length of a vector.
    seconds_per_image : float
        How long to sleep.
    first_share : float
        Share of the sleep of the first call.
    """

    def __init__(self, n_features: int, seconds_per_image: float, first_share: float) -> None:
        self.calls: list[Call] = []
        self._n_features = n_features
        self._seconds_per_image = seconds_per_image
        self._first_share = first_share

    def __call__(self, pixels: Pixels) -> Features:
        """Sleep, and return the vectors that belong to these pixels."""
        start = time.time()
        share = 1.0 if self.calls else self._first_share
        vectors = np.stack([self._vector(image) for image in pixels])
        spent = time.time() - start
        time.sleep(max(self._seconds_per_image * len(pixels) * share - spent, 0))
        self.calls.append((start, time.time()))
        return vectors

    def _vector(self, image: Pixels) -> Features:
        seed = zlib.crc32(image[::8, ::8].tobytes())
        return np.random.default_rng(seed).random(self._n_features, np.float32)


class SleepingPlugin(WorkerPlugin):  # type: ignore[misc]
    """Puts a `SleepingFeaturizer` where `get_featurizer` looks for the real one."""

    def __init__(self, spec: FeaturizerSpec, seconds_per_image: float, n_workers: int) -> None:
        self._spec = spec
        self._seconds_per_image = seconds_per_image
        self._n_workers = n_workers

    def setup(self, worker: Worker) -> None:
        """Register the featurizer; workers of a local cluster are named 0, 1, 2 and so on."""
        featurize._featurizers[self._spec] = SleepingFeaturizer(
            self._spec.n_features, self._seconds_per_image, 1 - worker.name / self._n_workers
        )


def calls_of_worker(spec: FeaturizerSpec) -> list[Call]:
    """Tell on a worker when its featurizer was called."""
    featurizer = featurize._featurizers[spec]
    assert isinstance(featurizer, SleepingFeaturizer)
    return featurizer.calls


def measure(n_workers: int, n_tasks: int, seconds_per_image: float, photos: str) -> Row:
    """Extract as many images as `n_tasks` partitions hold, in a folder that goes afterwards."""
    n_images = n_tasks * PARTITION_SIZE
    with tempfile.TemporaryDirectory(prefix="fruits-benchmark-") as folder:
        listed = link_copies(Path(photos), Path(folder), n_images)
        job = _job(f"{folder}/output")
        path = f"{job.output}/manifest.parquet"
        write_manifest(LocalStore(), str(listed), LocalStore(), path, limit=n_images)
        start = time.perf_counter()
        with (
            dask.config.set(LESS_OFTEN),
            open_local(
                n_workers=n_workers, memory_limit="1GiB", dashboard_address="127.0.0.1:0"
            ) as workers,
        ):
            _warm_up(workers, job, n_workers)
            workers._client.register_plugin(SleepingPlugin(job.spec, seconds_per_image, n_workers))
            row = {"workers": n_workers, "start_seconds": time.perf_counter() - start}
            row |= _measure_run(workers, job, n_tasks)
            calls = list(workers._client.run(calls_of_worker, job.spec).values())
            return row | _after_first_round(calls)


def _job(output: str) -> ExtractJob:
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
        thumbnail_step=PARTITION_SIZE,
    )


def _warm_up(workers: Workers, job: ExtractJob, n_workers: int) -> None:
    """Let every worker do some small tasks, whose parts are replaced later."""
    workers._client.register_plugin(SleepingPlugin(job.spec, 0, n_workers))
    for _ in workers.run(extraction_bag(job, partition_rows(8 * n_workers, 1))):
        pass


def _measure_run(workers: Workers, job: ExtractJob, n_tasks: int) -> Row:
    driver = psutil.Process()
    others = driver.children(recursive=True)
    rows = partition_rows(n_tasks * PARTITION_SIZE, PARTITION_SIZE)
    driver_cpu, workers_cpu = _cpu_seconds([driver]), _cpu_seconds(others)
    psutil.cpu_percent()
    start = time.perf_counter()
    summaries: list[PartitionSummary] = list(workers.run(extraction_bag(job, rows)))
    seconds = time.perf_counter() - start
    n_images = sum(summary.n_images for summary in summaries)
    real = sum(_real_seconds(summary) for summary in summaries)
    assert n_images == n_tasks * PARTITION_SIZE
    assert not any(summary.n_failures for summary in summaries)
    return {
        "images": n_images,
        "tasks": n_tasks,
        "seconds": seconds,
        "driver_cpu_share": (_cpu_seconds([driver]) - driver_cpu) / seconds,
        "workers_cpu_seconds_per_image": (_cpu_seconds(others) - workers_cpu) / n_images,
        "real_seconds_per_image": real / n_images,
        "machine_cpu_share": psutil.cpu_percent() / 100,
        "driver_peak_bytes": peak_memory_bytes(),
        "worker_peak_bytes": max(summary.peak_memory_bytes for summary in summaries),
    }


def _real_seconds(summary: PartitionSummary) -> float:
    return sum(summary.seconds[name] for name in ("read", "decode", "store"))


def _after_first_round(calls: list[list[Call]]) -> Row:
    """Compute speed and idle time from the calls of each worker; each call is one task."""
    ends = sorted(end for one in calls for _, end in one)[len(calls) - 1 :]
    gaps = [start - end for one in calls for (_, end), (start, _) in pairwise(one)]
    return {
        "images_per_second": (len(ends) - 1) * PARTITION_SIZE / (ends[-1] - ends[0]),
        "idle_seconds_per_task": sum(gaps) / len(gaps),
    }


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main(
    *,
    workers: Annotated[list[int] | None, typer.Option(help="How many; may be repeated")] = None,
    seconds_per_image: Annotated[float, typer.Option(min=0, help="Sleep of the featurizer")] = 0.12,
    tasks_per_worker: Annotated[int, typer.Option(min=2, help="Of 64 images each")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke test: few, fast workers")] = False,
    photos: Annotated[Path, typer.Option(exists=True, file_okay=False)] = PHOTOS,
    json_file: JsonFile = None,
) -> None:
    """Extract with more and more workers, each with the same number of photos."""
    chosen = sorted(workers or (QUICK_N_WORKERS if quick else N_WORKERS))
    if quick:
        tasks_per_worker, seconds_per_image = QUICK_N_TASKS, QUICK_SECONDS_PER_IMAGE
    rows: list[Row] = []
    for n in chosen:
        rows.append(
            in_new_process(measure, n, n * tasks_per_worker, seconds_per_image, str(photos))
        )
        # Against the first row: that of one worker, unless others were asked for.
        alone = rows[0]["images_per_second"] / rows[0]["workers"]
        rows[-1]["efficiency"] = rows[-1]["images_per_second"] / (n * alone)
    _print(rows, seconds_per_image)
    settings = {"seconds_per_image": seconds_per_image, "tasks_per_worker": tasks_per_worker}
    conclude(json_file, rows, settings | {"partition_size": PARTITION_SIZE})


def _print(rows: list[Row], seconds_per_image: float) -> None:
    print_table(
        f"weak scaling, the featurizer sleeps {seconds_per_image * 1e3:g} ms an image",
        ["workers", "images", "tasks", "seconds", "images/s", "efficiency", "idle ms/task"],
        [
            [
                *(r["workers"], f"{r['images']:,}", r["tasks"], f"{r['seconds']:.1f}"),
                *(f"{r['images_per_second']:,.1f}", f"{r['efficiency']:.1%}"),
                f"{r['idle_seconds_per_task'] * 1e3:.1f}",
            ]
            for r in rows
        ],
    )
    print_table(
        "what it took; driver = client and scheduler; wall and CPU of all but the sleep",
        [
            *("workers", "driver CPU", "driver MiB", "worker MiB", "CPU ms/image", "wall ms/image"),
            *("all cores", "start s"),
        ],
        [
            [
                *(r["workers"], f"{r['driver_cpu_share']:.0%}", mib(r["driver_peak_bytes"])),
                *(mib(r["worker_peak_bytes"]), f"{r['workers_cpu_seconds_per_image'] * 1e3:.2f}"),
                *(f"{r['real_seconds_per_image'] * 1e3:.2f}", f"{r['machine_cpu_share']:.0%}"),
                f"{r['start_seconds']:.1f}",
            ]
            for r in rows
        ],
    )


if __name__ == "__main__":
    typer.run(main)
