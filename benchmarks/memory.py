"""Memory of workers and driver with few and with many images: it must not grow with them.

    python benchmarks/memory.py --json memory.json              # 6,833 and 60,000 images
    python benchmarks/memory.py --images 300 --images 900

Runs `python -m fruits_dask extract` on two local workers, once for each number of images, and reads
the peak of each worker from run.json. Where the folder has fewer photos than are asked for, it is
listed again through links, so all that is read, decoded and stored is real. The weights are those
of Keras; nothing is downloaded.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from common import (
    PHOTOS,
    SHARED,
    JsonFile,
    Row,
    conclude,
    link_copies,
    mib,
    peak_memory_bytes,
    print_table,
)

from fruits_dask.featurize.backbones import DEFAULT_BACKBONE, find_backbone

N_IMAGES = (6_833, 60_000)
N_WORKERS = 2
_POLL_SECONDS = 0.2


def measure(n_images: int, engine: str, photos: Path, keras_home: Path) -> Row:
    """Extract in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="fruits-benchmark-") as name:
        folder = Path(name)
        listed = link_copies(photos, folder, n_images)
        output = folder / "output"
        flags = {
            "input": listed,
            "output": output,
            "limit": n_images,
            "weights": "imagenet",
            "engine": engine,
            "cluster": "local",
            "workers": N_WORKERS,
            "dashboard-address": "127.0.0.1:0",
        }
        driver_bytes = _extract(flags, keras_home)
        return _row(output / "run.json", n_images, driver_bytes)


def _extract(flags: dict[str, object], keras_home: Path) -> int:
    """Run the command to its end and return the peak memory of its process."""
    command = [sys.executable, "-m", "fruits_dask", "extract"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("FRUITS_")}
    environment["KERAS_HOME"] = str(keras_home.resolve())
    peak = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:  # noqa: S603
        while process.poll() is None:
            peak = max(peak, peak_memory_bytes(process.pid))  # 0 once it has ended
            time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak


def _row(run_json: Path, n_images: int, driver_bytes: int) -> Row:
    facts = json.loads(run_json.read_text("utf-8"))["stages"]["extract"]
    if facts["n_features"] != n_images:
        raise SystemExit(f"{facts['n_features']:,} of {n_images:,} images have features")
    return {
        "images": n_images,
        "seconds": facts["seconds"],
        "images_per_second": facts["images_per_second"],
        "worker_peak_bytes": sorted(facts["peak_memory_bytes"].values()),
        "driver_peak_bytes": driver_bytes,
    }


def main(
    *,
    images: Annotated[list[int] | None, typer.Option(help="How many; may be repeated")] = None,
    engine: Annotated[str, typer.Option(help="tensorflow or openvino")] = "tensorflow",
    photos: Annotated[Path, typer.Option(exists=True, file_okay=False)] = PHOTOS,
    keras_home: Annotated[Path, typer.Option(help="Has models/ with the weights")] = (
        SHARED / "keras"
    ),
    json_file: JsonFile = None,
) -> None:
    """Compare the peak memory of extracting few and many images."""
    weights = keras_home / "models" / str(find_backbone(DEFAULT_BACKBONE).imagenet_file)
    if not weights.is_file():
        raise typer.BadParameter(f"there is no {weights}; give --keras-home")
    counts = sorted(images or N_IMAGES)
    rows = [measure(n_images, engine, photos, keras_home) for n_images in counts]
    for row in rows:
        row["worker_ratio"] = row["worker_peak_bytes"][-1] / rows[0]["worker_peak_bytes"][-1]
        row["driver_ratio"] = row["driver_peak_bytes"] / rows[0]["driver_peak_bytes"]
    print_table(
        f"peak memory of extract, engine {engine}; ratio to the first row",
        ["images", "seconds", "images/s", "workers MiB", "ratio", "driver MiB", "ratio"],
        [
            [
                *(f"{r['images']:,}", f"{r['seconds']:.1f}", f"{r['images_per_second']:,.1f}"),
                ", ".join(mib(peak) for peak in r["worker_peak_bytes"]),
                *(f"{r['worker_ratio']:.2f}", mib(r["driver_peak_bytes"])),
                f"{r['driver_ratio']:.2f}",
            ]
            for r in rows
        ],
    )
    conclude(json_file, rows, {"engine": engine, "workers": N_WORKERS, "images": counts})


if __name__ == "__main__":
    typer.run(main)
