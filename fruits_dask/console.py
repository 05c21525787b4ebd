"""What a person sees while a command works: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

from .progress import Progress

# Plain lines come at most this often.
_LINE_SECONDS = 5.0
_WITH_TRACEBACKS = 2
# No speed is stated before there is something to measure.
_MIN_SECONDS = 0.5


@contextmanager
def open_progress(console: Console) -> Iterator[Progress]:
    """Yield the listener that fits where standard error goes; it leaves the console clean."""
    if not console.is_terminal:
        yield LineProgress(console)
        return
    live = LiveProgress(console)
    try:
        yield live
    finally:
        live.close()


def set_up_logging(console: Console, verbosity: int) -> None:
    """Send log records to standard error.

    Parameters
    ----------
    console : Console
        Of standard error.
    verbosity : int
        0 for warnings of this package, 1 for its information, 2 for everything it says and the
        information of the libraries.
    """
    ours = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    # What matters in a library comes back as an exception; its log is noise, most of all after ^C.
    theirs = (logging.CRITICAL, logging.ERROR, logging.INFO)[min(verbosity, 2)]

    def is_wanted(record: logging.LogRecord) -> bool:
        if verbosity < _WITH_TRACEBACKS:
            record.exc_info = record.exc_text = None
        return record.levelno >= (ours if record.name.startswith("fruits_dask") else theirs)

    handler = RichHandler(console=console, show_path=False, show_time=verbosity > 0, markup=False)
    # On the handler and not on the loggers, because distributed sets levels when it is imported.
    handler.addFilter(is_wanted)
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger("fruits_dask").setLevel(ours)


class _Meter:
    """Speed and rest of the running stage.

    The speed counts from the first sign of progress, because the first images wait for workers and
    for TensorFlow, which says nothing about the rest.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def speed(self, done: int) -> float | None:
        """Units a second, or None while it is too early to say."""
        if self._first is None:
            self._first = (done, time.monotonic())
        n_units, seconds = done - self._first[0], time.monotonic() - self._first[1]
        return n_units / seconds if n_units and seconds > _MIN_SECONDS else None

    def rest_seconds(self, done: int) -> float | None:
        """Seconds that are left at this speed, or None."""
        speed = self.speed(done)
        return None if speed is None or self._total is None else (self._total - done) / speed


def _describe(unit: str, speed: float | None, n_failures: int) -> str:
    words = []
    if speed is not None and unit:
        words.append(f"{speed:,.0f} {unit}/s" if speed >= 1 else f"{speed:,.2f} {unit}/s")
    if n_failures:
        words.append(f"{n_failures:,} failed")
    return ", ".join(words)


class LiveProgress:
    """A bar that is drawn again and again.

    Parameters
    ----------
    console : Console
        Of a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._stage = self._unit = ""
        self._meter = _Meter(None)

    def start(self, stage: str, *, total: int | None, unit: str, done: int = 0) -> None:
        """Show a bar for a stage."""
        self.close()
        self._stage, self._unit, self._meter = stage, unit, _Meter(total)
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(stage, total=total, completed=done, note="")
        self._bar.start()

    def update(self, done: int, *, n_failures: int = 0) -> None:
        """Move the bar."""
        if self._bar:
            note = _describe(self._unit, self._meter.speed(done), n_failures)
            self._bar.update(self._task, completed=done, note=note)

    def finish(self, note: str = "") -> None:
        """Replace the bar by one line."""
        self.close()
        self._console.print(
            f"[green]✓[/] [bold]{self._stage:8}[/] {self._meter.seconds:6.1f} s  {note}",
            highlight=False,
            soft_wrap=True,
        )

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None


class LineProgress:
    """A plain line every few seconds, for pipes and log files.

    Parameters
    ----------
    console : Console
        Of standard error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = self._unit = ""
        self._total: int | None = None
        self._meter = _Meter(None)
        self._last_line = 0.0

    def start(self, stage: str, *, total: int | None, unit: str, done: int = 0) -> None:
        """Print that a stage begins."""
        self._stage, self._unit, self._total = stage, unit, total
        self._meter, self._last_line = _Meter(total), time.monotonic()
        before = f", {done:,} done before" if done else ""
        amount = f": {total:,} {unit}{before}" if total is not None else ""
        self.say(f"{stage}{amount}")

    def update(self, done: int, *, n_failures: int = 0) -> None:
        """Print how far the stage is, if it is some seconds since the last line."""
        speed = self._meter.speed(done)
        if time.monotonic() - self._last_line < _LINE_SECONDS:
            return
        self._last_line = time.monotonic()
        of = f" of {self._total:,}" if self._total else ""
        rest = self._meter.rest_seconds(done)
        words = [
            f"{self._stage}: {done:,}{of} {self._unit}",
            _describe(self._unit, speed, n_failures),
            f"{rest:,.0f} s left" if rest is not None else "",
        ]
        self.say(", ".join(word for word in words if word))

    def finish(self, note: str = "") -> None:
        """Print that the stage is complete."""
        self.say(f"{self._stage}: done in {self._meter.seconds:.1f} s{'; ' + note if note else ''}")

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)
