"""Machines rented from EC2 for one run, and given back."""

from __future__ import annotations

import copy
import logging
import os
import socket
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Network

import dask
from distributed import Client
from distributed.security import Security

from ...config import Settings, seconds_of
from ...errors import ClusterError, ConfigError, FruitsDaskError
from ...progress import Progress
from ...records import Capacity
from ..existing import connect
from ..kept import KeptCluster, certificates, check_name, forget, load, save
from ..versions import check_image, check_workers
from ..workers import WORKER_BYTES, Workers
from .account import CLUSTER_TAG, WORLD_BITS, Account, Kind, Subnet, explain
from .costs import Budget, check_price, hourly_cost
from .machines import DASHBOARD_PORT, Gate, Machines, Request
from .spot import SpotWatch

__all__ = ["Account", "examine", "give_back", "keep_ec2", "open_ec2", "open_kept"]

logger = logging.getLogger(__name__)

_DEFAULT_WORKERS = (2, 2)
_GIVE_BACK_SECONDS = 300.0
_POLL_SECONDS = 1.0
_LOOK_SECONDS = 10.0
_DASHBOARD_URL = f"http://127.0.0.1:{DASHBOARD_PORT}, through the tunnel"
_OWN_ADDRESS_URL = "https://checkip.amazonaws.com"
_PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


@dataclass(slots=True, kw_only=True)
class _Rental:
    """Machines that have come."""

    machines: Machines
    client: Client
    request: Request
    budget: Budget
    is_kept: bool = False
    """They stay when the block ends."""


@contextmanager
def open_ec2(settings: Settings, *, region: str, progress: Progress) -> Iterator[Workers]:
    """Rent machines, and give everything back at the end of the block, however it ends.

    Parameters
    ----------
    settings : Settings
        Those of rented machines, `workers` and `profile`.
    region : str
        Where to rent.
    progress : Progress
        Who listens.

    Yields
    ------
    Workers
        The processes of all machines that came.

    Raises
    ------
    ConfigError
        If a setting does not fit what is there; nothing was rented then.
    ClusterError
        If AWS refuses, or no machine answers in time; everything is given back.
    """
    name = f"run-{uuid.uuid4().hex[:8]}"
    account = Account(region, settings.profile)
    with _rented(settings, account, name, progress) as rental:
        progress.say(tunnel(rental.machines))
        request = rental.request
        with _in_use(
            rental.client,
            rental.budget,
            idle_seconds=request.idle_seconds,
            n_threads=request.n_threads,
            region=region,
        ) as workers:
            yield workers


def keep_ec2(settings: Settings, account: Account, name: str, progress: Progress) -> KeptCluster:
    """Rent machines that stay for several runs, until nothing uses them for `idle_timeout`.

    Parameters
    ----------
    settings : Settings
        As for `open_ec2`.
    account : Account
        Whose machines.
    name : str
        What to call the cluster.
    progress : Progress
        Who listens.

    Returns
    -------
    KeptCluster
        How to reach it; this machine remembers that.

    Raises
    ------
    ConfigError
        If a setting does not fit what is there, or the name is taken.
    ClusterError
        If AWS refuses, or no machine answers in time; everything is given back.
    """
    check_name(name)
    if settings.workers and settings.workers[0] != settings.workers[1]:
        raise ConfigError(
            "a cluster that is kept has a fixed number of --workers: nobody scales it between runs"
        )
    if account.machines(name):
        raise ConfigError(
            f"there is a cluster {name} in {account.region}; give another name, or first "
            f"`cluster down {name}`"
        )
    with _rented(settings, account, name, progress) as rental:
        cluster = KeptCluster(
            name=name,
            region=account.region,
            address=rental.client.scheduler.address,
            n_threads=rental.request.n_threads,
            hourly=rental.budget.hourly,
            max_hours=rental.budget.hours,
            start=rental.budget.start,
            idle_seconds=rental.request.idle_seconds,
            tls=certificates(rental.machines.security),
        )
        save(cluster)
        progress.say(tunnel(rental.machines))
        rental.is_kept = True
    return cluster


@contextmanager
def open_kept(name: str, settings: Settings, *, region: str) -> Iterator[Workers]:
    """Use a cluster that `keep_ec2` rented; it stays when the block ends.

    Parameters
    ----------
    name : str
        Name of the cluster.
    settings : Settings
        ``max_cost`` is used, and counts from the start of the cluster.
    region : str
        Where it must be.

    Yields
    ------
    Workers
        Its processes.

    Raises
    ------
    ConfigError
        If it is in another region.
    ClusterError
        If it does not answer, most likely because it has ended by itself.
    """
    cluster = load(name)
    if cluster.region != region:
        raise ConfigError(f"the cluster {name} is in {cluster.region}, and the photos in {region}")
    check_price(cluster.hourly, settings.max_cost, {"its machines"})
    budget = Budget(
        hourly=cluster.hourly,
        max_cost=settings.max_cost,
        max_hours=cluster.max_hours,
        start=cluster.start,
    )
    budget.check()
    with (
        connect(cluster.address, cluster.security, f"the cluster {name}") as client,
        _in_use(
            client,
            budget,
            idle_seconds=cluster.idle_seconds,
            n_threads=cluster.n_threads,
            region=region,
        ) as workers,
    ):
        yield workers


@contextmanager
def _rented(
    settings: Settings, account: Account, name: str, progress: Progress
) -> Iterator[_Rental]:
    """Rent, and give back at the end of the block unless the machines are kept."""
    request, subnet = plan_request(settings, account, name)
    fewest, most = settings.workers or _DEFAULT_WORKERS
    budget = _budget(settings, request, most)
    request = replace(request, max_hours=budget.hours)
    before = copy.deepcopy(dask.config.config)
    gate = Gate()
    rental: _Rental | None = None
    try:
        groups = list(settings.security_groups) or [
            account.make_group(name, subnet.vpc, _client_cidr(settings, subnet), request.tags)
        ]
        progress.say(f"renting {request.scheduler_instance_type} for the scheduler")
        with _start(request, groups, account, gate) as machines, Client(machines) as client:
            progress.say(f"renting {fewest} machines, {request.worker_instance_type}")
            machines.scale(fewest)
            _wait_for_workers(client, machines, fewest, progress)
            check_workers(client, f"the rented machines ({request.docker_image})")
            if request.spot:
                client.register_plugin(SpotWatch())
            if most > fewest:
                machines.follow_the_work(fewest, most)
                progress.say(f"from now on {fewest} to {most} machines, as there is work")
            rental = _Rental(machines=machines, client=client, request=request, budget=budget)
            yield rental
    finally:
        dask.config.config.clear()  # the library puts the keys of the cluster there
        dask.config.config.update(before)
        if rental is None or not rental.is_kept:
            _end(account, name, gate, progress)


def _end(account: Account, name: str, gate: Gate, progress: Progress) -> None:
    with suppress(Exception):  # whatever becomes of the message
        progress.say(f"giving back what was rented for {name}")
    try:
        gate.close()
        account.end(name, known=gate.young, timeout_seconds=_GIVE_BACK_SECONDS)
    except BaseException:
        progress.say(
            f"NOT ALL IS GIVEN BACK: `cluster down {name} --region {account.region}` does the rest"
        )
        raise


@contextmanager
def _in_use(
    client: Client, budget: Budget, *, idle_seconds: float, n_threads: int, region: str
) -> Iterator[Workers]:
    workers = Workers(
        client,
        n_threads=n_threads,
        dashboard_url=_DASHBOARD_URL,
        region=region,
        check=budget.check,
    )
    try:
        with _kept_alive(client, idle_seconds / 4):
            yield workers
    finally:
        workers.withdraw()


def give_back(account: Account, cluster: str) -> None:
    """End the machines of a cluster and remove its firewalls, from any machine.

    Parameters
    ----------
    account : Account
        Whose they are.
    cluster : str
        Name of the cluster.

    Raises
    ------
    ClusterError
        If something is left; the message names it.
    """
    account.end(cluster, timeout_seconds=_GIVE_BACK_SECONDS)
    forget(cluster)


def examine(settings: Settings, *, region: str) -> Capacity:
    """Check what a run would rent; nothing is rented.

    Parameters
    ----------
    settings : Settings
        As for `open_ec2`.
    region : str
        Where to rent.

    Returns
    -------
    Capacity
        The most that would come.

    Raises
    ------
    ConfigError
        Naming the setting that does not fit.
    ClusterError
        If AWS refuses a question.
    """
    request, subnet = plan_request(settings, Account(region, settings.profile), "run-none")
    fewest, most = settings.workers or _DEFAULT_WORKERS
    budget = _budget(settings, request, most)
    if not settings.security_groups:
        _client_cidr(settings, subnet)
    price = "price not known (hourly_prices)" if budget.hourly is None else f"{budget.hourly:,.2f}"
    count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return Capacity(
        n_processes=most * request.n_processes,
        hourly=budget.hourly,
        is_rented=True,
        description=f"{request.scheduler_instance_type} for the scheduler and {count} x "
        f"{request.worker_instance_type} with {request.n_processes} processes each in {region}; an "
        f"hour at most: {price}. The quota of the account must allow their virtual CPUs (Service "
        "Quotas, Amazon EC2)",
    )


def plan_request(settings: Settings, account: Account, name: str) -> tuple[Request, Subnet]:
    """Decide what is rented, and check all that can be checked before a cent is spent.

    Parameters
    ----------
    settings : Settings
        As resolved.
    account : Account
        Whose machines.
    name : str
        What the cluster will be called.

    Returns
    -------
    Request, Subnet
        What, and where.

    Raises
    ------
    ConfigError
        Naming the setting.
    """
    account.caller()
    worker = account.kind(settings.worker_instance_type or settings.instance_type)
    scheduler_name = settings.scheduler_instance_type or settings.instance_type
    scheduler = worker if scheduler_name == worker.name else account.kind(scheduler_name)
    image = _checked_image(settings.docker_image)
    n_processes = _n_processes(settings, worker)
    for kind in (worker, scheduler):
        if "x86_64" not in kind.architectures:
            raise ConfigError(f"{kind.name} is no x86_64 machine, which the image needs")
    subnet = account.subnet(settings.subnet_id, settings.vpc)
    if settings.security_groups:
        account.check_groups(settings.security_groups)
    ami = settings.ami if settings.ami.startswith("ami-") else account.parameter(settings.ami)
    request = Request(
        cluster=name,
        region=account.region,
        profile=settings.profile,
        availability_zone=settings.availability_zone,
        vpc=subnet.vpc,
        subnet_id=subnet.id,
        ami=ami,
        scheduler_instance_type=scheduler.name,
        worker_instance_type=worker.name,
        is_gpu=worker.n_gpus > 0,
        docker_image=image,
        iam_instance_profile=settings.iam_instance_profile,
        use_private_ip=settings.use_private_ip,
        spot=settings.spot,
        key_name=settings.key_name,
        filesystem_size=settings.filesystem_size,
        tags={**settings.instance_tags, CLUSTER_TAG: name},
        n_processes=n_processes,
        n_threads=max(1, worker.n_cores // n_processes),
        environment={"AWS_DEFAULT_REGION": account.region}
        | {key: os.environ[key] for key in _PASSED_ON if key in os.environ},
        start_seconds=seconds_of(settings.start_timeout),
        idle_seconds=seconds_of(settings.idle_timeout),
        max_hours=settings.max_hours,
    )
    _check_quotes(request)
    return request, subnet


def _budget(settings: Settings, request: Request, n_workers: int) -> Budget:
    kinds = (request.scheduler_instance_type, request.worker_instance_type)
    hourly = hourly_cost(settings.hourly_prices, *kinds, n_workers)
    check_price(hourly, settings.max_cost, set(kinds))
    return Budget(hourly=hourly, max_cost=settings.max_cost, max_hours=settings.max_hours)


def _checked_image(image: str | None) -> str:
    if not image:
        raise ConfigError(
            "--cluster ec2 needs a docker_image with this package: deploy/README.md says how to "
            "build one"
        )
    check_image(image)
    return image


def _n_processes(settings: Settings, kind: Kind) -> int:
    n_processes = settings.processes_per_worker or (1 if kind.n_gpus else kind.n_cores)
    if n_processes * WORKER_BYTES > kind.memory_bytes:
        fitting = int(kind.memory_bytes // WORKER_BYTES)
        advice = f"processes_per_worker = {fitting}, or " if fitting else ""
        raise ConfigError(
            f"{kind.name} has {kind.memory_bytes / 2**30:.1f} GiB, too little for {n_processes} "
            f"worker processes of {WORKER_BYTES / 2**30:g} GiB; set {advice}an instance_type "
            "with more memory"
        )
    return n_processes


def _check_quotes(request: Request) -> None:
    """Refuse what would break the shell line within YAML quotes that the library makes of it."""
    for name, value in {"docker_image": request.docker_image, **request.environment}.items():
        if set(value) & set("'\"\n\\$`"):
            raise ConfigError(f"{name} = {value!r} must not contain quotes, $, ` or backslashes")


def _client_cidr(settings: Settings, subnet: Subnet) -> str:
    """Find out from which address this machine will reach the scheduler."""
    if settings.client_cidr:
        try:
            found = IPv4Network(settings.client_cidr)
        except ValueError as exc:
            raise ConfigError(f"client_cidr = {settings.client_cidr!r}: {exc}") from exc
        if found.prefixlen < WORLD_BITS:
            raise ConfigError(f"client_cidr = {settings.client_cidr} is most of the world")
        return str(found)
    if settings.use_private_ip:
        return str(IPv4Network(_source_address(subnet)))
    try:
        with urllib.request.urlopen(_OWN_ADDRESS_URL, timeout=10) as answer:
            return str(IPv4Network(answer.read().decode().strip()))
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"cannot find out the public address of this machine ({exc}); set client_cidr"
        ) from exc


def _source_address(subnet: Subnet) -> str:
    """Ask the routing table; a UDP socket that is only connected sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(subnet.addresses[4]), DASHBOARD_PORT))
        except OSError as exc:
            raise ConfigError(
                f"there is no route from this machine into {subnet.addresses} ({exc}); use a VPN, "
                "or a public subnet with use_private_ip = false"
            ) from exc
        return str(probe.getsockname()[0])


@contextmanager
def _start(request: Request, groups: list[str], account: Account, gate: Gate) -> Iterator[Machines]:
    """Start the scheduler's machine; ending what was started is the caller's."""
    try:
        machines = Machines(request, groups, account, gate, Security.temporary())
    except FruitsDaskError:
        raise
    except Exception as exc:
        raise _understood(exc) from exc
    try:
        yield machines
    finally:
        gate.close()
        machines.forget()


def _understood(exc: BaseException) -> ClusterError:
    """Find what is behind an error of the library."""
    cause: BaseException = exc
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ClusterError):
        return cause
    return ClusterError(f"cannot rent machines: {explain(cause)}")


def _wait_for_workers(
    client: Client, machines: Machines, n_machines: int, progress: Progress
) -> None:
    """Wait until all processes are there, or those that still can come."""
    request, account = machines.request, machines.account
    deadline = time.monotonic() + request.start_seconds
    next_look = time.monotonic() + _LOOK_SECONDS
    n_ended = n_before = 0
    while True:
        n_here = len(client.scheduler_info(n_workers=-1)["workers"])
        n_expected = max(n_machines - len(machines.refusals) - n_ended, 0)
        if n_here >= n_expected * request.n_processes:
            break
        if n_here != n_before:
            progress.say(f"{n_here} of {n_expected * request.n_processes} worker processes")
            n_before = n_here
        now = time.monotonic()
        if now > next_look:
            next_look = now + _LOOK_SECONDS
            n_ended = len(account.ended(request.cluster))
        if now > deadline:
            break
        time.sleep(_POLL_SECONDS)
    refusals = {str(_understood(exc)) for exc in machines.refusals}
    if not n_here:
        raise ClusterError("; ".join(refusals) or _no_worker(request))
    for message in refusals:
        logger.warning("%s; the run goes on with fewer machines", message)
    if not refusals and n_here < n_machines * request.n_processes:
        logger.warning("only %d worker processes came; the run goes on with them", n_here)


def _no_worker(request: Request) -> str:
    return (
        f"no worker reached the scheduler within {request.start_seconds:.0f} s, or their machines "
        "ended. Look at: the security group (does it admit its own members?), the pull of "
        f"{request.docker_image}, and `aws ec2 get-console-output --latest --region "
        f"{request.region} --instance-id ...`"
    )


@contextmanager
def _kept_alive(client: Client, seconds: float) -> Iterator[None]:
    """Let the scheduler not think it is idle while this process lists or writes.

    When this process ends, the calls end with it, and the machines after their idle time.
    """
    ended = threading.Event()

    def call() -> None:
        while not ended.wait(seconds):
            with suppress(Exception):  # the run itself meets it
                client.submit(os.getpid, pure=False).result(timeout=seconds)

    thread = threading.Thread(target=call, name="keep-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def tunnel(machines: Machines) -> str:
    """Say how to see the dashboard, which is on no public port."""
    scheduler = machines.scheduler
    target = scheduler.instance["InstanceId"]
    if machines.request.key_name:
        host = scheduler.instance.get("PublicIpAddress") or scheduler.instance["PrivateIpAddress"]
        command = f"ssh -N -L {DASHBOARD_PORT}:127.0.0.1:{DASHBOARD_PORT} ubuntu@{host}"
    else:
        command = (
            f"aws ssm start-session --region {machines.request.region} --target {target} "
            "--document-name AWS-StartPortForwardingSession --parameters "
            f"portNumber={DASHBOARD_PORT},localPortNumber={DASHBOARD_PORT}"
        )
    return f"for the Dask dashboard: `{command}`, then http://127.0.0.1:{DASHBOARD_PORT}"
