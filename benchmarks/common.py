"""What the benchmarks share: the machine in words, tables, JSON, memory."""

import json
import multiprocessing
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

SHARED = Path(__file__).resolve().parents[2] / "shared"
PHOTOS = SHARED / "data" / "fruits360"
_PACKAGES = ("fruits_dask", "dask", "distributed", "tensorflow", "openvino", "pyarrow")

# A table is drawn this wide at least, also into a file.
_WIDTH = 110

Row = dict[str, Any]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there")
]


def machine() -> dict[str, object]:
    """Describe what the numbers were measured on."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def peak_memory_bytes(pid: int | None = None) -> int:
    """Highest resident memory of a process so far, of this one by default.

    Not ru_maxrss: that of a new process begins with what its parent had.
    """
    status = Path(f"/proc/{pid or os.getpid()}/status").read_text("utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def in_new_process(function: Callable[..., Row], *arguments: object) -> Row:
    """Call a function in a new process, so that one measurement leaves nothing to the next."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def link_copies(photos: Path, folder: Path, n_images: int) -> Path:
    """Make a folder of links in which the photos are listed as often as `n_images` needs."""
    n_photos = sum(1 for _ in photos.rglob("*.jpg"))
    if n_photos == 0:
        raise typer.BadParameter(f"there is no .jpg below {photos}")
    target = folder / "photos"
    target.mkdir()
    for number in range(-(-n_images // n_photos)):
        (target / f"copy-{number:02d}").symlink_to(photos.resolve(), target_is_directory=True)
    return target


def mib(n_bytes: float) -> str:
    """Write bytes as MiB."""
    return f"{n_bytes / 2**20:,.0f}"


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below a title, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    _console().print(table)


def conclude(target: Path | None, rows: Sequence[Row], settings: Mapping[str, object]) -> None:
    """Print the machine and write everything as JSON."""
    print_machine()
    write_json(target, rows, settings)


def print_machine() -> None:
    """Print on one line what the numbers were measured on."""
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    _console().print(described, style="dim")


def write_json(target: Path | None, rows: Sequence[Row], settings: Mapping[str, object]) -> None:
    """Write the machine, the settings and what was measured."""
    if target is not None:
        found = {"machine": machine(), "settings": dict(settings), "rows": list(rows)}
        target.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def _console() -> Console:
    return Console(width=max(Console().width, _WIDTH))


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", path.read_text("utf-8")) if path.is_file() else None
    return found[1] if found else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
