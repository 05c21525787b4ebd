"""How a run tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Listens to a run."""

    def start(self, stage: str, *, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a stage; `total` is None when its size is not known, `done` was done before."""

    def update(self, done: int, *, n_failures: int = 0) -> None:
        """Tell how much of the running stage is done, with how many failures."""

    def finish(self, note: str = "") -> None:
        """Complete the running stage."""

    def say(self, message: str) -> None:
        """Tell the user something now."""


class Silent:
    """Listens and keeps quiet, for use as a library."""

    def start(self, stage: str, *, total: int | None, unit: str, done: int = 0) -> None:
        """Ignore the start of a stage."""

    def update(self, done: int, *, n_failures: int = 0) -> None:
        """Ignore progress."""

    def finish(self, note: str = "") -> None:
        """Ignore the end of a stage."""

    def say(self, message: str) -> None:
        """Ignore a message."""
