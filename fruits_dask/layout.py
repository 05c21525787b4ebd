"""Names of everything in a result, in one place.

The same names are used below a local folder and below an s3:// prefix.
"""

from __future__ import annotations

import re

RUN_JSON = "run.json"
MANIFEST = "manifest.parquet"
FEATURES = "features"
FAILURES = "failures"
THUMBNAILS = "report/thumbnails"
PCA_MODEL = "pca/model.npz"
SCORES = "pca/scores"
SCORES_CSV = "pca/scores.csv"
REPORT = "report.html"
DASK_REPORT = "report/dask-performance.html"
SUCCESS = "_SUCCESS"
LOCKS = ".locks"

# What `--overwrite` removes, after `is_result_name` agreed to every single file.
# `_SUCCESS` and run.json come first, so that a removal cut short never looks like a result.
RESULT_NAMES = (
    SUCCESS,
    RUN_JSON,
    MANIFEST,
    FEATURES,
    FAILURES,
    "pca",
    REPORT,
    "report",
)
_SINGLE_NAMES = {SUCCESS, RUN_JSON, MANIFEST, PCA_MODEL, SCORES_CSV, REPORT, DASK_REPORT}
_PART_FOLDERS = {FEATURES, FAILURES, SCORES, THUMBNAILS}
# What desktops and consoles leave in any folder, and the probe of `doctor`.
_IGNORED = {"", ".DS_Store", "Thumbs.db", "desktop.ini"}
PROBE = ".doctor-"


def is_result_name(name: str) -> bool:
    """Tell whether a path relative to the output is that of a file of a result."""
    folder, _, file = name.rpartition("/")
    return name in _SINGLE_NAMES or (folder in _PART_FOLDERS and part_index(file) is not None)


def is_ignored_name(name: str) -> bool:
    """Tell whether a path relative to the output is of no importance to anyone."""
    top, file = name.split("/", 1)[0], name.rpartition("/")[2]
    return top == LOCKS or top.startswith(PROBE) or file in _IGNORED


def join(root: str, *names: str) -> str:
    """Join the address of a folder and names below it.

    Parameters
    ----------
    root : str
        ``s3://bucket/prefix`` or a local path.
    *names : str
        Relative names.

    Returns
    -------
    str
        One address with single slashes between its parts.
    """
    return "/".join([root.rstrip("/"), *(name.strip("/") for name in names)])


def part_name(index: int) -> str:
    """Name of the Parquet file of one partition, ``part-00000.parquet``."""
    return f"part-{index:05d}.parquet"


def part_path(output: str, kind: str, index: int) -> str:
    """Address of one part, such as ``OUTPUT/features/part-00000.parquet``."""
    return join(output, kind, part_name(index))


def part_index(name: str) -> int | None:
    """Return the number of the partition whose part has this name, None for other files."""
    # Five digits, or more that do not begin with 0, as `part_name` writes them.
    found = re.fullmatch(r"part-([0-9]{5}|[1-9][0-9]{5,})\.parquet", name.rsplit("/", 1)[-1])
    return int(found[1]) if found else None
