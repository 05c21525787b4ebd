"""`lock`: one run at a time in one output, also after a kill, on any store."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from conftest import Place
from fruits_dask.errors import OutputLockedError, StorageError
from fruits_dask.lock import LockOwner, OutputLock
from fruits_dask.storage import LocalStore, StoredObject

ELSEWHERE = LockOwner(host="elsewhere", machine="other", pid=4711, started_seconds=0.0)
HOLD_A_LOCK = """
import sys, time
from fruits_dask.lock import OutputLock
from fruits_dask.records import StoreOptions
from fruits_dask.storage import open_store
root, endpoint_url = sys.argv[1:]
with OutputLock(open_store(root, StoreOptions(endpoint_url=endpoint_url or None)), root):
    print("held", flush=True)
    time.sleep(60)
"""


def locks(place: Place) -> list[str]:
    """Names of the lock objects in an output."""
    return [item.name for item in place.store.list_folder(place.at(".locks"))]


def leave_lock(place: Place, owner: LockOwner, name: str = "0123.json") -> None:
    """Store the lock of another run."""
    place.store.write(place.at(f".locks/{name}"), json.dumps(asdict(owner)).encode())


def age_lock(place: Place, seconds: float, name: str = "0123.json") -> None:
    """Let a stored lock look older."""
    path = place.at(f".locks/{name}")
    if place.kind == "local":
        os.utime(path, (time.time() - seconds,) * 2)
    else:
        bucket, key = path.removeprefix("s3://").split("/", 1)
        stored = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys[key]
        stored.last_modified -= timedelta(seconds=seconds)


@pytest.fixture(params=["local", "moto"])
def aging(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Make a place whose clock can be turned."""
    if request.param == "moto":
        return request.getfixturevalue("moto_place")
    return Place(kind="local", store=LocalStore(), root=str(tmp_path / "out"))


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(kind="local", store=LocalStore(), root=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("owner", "method"),
    [(LocalStore, "write"), (LocalStore, "list_folder"), (threading.Thread, "start")],
)
def test_an_interrupt_on_entering_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, local: Place, owner: type, method: str
) -> None:
    original = getattr(owner, method)

    def interrupted(*args: object) -> None:
        original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        with pytest.raises(KeyboardInterrupt), OutputLock(local.store, local.root):
            pytest.fail("entered")
    assert not Path(local.at(".locks")).exists()
    with OutputLock(local.store, local.root):
        assert len(locks(local)) == 1


def test_a_second_run_is_refused(place: Place) -> None:
    with OutputLock(place.store, place.root):
        first = locks(place)
        with (
            pytest.raises(OutputLockedError, match="another run is writing") as caught,
            OutputLock(place.store, place.root),
        ):
            pytest.fail("both hold the output")
        assert locks(place) == first
    message = str(caught.value)
    assert place.root in message
    assert f"process {os.getpid()} on {LockOwner.current().host}" in message
    assert "--output" in message


def test_a_lock_leaves_nothing_and_can_be_taken_again(place: Place) -> None:
    for _ in range(2):
        with OutputLock(place.store, place.root):
            assert len(locks(place)) == 1
        assert place.names() == []
    if place.kind == "local":
        assert not Path(place.at(".locks")).exists()


def test_a_lock_is_given_back_after_an_error(local: Place) -> None:
    with pytest.raises(ZeroDivisionError), OutputLock(local.store, local.root):
        raise ZeroDivisionError
    assert locks(local) == []


def test_two_outputs_do_not_meet(local: Place) -> None:
    with OutputLock(local.store, local.at("a")), OutputLock(local.store, local.at("b")):
        assert local.names() != []


def hold(place: Place) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a place."""
    endpoint_url = "" if place.kind == "local" else place.store._options.endpoint_url  # type: ignore[attr-defined]
    command = [sys.executable, "-c", HOLD_A_LOCK, place.root, endpoint_url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_lock_of_a_killed_run_is_taken_over_at_once(aging: Place) -> None:
    process = hold(aging)
    with pytest.raises(OutputLockedError, match=f"process {process.pid} "):
        OutputLock(aging.store, aging.root).__enter__()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(locks(aging)) == 1
    with OutputLock(aging.store, aging.root):
        assert len(locks(aging)) == 1
    assert locks(aging) == []


def test_a_killed_run_that_its_parent_has_not_noticed_is_dead_too(local: Place) -> None:
    process = hold(local)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    try:
        with OutputLock(local.store, local.root):
            assert len(locks(local)) == 1
    finally:
        process.communicate()


def test_a_fresh_lock_of_another_machine_is_respected(aging: Place) -> None:
    leave_lock(aging, ELSEWHERE)
    with pytest.raises(OutputLockedError, match="process 4711 on elsewhere"):
        OutputLock(aging.store, aging.root).__enter__()
    assert locks(aging) == ["0123.json"]


@pytest.mark.parametrize(("age_seconds", "is_taken_over"), [(50, False), (70, True)])
def test_a_lock_of_another_machine_is_taken_over_when_stale(
    aging: Place, age_seconds: float, is_taken_over: bool
) -> None:
    leave_lock(aging, ELSEWHERE)
    age_lock(aging, age_seconds)
    lock = OutputLock(aging.store, aging.root, stale_seconds=60)
    if is_taken_over:
        with lock:
            assert "0123.json" not in locks(aging)
    else:
        with pytest.raises(OutputLockedError, match=r"last sign of life (49|50|51) s ago"):
            lock.__enter__()


def test_the_message_says_how_long_to_wait(local: Place) -> None:
    leave_lock(local, ELSEWHERE)
    age_lock(local, 20)
    with pytest.raises(OutputLockedError, match=r"(39|40) s from now"):
        OutputLock(local.store, local.root, stale_seconds=60).__enter__()


def test_a_renewed_lock_does_not_get_stale(local: Place) -> None:
    with OutputLock(local.store, local.root, renew_seconds=0.05, stale_seconds=0.4):
        time.sleep(0.8)
        with pytest.raises(OutputLockedError):
            OutputLock(local.store, local.root, stale_seconds=0.4).__enter__()


def test_a_sleeping_process_of_this_machine_keeps_its_lock(local: Place) -> None:
    with OutputLock(local.store, local.root, renew_seconds=60):
        time.sleep(0.5)
        with pytest.raises(OutputLockedError, match="or end it"):
            OutputLock(local.store, local.root, stale_seconds=0.4).__enter__()


def test_a_run_notices_that_its_lock_was_taken_over(local: Place) -> None:
    with OutputLock(local.store, local.root, renew_seconds=0.05) as lock:
        lock.check()
        for name in locks(local):
            local.store.remove(f"{local.root}/.locks/{name}")
        time.sleep(0.5)
        with pytest.raises(OutputLockedError, match="took over"):
            lock.check()
        assert locks(local) == []


def test_renewal_ends_with_the_block(local: Place) -> None:
    before = threading.active_count()
    with OutputLock(local.store, local.root, renew_seconds=0.01):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    time.sleep(0.05)
    assert locks(local) == []


def test_a_renewal_that_fails_is_told_and_tried_again(
    local: Place, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(LocalStore):
        n_writes = 0

        def write(self, path: str, data: bytes) -> None:
            self.n_writes += 1
            if self.n_writes == 2:
                raise StorageError("the disk is full")
            super().write(path, data)

    store = Full()
    with caplog.at_level(logging.WARNING), OutputLock(store, local.root, renew_seconds=0.02):
        deadline = time.monotonic() + 5
        while store.n_writes < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert store.n_writes >= 4
    assert [record.getMessage() for record in caplog.records] == [
        "could not renew the lock of the output: the disk is full"
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_damaged_lock_is_removed(local: Place, content: bytes) -> None:
    local.store.write(local.at(".locks/0123.json"), content)
    with OutputLock(local.store, local.root):
        assert "0123.json" not in locks(local)


def test_of_two_runs_never_both_go_on(local: Place) -> None:
    inside: list[int] = []
    most_inside: list[int] = []
    start = threading.Barrier(3)

    def contend() -> None:
        for _ in range(15):
            start.wait()
            try:
                with OutputLock(local.store, local.root):
                    inside.append(1)
                    most_inside.append(len(inside))
                    time.sleep(0.002)
                    inside.pop()
            except OutputLockedError:
                pass
            start.wait()

    threads = [threading.Thread(target=contend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most_inside, default=1) == 1
    assert locks(local) == []


@pytest.mark.parametrize("moment", ["remove", "list"])
def test_a_run_that_ends_does_not_take_the_lock_of_the_next(local: Place, moment: str) -> None:
    left: list[str] = []

    def come(now: str) -> None:
        if ending and now == moment and not left:
            leave_lock(local, ELSEWHERE)
            left.append("0123.json")

    class Interrupted(LocalStore):
        """Another run comes right after a step of the one that ends."""

        def remove(self, path: str) -> None:
            super().remove(path)
            come("remove")

        def list_folder(self, folder: str) -> list[StoredObject]:
            found = super().list_folder(folder)
            come("list")
            return found

    ending: list[bool] = []
    with OutputLock(Interrupted(), local.root):
        ending.append(True)
    assert locks(local) == left


def test_this_process_is_alive() -> None:
    assert not LockOwner.current().is_dead()


def test_a_reused_process_number_is_not_taken_for_the_owner() -> None:
    me = LockOwner.current()
    assert replace(me, started_seconds=me.started_seconds - 1000).is_dead()


def test_a_corrected_clock_does_not_make_an_owner_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    pslinux = pytest.importorskip("psutil._pslinux", reason="the time of the boot is of Linux")
    me = LockOwner.current()
    boot_seconds = pslinux.boot_time()
    monkeypatch.setattr(pslinux, "boot_time", lambda: boot_seconds + 1)
    assert not me.is_dead()


def test_nothing_is_known_of_processes_of_other_machines() -> None:
    assert not replace(ELSEWHERE, pid=2**22 + 1).is_dead()
    assert replace(LockOwner.current(), pid=2**22 + 1).is_dead()
