"""Fixtures of all tests.

::

    interrupts (autouse)        Ctrl-C reaches the processes that tests start
    aws_environment (autouse)   dummy keys; nothing of the user's AWS files and FRUITS_ variables
    shared                      ../shared beside the checkout, or FRUITS_SHARED; skips when absent
    +- photos                   a few real photos of both data sets
    moto_process                one recording moto server for the session
    +- moto_server              the same with an empty record, for one test
    s3rver_process              one s3rver for the session; skips when it is not installed
    s3_service [moto, s3rver]   a running S3 service, whichever
    +- bucket                   a fresh bucket there
    place [local, moto, s3rver] store and root address of an empty folder, for contract tests
    moto_place                  the same on moto only, where requests are counted
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fruits_dask.storage import LocalStore, Store, open_store
from servers import ACCESS_KEY, MISSING_S3RVER, SECRET_KEY, RecordingMoto, S3rver, S3Service

# Read now: the environment of the session has no FRUITS_ variables.
SHARED = Path(os.environ.get("FRUITS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PHOTOS_PER_SET = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An empty folder of some store."""

    kind: str
    """``local``, ``moto`` or ``s3rver``."""
    store: Store
    """The store."""
    root: str
    """Address of the folder; nothing is there."""

    def at(self, name: str) -> str:
        """Address of something below the folder."""
        return f"{self.root}/{name}"

    def fill(self, *names: str) -> None:
        """Write an object of each name, with the name as its content."""
        for name in names:
            self.store.write(self.at(name), name.encode())

    def names(self) -> list[str]:
        """List what is below the folder."""
        return [item.name for item in self.store.list_folder(self.root)]


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> Iterator[None]:
    """Start processes that see Ctrl-C, also where this one was started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(autouse=True, scope="session")
def aws_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("AWS_", "FRUITS_"))]:
            patch.delenv(name)
        nowhere = tmp_path_factory.mktemp("aws") / "absent"
        patch.setenv("AWS_CONFIG_FILE", str(nowhere))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nowhere))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        yield patch


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the shared data is not at {SHARED}; set FRUITS_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def photos(shared: Path) -> list[Path]:
    """Photos from all over both sets, small ones first."""
    found: list[Path] = []
    for name in ("fruits360", "grocery"):
        files = sorted((shared / "data" / name).rglob("*.jpg"))
        found += files[:: max(len(files) // PHOTOS_PER_SET, 1)][:PHOTOS_PER_SET]
    return found


@pytest.fixture(scope="session")
def moto_process() -> Iterator[RecordingMoto]:
    server = RecordingMoto()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def moto_server(moto_process: RecordingMoto) -> Iterator[RecordingMoto]:
    moto_process.forget()
    yield moto_process
    moto_process.forget()


@pytest.fixture(scope="session")
def s3rver_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3rver]:
    if MISSING_S3RVER:
        pytest.skip(MISSING_S3RVER)
    server = S3rver(tmp_path_factory.mktemp("s3rver"))
    yield server
    server.stop()


@pytest.fixture(params=["moto", "s3rver"])
def s3_service(request: pytest.FixtureRequest) -> S3Service:
    return _service(request, request.param)


@pytest.fixture
def bucket(s3_service: S3Service) -> str:
    return s3_service.new_bucket()


@pytest.fixture(params=["local", "moto", "s3rver"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(kind="local", store=LocalStore(), root=str(tmp_path / "folder"))
    return _s3_place(_service(request, request.param))


@pytest.fixture
def moto_place(moto_server: RecordingMoto) -> Place:
    place = _s3_place(S3Service(name="moto", endpoint_url=moto_server.endpoint_url))
    moto_server.forget()
    return place


def _service(request: pytest.FixtureRequest, name: str) -> S3Service:
    fixture = {"moto": "moto_server", "s3rver": "s3rver_process"}[name]
    return S3Service(name=name, endpoint_url=request.getfixturevalue(fixture).endpoint_url)


def _s3_place(service: S3Service) -> Place:
    root = f"s3://{service.new_bucket()}/folder"
    return Place(kind=service.name, store=open_store(root, service.options), root=root)
