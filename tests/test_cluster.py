"""Workers: our own ones, and those of a cluster that somebody else runs."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.bag as db
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Client
from distributed.security import Security
from distributed.system import MEMORY_LIMIT

from browser import MISSING, console_problems, open_browser, wait_for
from fruits_dask import layout
from fruits_dask.cluster import (
    check_cluster,
    existing,
    local,
    open_cluster,
    rented_region,
    versions,
)
from fruits_dask.cluster.workers import Workers
from fruits_dask.config import resolve
from fruits_dask.errors import ClusterError, ConfigError, EngineError
from fruits_dask.featurize.weights import load_weights
from fruits_dask.residency import UNSTATED
from jobs import (
    OPTIONS,
    assert_same_tables,
    command,
    environment,
    names,
    tables,
    wait_until,
    write_photos,
)

START_SECONDS = 60
ANYWHERE = "127.0.0.1:0"


# ---------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("name", ["local", "tcp://127.0.0.1:8786", "tls://127.0.0.1:8786"])
def test_known_kinds_of_clusters(name: str) -> None:
    check_cluster(resolve({"cluster": name}).settings)


@pytest.mark.parametrize("name", ["", "Local", "ecs", "127.0.0.1:8786", "http://127.0.0.1:8786"])
def test_unknown_kinds_say_what_is_expected(name: str) -> None:
    settings = resolve().settings.model_copy(update={"cluster": name})
    with pytest.raises(ConfigError, match="expected local, ec2, the address of a Dask"):
        check_cluster(settings)


def test_rented_machines_need_buckets() -> None:
    flags = {"cluster": "ec2", "input": "s3://photos", "output": "s3://results"}
    check_cluster(resolve(flags).settings)
    for name in ("input", "output"):
        with pytest.raises(ConfigError, match=f"--{name} here is on this machine"):
            check_cluster(resolve({**flags, name: "here"}).settings)


PARIS = {"s3://photos": "eu-west-3", "s3://results": "eu-west-3"}


def test_machines_are_rented_where_the_photos_are() -> None:
    assert rented_region(resolve().settings, PARIS) == "eu-west-3"
    assert rented_region(resolve({"region": "eu-west-3"}).settings, {}) == "eu-west-3"


def test_nothing_leaves_its_region() -> None:
    with pytest.raises(ConfigError, match="give --region"):
        rented_region(resolve().settings, {"s3://photos": UNSTATED})
    with pytest.raises(ConfigError, match="outside the allowed regions"):
        rented_region(resolve({"region": "us-east-1"}).settings, {})
    with pytest.raises(ConfigError, match="is in eu-west-3 and the cluster in eu-central-1"):
        rented_region(resolve({"region": "eu-central-1"}).settings, PARIS)
    with pytest.raises(ConfigError, match="s3://results is in eu-north-1"):
        rented_region(resolve().settings, {**PARIS, "s3://results": "eu-north-1"})


def test_workers_fit_into_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CPU_COUNT", 16)
    for gigabytes, n_workers in ((0.5, 1), (3.1, 2), (6.2, 4), (100, 16)):
        monkeypatch.setattr(local, "MEMORY_LIMIT", int(gigabytes * 2**30))
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda g=gigabytes: type("M", (), {"available": g * 2**30})
        )
        assert local.default_n_workers() == n_workers


@pytest.mark.parametrize("limit", ["much", "4 apples"])
def test_a_limit_that_is_no_memory(limit: str) -> None:
    with pytest.raises(ConfigError, match="expected 4GiB"):
        local.memory_of_worker(limit, 2)


def test_a_limit_is_that_of_one_worker() -> None:
    assert local.memory_of_worker("4GiB", 2) == 4 * 2**30
    assert local.memory_of_worker(None, 4) * 4 == pytest.approx(MEMORY_LIMIT, abs=4)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999"])
def test_a_dashboard_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        local._free_address(address)


def test_a_busy_dashboard_port_gives_way_to_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert local._free_address(f"127.0.0.1:{port}") == ANYWHERE
    assert local._free_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"


# ---------------------------------------------------------------- local workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    chosen = {"workers": 2, "dashboard_address": ANYWHERE, "memory_limit": "2GiB"}
    settings = resolve(chosen).settings
    with open_cluster(settings) as found:
        yield found


@pytest.mark.slow
def test_local_workers_have_two_tasks_at_a_time_and_the_memory_that_was_given(
    workers: Workers,
) -> None:
    info = workers._client.scheduler_info(n_workers=-1)["workers"].values()
    assert [worker["nthreads"] for worker in info] == [2, 2]
    assert {worker["memory_limit"] for worker in info} == {2 * 2**30}
    assert workers.n_workers == 2
    assert workers.n_threads >= 1


@pytest.mark.slow
def test_no_door_is_open_to_the_network(workers: Workers) -> None:
    """Promise 8: scheduler, workers, nannies and dashboards listen on the loopback alone."""
    pids = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [
        connection.laddr.ip
        for pid in pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4
    assert {ip for ip in listening if not ip.startswith("127.")} == set()


def n_held(client: Any) -> int:
    """Count the tasks that the scheduler knows."""
    return int(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))


@pytest.mark.slow
def test_bags_are_computed_and_forgotten(workers: Workers) -> None:
    bag = db.from_sequence(range(20), npartitions=20).map(lambda x: x * x)
    assert sorted(workers.run(bag)) == [x * x for x in range(20)]
    assert list(workers.run(None)) == []
    wait_until(lambda: n_held(workers._client) == 0, seconds=10, what="the scheduler forgets")


@pytest.mark.slow
def test_leaving_early_cancels_the_rest(workers: Workers, tmp_path: Path) -> None:
    """Ctrl-C in the middle must not leave tasks that still write."""

    def touch(number: int) -> int:
        time.sleep(0.05)
        (tmp_path / str(number)).touch()
        return number

    results = workers.run(db.from_sequence(range(200), npartitions=200).map(touch))
    next(results)
    results.close()  # type: ignore[attr-defined]
    time.sleep(0.5)
    n_done = len(names(tmp_path))
    time.sleep(0.5)
    assert len(names(tmp_path)) == n_done < 100


@pytest.mark.slow
def test_weights_reach_workers_that_come_later(workers: Workers) -> None:
    weights = load_weights("fruits", None, OPTIONS)
    workers.deliver(weights.spec(engine="tensorflow"), lambda: weights.data, _leave_a_mark)
    workers._wait_for_delivery()
    client = workers._client
    before = set(client.run(os.getpid).values())
    os.kill(min(before), signal.SIGKILL)

    def is_replaced() -> bool:
        try:
            found = set(client.run(os.getpid).values())
        except OSError:  # the killed one is still in the list
            return False
        return len(found) == 2 and len(found - before) == 1

    wait_until(is_replaced, seconds=START_SECONDS, what="a new worker in place of the killed one")
    assert set(client.run(_sha256_of_installed).values()) == {(weights.sha256,)}
    wait_until(lambda: all(client.run(_is_marked).values()), seconds=START_SECONDS, what="the mark")


def _leave_a_mark() -> None:
    os.environ["FRUITS_TEST_MARK"] = "1"


def _is_marked() -> bool:
    return "FRUITS_TEST_MARK" in os.environ


def _sha256_of_installed() -> tuple[str, ...]:
    from fruits_dask import featurize  # noqa: PLC0415

    return tuple(hashlib.sha256(network).hexdigest() for network in featurize._networks.values())


@pytest.mark.slow
def test_what_is_asked_of_workers_waits_for_the_network(workers: Workers) -> None:
    """And fails when it could not be made, instead of running without it."""
    is_delivering = threading.Event()

    def fail() -> bytes:
        assert is_delivering.wait(START_SECONDS)  # `deliver` returns before this does
        raise EngineError("could not be converted")

    weights = load_weights("fruits", None, OPTIONS)
    workers.deliver(weights.spec(engine="openvino"), fail)
    is_delivering.set()
    try:
        for ask in (lambda: workers.each(os.getpid), lambda: list(workers.run(None))):
            with pytest.raises(EngineError, match="could not be converted"):
                ask()
    finally:
        workers._delivery = None


@pytest.mark.slow
def test_a_task_that_kills_its_workers_is_explained(workers: Workers) -> None:
    bag = db.from_sequence([1], npartitions=1).map(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        pytest.raises(ClusterError, match=r"memory.*--workers.*resume"),
    ):
        list(workers.run(bag))
    wait_until(lambda: workers.n_workers == 2, seconds=START_SECONDS, what="new workers")


@pytest.mark.slow
def test_the_performance_report_is_handed_over(workers: Workers, tmp_path: Path) -> None:
    kept: list[bytes] = []
    with workers.performance_report(lambda path: kept.append(path.read_bytes())):
        list(workers.run(db.from_sequence([1, 2], npartitions=2).map(abs)))
    assert len(kept) == 1
    assert b"<html" in kept[0]
    assert b"cdn.bokeh.org" not in kept[0]  # opens offline


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_dashboard_shows_the_workers(workers: Workers) -> None:
    assert workers.dashboard_url.startswith("http://127.0.0.1:")
    with open_browser() as driver:
        driver.get(workers.dashboard_url)
        wait_for(driver, "window.Bokeh && Bokeh.documents.length && Bokeh.index.roots.length")
        wait_for(driver, "document.querySelector('.bk-Figure, .bk-GridPlot, .bk-Tabs') !== null")
        assert "Dask" in driver.title
        assert [p for p in console_problems(driver) if "favicon" not in p] == []


# ---------------------------------------------------------------- borrowed workers


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def borrowed_cluster(
    folder: Path, *, scheme: str = "tcp", n_workers: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a scheduler and workers as separate processes, as an administrator would."""
    address = f"{scheme}://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    scheduler += ["--protocol", scheme]
    worker = ["worker", address, "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny"]
    dask_command = str(Path(sys.executable).with_name("dask"))
    with ExitStack() as stack:
        for arguments in (scheduler, *[[*worker, "--no-dashboard"]] * n_workers):
            process = stack.enter_context(
                subprocess.Popen(
                    [dask_command, *arguments],
                    cwd=folder,
                    env=environment(folder, **(env or {})),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            stack.callback(process.kill)
        yield address


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with borrowed_cluster(tmp_path_factory.mktemp("borrowed")) as address:
        wait_for_worker(address)
        yield address


def wait_for_worker(address: str, **options: object) -> None:
    with Client(address, timeout=START_SECONDS, set_as_default=False, **options) as client:
        client.wait_for_workers(1, timeout=START_SECONDS)


def run_flags(folder: Path, output: str, cluster: str) -> list[str]:
    return [
        *("run", "--input", str(folder / "in"), "--output", output, "--weights", "fruits"),
        *("--components", "5", "--partition-size", "8", "--cluster", cluster),
        *("--workers", "1", "--dashboard-address", ANYWHERE),
    ]


@pytest.mark.slow
def test_a_run_on_borrowed_workers_leaves_them_running(borrowed: str, tmp_path: Path) -> None:
    """And gives the same tables as workers of its own; a second job of other weights works, too."""
    write_photos(tmp_path / "in", 24, side_px=100)
    with Client(borrowed, set_as_default=False) as client:
        before = client.run(os.getpid)
        done = command(*run_flags(tmp_path, "borrowed", borrowed), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert client.run(os.getpid) == before
        assert not [name for name in plugins(client) if name.startswith("fruits_dask")]
        wait_until(lambda: n_held(client) == 0, seconds=10, what="the scheduler forgets")
    assert "Traceback" not in done.stderr
    own = command(*run_flags(tmp_path, "own", "local"), cwd=tmp_path)
    assert own.returncode == 0, own.stderr
    assert_same_tables(tables(tmp_path / "borrowed"), tables(tmp_path / "own"))
    assert (tmp_path / "borrowed" / layout.DASK_REPORT).is_file()


def plugins(client: Client) -> list[str]:
    """Names of what workers that join get from the scheduler."""
    names: list[str] = client.run_on_scheduler(
        lambda dask_scheduler: [*dask_scheduler.worker_plugins]
    )
    return names


@pytest.mark.slow
def test_other_versions_are_refused_by_name(borrowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that the workers have in no version, and one that nobody has."""
    monkeypatch.setattr(versions, "_SAME", ("dask", "tensorflow"))
    real = Client.get_versions

    def older(self: object, **options: object) -> dict[str, object]:
        found: dict[str, object] = real(self, **options)
        for answer in found["workers"].values():  # type: ignore[attr-defined]
            answer["packages"]["tensorflow"] = "1.15.0"
            answer["packages"]["dask"] = None
        return found

    monkeypatch.setattr(Client, "get_versions", older)
    with pytest.raises(ClusterError) as caught, existing.open_existing(borrowed):
        pass
    for words in ("tensorflow 1.15.0, here ", "dask missing, here ", "127.0.0.1", "Install"):
        assert words in str(caught.value)


@pytest.mark.slow
def test_the_same_versions_are_welcome(borrowed: str) -> None:
    with existing.open_existing(borrowed) as found:
        assert (found.n_workers, found.n_threads) == (1, 1)
        assert list(found.run(db.from_sequence([-3], npartitions=1).map(abs))) == [3]


@pytest.mark.slow
def test_a_cluster_without_workers_is_refused(tmp_path: Path) -> None:
    with (
        borrowed_cluster(tmp_path, n_workers=0) as address,
        pytest.raises(ClusterError, match="has no worker"),
        existing.open_existing(address),
    ):
        pass


@pytest.mark.slow
def test_nobody_answers(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ClusterError, match="no Dask scheduler answers at tcp://127"):
        existing.open_existing(f"tcp://127.0.0.1:{free_port()}").__enter__()
    assert time.monotonic() - start < 25


@pytest.mark.slow
def test_something_else_answers(tmp_path: Path) -> None:
    """A server that takes the connection and never speaks; in a process that can be ended."""
    code = (
        "import sys\n"
        "from fruits_dask.cluster import existing\n"
        "existing._CONNECT_SECONDS = 3\n"
        "existing.open_existing(sys.argv[1]).__enter__()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert "ClusterError: no Dask scheduler answers" in done.stderr


@pytest.mark.parametrize("address", ["tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:port"])
@pytest.mark.slow
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(existing, "_CONNECT_SECONDS", 2)
    with pytest.raises((ClusterError, ConfigError)):
        existing.open_existing(address).__enter__()


# ---------------------------------------------------------------- TLS


def write_certificate(folder: Path) -> dict[str, str]:
    """Make a key with a certificate of its own; return the Dask settings that use them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fruits")])
    now = datetime.datetime.now(datetime.UTC)
    local_address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([local_address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    pem.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    where = "DASK_DISTRIBUTED__COMM__TLS__"
    return {
        f"{where}CA_FILE": str(pem),
        **{f"{where}{role}__CERT": str(pem) for role in ("CLIENT", "SCHEDULER", "WORKER")},
    }


@pytest.mark.slow
def test_a_cluster_with_tls(tmp_path: Path) -> None:
    """Certificates come from the Dask configuration; without them it is said what is missing."""
    env = write_certificate(tmp_path)
    pem = next(iter(env.values()))
    write_photos(tmp_path / "in", 9, side_px=100)
    with borrowed_cluster(tmp_path, scheme="tls", env=env) as address:
        wait_for_worker(
            address,
            security=Security(tls_ca_file=pem, tls_client_cert=pem, require_encryption=True),
        )
        done = command(*run_flags(tmp_path, "out", address), cwd=tmp_path, **env)
        bare = command(*run_flags(tmp_path, "bare", address), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "9 with features" in done.stdout
    assert "BEGIN" not in (tmp_path / "out" / layout.RUN_JSON).read_text("utf-8")
    assert bare.returncode == 1
    assert "distributed.comm.tls" in bare.stderr
    assert "Traceback" not in bare.stderr


def _where() -> tuple[set[int], str | None]:
    return os.sched_getaffinity(0), os.environ.get("PILLOW_BLOCKS_MAX")


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers share the one core")
def test_workers_have_cores_of_their_own(workers: Workers) -> None:
    found = workers.each(_where)
    assert [len(cores) for cores, _ in found] == [workers.n_threads] * 2
    assert found[0][0].isdisjoint(found[1][0])
    assert {blocks for _, blocks in found} == {"8"}
    assert os.sched_getaffinity(0) >= found[0][0] | found[1][0]  # this process keeps all of them
