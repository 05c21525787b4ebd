"""Small photos, broken files, and doubles of what a run needs, for tests of the stages.

photo, write_photos     tiny JPEGs, each different, told apart by their colours
SPOILERS, SPOILED_LATER files that are no photos, and what happens to photos after they were listed
MeanColours, SPEC       a featurizer without an engine
plan_job                a manifest and the job of its partitions
FailingStore            a store whose n-th change fails, before or after it took place
RecordingStore          a store that remembers its calls
SyncWorkers             workers that are this very process
start, command          the command line in a process of its own
tables, snapshot        all that must be equal between two runs
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import dask.bag as db
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fruits_dask import layout
from fruits_dask.extract import ExtractJob
from fruits_dask.partition import partition_rows
from fruits_dask.records import Features, FeaturizerSpec, ObjectInfo, Pixels, RowRange, StoreOptions
from fruits_dask.residency import LOCAL
from fruits_dask.source import write_manifest
from fruits_dask.storage import LocalStore, Store, StoredObject

OPTIONS = StoreOptions()

# ---------------------------------------------------------------- photos


def photo(seed: int, *, side_px: int = 32, kind: str = "JPEG") -> bytes:
    """Encode a small picture: a few coloured fields, different for every seed."""
    fields = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(fields).resize((side_px, side_px), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_photos(
    root: Path,
    n_images: int,
    *,
    labels: tuple[str, ...] = ("Lemon", "Plum"),
    splits: tuple[str, ...] = ("Training", "Test"),
    side_px: int = 32,
) -> list[Path]:
    """Write photos to ``root/split/label/NNNN.jpg``, labels and splits in turn."""
    paths = []
    for number in range(n_images):
        label, split = labels[number % len(labels)], splits[number // len(labels) % len(splits)]
        path = root / split / label / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number, side_px=side_px))
        paths.append(path)
    return sorted(paths)


def png_header(width: int, height: int) -> bytes:
    """Encode a PNG of this size that has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Content of a file -> the error that it must end in, at stage decode.
SPOILERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "EmptyObjectError"),
    "text": (b"this is a note, not a photo", "NotAnImageError"),
    "html": (b"<html><body>404</body></html>", "NotAnImageError"),
    "gif": (photo(1, kind="GIF"), "NotAnImageError"),
    "truncated": (photo(2)[:400], "TruncatedImageError"),
    "first_bytes": (b"\xff\xd8\xff\xe0", "TruncatedImageError"),
    "damaged": (
        photo(3, kind="PNG")[:60] + b"\0" * 40 + photo(3, kind="PNG")[100:],
        "TruncatedImageError",
    ),
    "bomb": (png_header(50_000, 50_000), "PixelBombError"),
}


def _vanish(path: Path) -> None:
    path.unlink()


def _become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _become_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


# What happens to a photo between plan and extract -> the error that it must end in, at stage read.
SPOILED_LATER: dict[str, tuple[Callable[[Path], None], str]] = {
    "vanished": (_vanish, "NotFoundError"),
    "folder": (_become_folder, "StorageError"),
    "loop": (_become_loop, "StorageError"),
}

# ---------------------------------------------------------------- work

SPEC = FeaturizerSpec(
    backbone="mean_colours",
    engine="numpy",
    weights_sha256="0" * 64,
    image_px=16,
    n_features=48,
    preprocessing="none",
)


class MeanColours:
    """Implements `Featurizer`: the mean colours of 4 x 4 fields, repeated to the wanted length."""

    def __init__(self, n_features: int = SPEC.n_features) -> None:
        self._n_features = n_features

    def __call__(self, pixels: Pixels) -> Features:
        n_images, side = pixels.shape[:2]
        cell = side // 4
        fields = pixels[:, : 4 * cell, : 4 * cell].reshape(n_images, 4, cell, 4, cell, 3)
        means = fields.mean(axis=(2, 4)).reshape(n_images, 48) / 255
        repeats = -(-self._n_features // 48)
        # Powers, so that the repeated columns are no copies of each other.
        powers = [means ** (1 + number / 8) for number in range(repeats)]
        return np.concatenate(powers, axis=1)[:, : self._n_features].astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A manifest that is stored, and what to do with it."""

    job: ExtractJob
    partitions: list[RowRange]
    output: Path

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """All stored rows of a kind, in the order of the parts."""
        return rows_of(self.output, kind)

    def listed(self) -> list[str]:
        """Paths of the manifest."""
        return [str(row["path"]) for row in read_rows(self.output / layout.MANIFEST)]


def plan_job(
    source: Path,
    output: Path,
    *,
    size: int = 8,
    thumbnail_step: int = 1,
    spec: FeaturizerSpec = SPEC,
) -> Planned:
    """List photos and cut the list, as `pipeline` does."""
    store = LocalStore()
    manifest = layout.join(str(output), layout.MANIFEST)
    info = write_manifest(store, str(source), store, manifest)
    job = ExtractJob(
        output=str(output),
        options=OPTIONS,
        spec=spec,
        max_megapixels=64.0,
        concurrent_reads=4,
        thumbnail_step=thumbnail_step,
    )
    return Planned(job=job, partitions=partition_rows(info.n_images, size), output=output)


# ---------------------------------------------------------------- stores


class KillError(BaseException):
    """Stands for a kill: no code of the package expects it."""


@dataclass(slots=True, kw_only=True)
class Delegate:
    """A store that hands everything on to a local one; doubles override what they are about."""

    inner: Store = field(default_factory=LocalStore)

    def list_images(self, root: str, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
        return self.inner.list_images(root, suffixes)

    def list_folder(self, folder: str) -> list[StoredObject]:
        return self.inner.list_folder(folder)

    def read(self, path: str) -> bytes:
        return self.inner.read(path)

    def open(self, path: str) -> IO[bytes]:
        return self.inner.open(path)

    def write(self, path: str, data: bytes) -> None:
        self.inner.write(path, data)

    def upload(self, local_file: Path, path: str) -> None:
        self.inner.upload(local_file, path)

    def exists(self, path: str) -> bool:
        return self.inner.exists(path)

    def remove(self, path: str) -> None:
        self.inner.remove(path)

    def prune(self, folder: str) -> None:
        self.inner.prune(folder)

    def region(self, path: str) -> str | None:
        return self.inner.region(path)


@dataclass(slots=True, kw_only=True)
class FailingStore(Delegate):
    """Fails at the n-th change (from 0) and at every later one, as if the process had died.

    Removing a folder takes as many changes as it has files, because a kill may come between them.
    Locks are left out: they come and go with the clock.
    """

    fails_at: int
    n_changes: int = 0
    is_dead: bool = False

    def _change(self, path: str) -> None:
        if f"/{layout.LOCKS}" in path:
            return
        if self.is_dead or self.n_changes == self.fails_at:
            self.is_dead = True
            raise KillError(f"change {self.n_changes}: {path}")
        self.n_changes += 1

    def write(self, path: str, data: bytes) -> None:
        self._change(path)
        self.inner.write(path, data)

    def upload(self, local_file: Path, path: str) -> None:
        self._change(path)
        self.inner.upload(local_file, path)

    def remove(self, path: str) -> None:
        for item in self.inner.list_folder(path):
            self._change(path)
            self.inner.remove(f"{path}/{item.name}")
        if self.inner.exists(path):
            self._change(path)
        self.inner.remove(path)


@dataclass(slots=True, kw_only=True)
class RefusingStore(Delegate):
    """Refuses to read some paths, with the error that is given."""

    refused: Mapping[str, Exception]

    def read(self, path: str) -> bytes:
        if path in self.refused:
            raise self.refused[path]
        return self.inner.read(path)


@dataclass(slots=True, kw_only=True)
class RecordingStore(Delegate):
    """Remembers what was written, in order."""

    written: list[str] = field(default_factory=list)

    def write(self, path: str, data: bytes) -> None:
        self.written.append(path)
        self.inner.write(path, data)


# ---------------------------------------------------------------- results


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one Parquet file."""
    return list(pq.ParquetFile(path).read().to_pylist())


def rows_of(output: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of all parts of a kind, in their order."""
    return [row for path in sorted((output / kind).glob("*.parquet")) for row in read_rows(path)]


def vectors_of(output: Path, kind: str) -> Features:
    """Vectors of all parts, (n_rows, n_columns)."""
    name = kind.rpartition("/")[2]
    rows = [np.asarray(row[name], np.float32) for row in rows_of(output, kind)]
    return np.stack(rows)


def schema_of(path: Path) -> pa.Schema:
    """Read the schema of a Parquet file, with its metadata."""
    return pq.read_schema(path)


def tables(output: Path) -> dict[str, bytes]:
    """All that must be the same whenever the same run is done: name -> content."""
    found = {
        path.relative_to(output).as_posix(): path.read_bytes()
        for kind in (layout.MANIFEST, "features/*", "failures/*", "pca/scores/*", layout.SCORES_CSV)
        for path in sorted(output.glob(kind))
    }
    model = output / layout.PCA_MODEL
    if model.exists():
        with np.load(model, allow_pickle=False) as stored:
            for name in stored.files:
                found[f"{layout.PCA_MODEL}:{name}"] = stored[name].tobytes()
    return found


def assert_same_tables(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Compare two results of `tables`, naming the files that differ instead of their bytes."""
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def snapshot(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content, modification time and mode of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for path in sorted(folder.rglob("*"))
    }


def names(output: Path) -> set[str]:
    """Relative names of all files of a result."""
    return {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- commands

_NOT_INHERITED = ("FRUITS_", "AWS_", "DASK_", "KERAS_", "PYTHONWARNINGS")


def environment(home: Path, **extra: str) -> dict[str, str]:
    """Environment of a command: a home of its own, and no setting of whoever runs the tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
    return {**kept, "HOME": str(home), "COLUMNS": "200", **extra}


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, so that a test can end all of it."""
    return subprocess.Popen(
        [sys.executable, "-m", "fruits_dask", *arguments],
        cwd=cwd,
        env=environment(cwd, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    process = start(*arguments, cwd=cwd, **env)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a folder with the modification times of its files."""
    shutil.copytree(source, target, copy_function=shutil.copy2)
    return target


def session_of(process: subprocess.Popen[str]) -> list[int]:
    """Ids of all living processes that a command of `start` has started, and its own."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == process.pid and psutil.Process(pid).status() != "zombie":
                found.append(pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_until(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


class SyncWorkers:
    """Stands for `cluster.Workers`: does the tasks here, one after the other."""

    n_threads = 1
    n_workers = 1
    dashboard_url = "http://127.0.0.1/none"
    region = LOCAL

    def deliver(self, *_: Any) -> None:
        """Take nothing: the featurizer is in this process."""

    def check_reach(self, *addresses: Any) -> None:
        """Find all in reach: this is the very process that wrote it."""

    def run(self, bag: db.Bag | None) -> Iterator[Any]:
        """Compute item after item, so that a failure comes between two tasks."""
        for part in bag.to_delayed() if bag is not None else []:
            yield from part.compute(scheduler="synchronous")

    @contextmanager
    def performance_report(self, keep: Callable[[Path], None]) -> Iterator[None]:
        """Hand over a page when all went well, as the real one does."""
        yield
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder, "dask-performance.html")
            page.write_text("<html></html>", "utf-8")
            keep(page)
