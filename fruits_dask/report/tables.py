"""The tables of the page: numbers of a result in words, with the length of their bars."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .. import layout
from .contents import Contents
from .plots import NO_LABEL, NO_SPLIT

UNKNOWN = "–"  # noqa: RUF001 - a dash is what a table shows where it has no number
_STAGES = {
    "workers": ("workers", "start of the worker processes"),
    "plan": ("plan", "list the photos"),
    "extract": ("extract", "from photos to features"),
    "reduce": ("reduce", "from features to components"),
    "report": ("report", "this page, up to its writing"),
}
# In the order of the work. Those of extract run on all workers at once, those of reduce one by one.
_OPERATIONS = {
    "extract": {
        "read": "bytes from the store",
        "decode": "bytes to pixels",
        "featurize": "pixels to vectors",
        "store": "write features and thumbnails",
    },
    "reduce": {
        "fit": "find the components",
        "scores": "project every photo",
        "csv": "join the table",
    },
}
_REDUCERS = {"incremental": "dask-ml's IncrementalPCA", "exact": "the exact reducer"}
_GOALS = (0.5, 0.8, 0.9, 0.95, 0.99)
# A sum of shares that should be 1 differs from it by rounding.
_ALMOST_ALL, _ALL = 0.9995, 1 - 1e-9
_MINUTE = 60
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of the headline."""

    name: str
    """What it is."""
    value: str
    """The number."""
    note: str = ""
    """What helps to read it."""
    is_bad: bool = False
    """It calls for a look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """One row of the table of operations."""

    name: str
    """Of the stage or the operation."""
    note: str
    """What it does."""
    is_stage: bool
    """A stage; else an operation of the stage above."""
    wall: str
    """By the clock on the wall."""
    summed: str
    """Summed over the workers."""
    percent: float
    """Length of its bar."""
    is_summed: bool
    """The bar is for the sum over the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row of a table with bars."""

    name: str
    """What is counted."""
    cells: list[str]
    """Its numbers."""
    percent: float
    """Length of its bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The table of listed images."""

    columns: list[str]
    """Names of the splits, then the sum."""
    rows: list[Bar]
    """One a label."""
    sums: list[str]
    """Of the columns."""


def number(value: object) -> str:
    """Write a count with its thousands apart; a dash for what is no number."""
    return f"{value:,}" if isinstance(value, int) else UNKNOWN


def rate(value: object) -> str:
    """Write a quantity with about three digits."""
    if not isinstance(value, int | float):
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004


def share(value: object) -> str:
    """Write a share as percent; only what is whole is 100 %."""
    if not isinstance(value, int | float):
        return UNKNOWN
    return "> 99.9 %" if _ALMOST_ALL < value < _ALL else f"{100 * value:.1f} %"


def seconds(value: object) -> str:
    """Write a duration the way a person says it."""
    if not isinstance(value, int | float):
        return UNKNOWN
    if round(value, 1) < _MINUTE:
        return f"{value:.2f} s" if round(value, 2) < 10 else f"{value:.1f} s"  # noqa: PLR2004
    minutes, rest = divmod(round(value), _MINUTE)
    hours, left = divmod(minutes, _MINUTE)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def size(n_bytes: object) -> str:
    """Write a number of bytes in decimal units."""
    if not isinstance(n_bytes, int | float):
        return UNKNOWN
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= step:
            return f"{rate(n_bytes / step)} {unit}"
    return f"{n_bytes:.0f} bytes"


def headline(contents: Contents) -> list[Figure]:
    """Return the numbers that sum up a result."""
    return [*_photo_figures(contents), *_reduced_figures(contents), *_speed_figures(contents)]


def _photo_figures(contents: Contents) -> list[Figure]:
    planned, extracted = contents.stage("plan"), contents.stage("extract")
    n_images, n_failed = planned.get("n_images"), extracted.get("n_failures")
    failed_note = f"{share(n_failed / n_images)} of all" if n_failed and n_images else ""
    n_labels = len(planned["labels"]) if planned.get("labels") else None
    return [
        Figure(name="Photos listed", value=number(n_images), note=size(planned.get("n_bytes"))),
        Figure(name="Featurized", value=number(extracted.get("n_features"))),
        Figure(name="Failed", value=number(n_failed), note=failed_note, is_bad=bool(n_failed)),
        Figure(name="Labels", value=number(n_labels)),
    ]


def _reduced_figures(contents: Contents) -> list[Figure]:
    reduced, model = contents.stage("reduce"), contents.model
    kept = reduced.get("explained_variance_ratio")
    if model is None:
        return [
            Figure(name="Components", value=UNKNOWN),
            Figure(name="Variance kept", value=share(kept)),
        ]
    n_components, n_features = model.components.shape
    return [
        Figure(name="Components", value=number(n_components), note=f"of {n_features:,} features"),
        Figure(
            name="Variance kept",
            value=share(float(model.explained_variance_ratio.sum())),
            note=f"fitted on {model.n_samples:,} photos",
        ),
    ]


def _speed_figures(contents: Contents) -> list[Figure]:
    extracted = contents.stage("extract")
    n_workers = extracted.get("n_workers")
    workers = f"{n_workers:,} worker{'s' * (n_workers != 1)}" if n_workers else ""
    walls = [contents.stage(name).get("seconds") for name in _STAGES]
    known = [wall for wall in walls if wall is not None]
    return [
        Figure(name="Whole job", value=seconds(sum(known) if known else None), note="wall clock"),
        Figure(
            name="Photos per second", value=rate(extracted.get("images_per_second")), note=workers
        ),
    ]


def durations(contents: Contents) -> list[Duration]:
    """Return the rows of the table of operations; a bar is relative to the longest of its kind."""
    walls = [contents.stage(name).get("seconds") or 0.0 for name in _STAGES]
    summed = contents.stage("extract").get("operations", {}).values()
    longest = {False: max(walls), True: max(summed, default=0.0)}
    rows = []
    for stage, (name, note) in _STAGES.items():
        facts = contents.stage(stage)
        rows.append(_duration(name, note, facts.get("seconds"), longest, is_stage=True))
        rows += [
            _duration(operation, what, facts.get("operations", {}).get(operation), longest)
            for operation, what in _OPERATIONS.get(stage, {}).items()
        ]
    return rows


def _duration(
    name: str, note: str, value: float | None, longest: dict[bool, float], *, is_stage: bool = False
) -> Duration:
    is_summed = name in _OPERATIONS["extract"]
    return Duration(
        name=name,
        note=note,
        is_stage=is_stage,
        wall=UNKNOWN if is_summed else seconds(value),
        summed=seconds(value) if is_summed else UNKNOWN,
        percent=_percent(value or 0.0, longest[is_summed]),
        is_summed=is_summed,
    )


def memory(contents: Contents) -> list[Bar]:
    """Return the peak memory of each worker process."""
    found = contents.stage("extract").get("peak_memory_bytes") or {}
    longest = max(found.values(), default=0)
    return [
        Bar(name=worker, cells=[size(n_bytes)], percent=_percent(n_bytes, longest))
        for worker, n_bytes in found.items()
    ]


def counts(contents: Contents) -> Counts:
    """Return the listed images of each label, in each split when they were counted together."""
    planned = contents.stage("plan")
    cells = contents.cells
    if cells is None:
        cells = {(label, None): n for label, n in (planned.get("labels") or {}).items()}
    splits = sorted({split for _, split in cells}, key=lambda split: (split is None, split))
    labels = sorted({label for label, _ in cells}, key=lambda label: (label is None, label))
    table = {label: [cells.get((label, split), 0) for split in splits] for label in labels}
    if contents.cells is None or splits in ([], [None]):
        columns = ["Photos"]
    else:
        columns = [*(split or NO_SPLIT for split in splits), "All"]
        table = {label: [*row, sum(row)] for label, row in table.items()}
    longest = max((row[-1] for row in table.values()), default=0)
    rows = [
        Bar(
            name=label or NO_LABEL,
            cells=[number(n) for n in row],
            percent=_percent(row[-1], longest),
        )
        for label, row in table.items()
    ]
    return Counts(columns=columns, rows=rows, sums=_sums(table.values()))


def split_sums(contents: Contents) -> list[Bar]:
    """Return the listed images of each split, as the plan counted them."""
    found = contents.stage("plan").get("splits") or {}
    longest = max(found.values(), default=0)
    return [
        Bar(name=split, cells=[number(n)], percent=_percent(n, longest))
        for split, n in found.items()
    ]


def quality(contents: Contents) -> str:
    """Say what the reducer that ran kept of what is reachable; nothing if it was not measured."""
    model, reducer = contents.model, contents.stage("reduce").get("reducer")
    if model is None or model.exact_share is None or reducer not in _REDUCERS:
        return ""
    # Rounded down: only what is whole is 100 %.
    percent = int(min(model.exact_share + _ROUNDING, 1) * 1e6) / 1e4
    return (
        f"{len(model.components):,} components of {_REDUCERS[reducer]} keep {percent:g} % of the "
        f"variance that any {len(model.components):,} could keep at best"
    )


def reached(shares: Sequence[float]) -> list[tuple[str, int]]:
    """Find how many components it takes to reach round shares of the variance.

    Parameters
    ----------
    shares : sequence of float
        Share of each component, strongest first.

    Returns
    -------
    list of (str, int)
        Such as ``("80 %", 12)``; without those that are not reached.
    """
    sums = list(accumulate(shares))
    return [
        (f"{goal:.0%}".replace("%", " %"), bisect_left(sums, goal) + 1)
        for goal in _GOALS
        if sums and sums[-1] >= goal
    ]


def facts(contents: Contents) -> list[tuple[str, str]]:
    """Return what the result was made from, name and value."""
    run = contents.run
    made = {**run.get("settings", {}), **run.get("identity", {})}
    rows = [
        ("Input", made.get("input")),
        ("Output", contents.output),
        ("Weights", made.get("weights")),
        ("SHA-256 of the weights", _short(made.get("weights_sha256"))),
        ("Backbone", made.get("backbone")),
        ("Engine", made.get("engine")),
        ("Image size", f"{made['image_px']} px" if "image_px" in made else None),
        ("Preprocessing", made.get("preprocessing")),
        ("Fingerprint of the result", _short(run.get("fingerprint"))),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _short(digest: str | None) -> str | None:
    return f"{digest[:12]}… (whole in {layout.RUN_JSON})" if digest else None


def pairs(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return the items of a mapping from run.json, as text."""
    return [(name, UNKNOWN if v is None else str(v)) for name, v in sorted((values or {}).items())]


def _sums(rows: Iterable[list[int]]) -> list[str]:
    return [number(sum(column)) for column in zip(*rows, strict=True)]


def _percent(value: float, longest: float) -> float:
    return round(100 * value / longest, 1) if longest else 0.0
