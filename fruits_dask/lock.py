"""One run at a time in one output, on any store, without conditional writes.

Each run writes an object of its own below ``OUTPUT/.locks/`` and then lists that folder. Both S3
and local disks list what was written before, so of two runs at least one sees the other, and
whoever sees another gives way. The owner renews its object; one that was not renewed for a while,
by the clock of the store, is that of a dead run. A dead process of this very machine is noticed at
once.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from . import layout
from .errors import NotFoundError, OutputLockedError, StorageError
from .storage import Store, StoredObject

logger = logging.getLogger(__name__)

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0
# The start of a process, as psutil tells it, moves with corrections of the clock.
_CLOCK_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LockOwner:
    """Who holds a lock."""

    host: str
    """Name of the machine, for people."""
    machine: str
    """Boot and process namespace, in which a process id means one process."""
    pid: int
    """Process id of the driver."""
    started_seconds: float
    """When that process started, so that a reused id is not taken for it."""

    @classmethod
    def current(cls) -> LockOwner:
        """Describe this process."""
        return cls(
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            started_seconds=psutil.Process().create_time(),
        )

    @property
    def is_here(self) -> bool:
        """Tell whether this is a process of this machine, whose life can be seen."""
        return self.machine == _machine()

    def is_dead(self) -> bool:
        """Tell whether this is a process of this machine that has ended."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            age_difference = abs(process.create_time() - self.started_seconds)
            is_zombie = process.status() == psutil.STATUS_ZOMBIE
            return bool(is_zombie or age_difference > _CLOCK_SECONDS)
        except psutil.NoSuchProcess:
            return True


class OutputLock:
    """Hold an output for one run, as a context manager.

    Parameters
    ----------
    store : Store
        Where the output is.
    output : str
        Its address.
    renew_seconds, stale_seconds : float
        How often the lock is renewed, and after what age it counts as left behind.

    Raises
    ------
    OutputLockedError
        On entering, if another run holds the output.
    """

    def __init__(
        self,
        store: Store,
        output: str,
        *,
        renew_seconds: float = RENEW_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._store = store
        self._output = output
        self._folder = layout.join(output, layout.LOCKS)
        self._name = f"{uuid.uuid4().hex}.json"
        self._renew_seconds = renew_seconds
        self._stale_seconds = stale_seconds
        self._released = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)

    def __enter__(self) -> OutputLock:
        try:
            self._write()
        except StorageError as exc:
            raise StorageError(f"cannot write into the output {self._output}: {exc}") from exc
        except BaseException:  # Ctrl-C, and who knows how far it came
            self._remove()
            raise
        try:
            self._give_way()
            self._thread.start()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._release()

    def check(self) -> None:
        """Refuse to go on when another run took the output, because this one slept too long.

        Raises
        ------
        OutputLockedError
            If the lock was lost.
        """
        if self._lost.is_set():
            raise OutputLockedError(
                f"another run took over {self._output} while this one was suspended; wait for it, "
                "then run again"
            )

    def _release(self) -> None:
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        self._remove()

    def _remove(self) -> None:
        self._store.remove(self._path(self._name))
        self._store.prune(self._folder)

    def _path(self, name: str) -> str:
        return layout.join(self._folder, name)

    def _write(self) -> None:
        data = json.dumps(asdict(LockOwner.current())).encode()
        self._store.write(self._path(self._name), data)

    def _renew(self) -> None:
        while not self._released.wait(self._renew_seconds):
            try:
                if not self._store.exists(self._path(self._name)):
                    self._lost.set()
                    return
                self._write()
            except StorageError as exc:  # the run itself will meet it, or it passes
                logger.warning("could not renew the lock of the output: %s", exc)

    def _give_way(self) -> None:
        found = self._store.list_folder(self._folder)
        locks = {item.name: item for item in found if item.name.endswith(".json")}
        mine = locks.pop(self._name, None)
        now = mine.modified_seconds if mine else time.time()
        for item in locks.values():
            owner = self._owner(item)
            age = now - item.modified_seconds
            # On this machine a process is seen, so one that sleeps (Ctrl-Z, a closed lid) is alive.
            is_stale = age > self._stale_seconds and not (owner and owner.is_here)
            if owner is None or owner.is_dead() or is_stale:
                self._store.remove(self._path(item.name))
                continue
            left = f"start again {max(self._stale_seconds - age, 1):.0f} s from now"
            raise OutputLockedError(
                f"another run is writing into {self._output}: process {owner.pid} on "
                f"{owner.host}, last sign of life {max(age, 0):.0f} s ago. Wait for it, give "
                f"another --output, or {'end it' if owner.is_here else f'if it was killed, {left}'}"
            )

    def _owner(self, item: StoredObject) -> LockOwner | None:
        try:
            return LockOwner(**json.loads(self._store.read(self._path(item.name))))
        except (NotFoundError, ValueError, TypeError):
            return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux: containers, which share a host name, are not expected there
        return platform.node()
