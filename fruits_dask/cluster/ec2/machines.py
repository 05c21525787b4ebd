"""dask-cloudprovider's EC2Cluster, with what it leaves open closed.

What its request hard-codes (volumes in the clear, the old metadata service, tags that come later)
is put right in the request itself, through an event of botocore. Every wait has an end. A name
given to a worker is the name that Dask knows it by, so scaling down ends the machine that was
meant.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import dask.config
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ClientError
from dask_cloudprovider.aws import EC2Cluster
from dask_cloudprovider.aws.ec2 import EC2Scheduler, EC2Worker
from distributed.core import Status
from distributed.deploy.adaptive import Adaptive
from distributed.scheduler import WorkerState
from distributed.security import Security

from ...errors import ClusterError
from ..workers import WORKER_SETTINGS
from .account import SCHEDULER_PORT, Account, aws_tags

logger = logging.getLogger(__name__)

USER_DATA_BYTES = 16_384
"""What EC2 takes; moto takes more."""

DASHBOARD_PORT = 8787
_KNOCK_SECONDS = 3.0
_LOOK_SECONDS = 5.0
_ADDRESS_SECONDS = 1.0
_FLIGHT_SECONDS = 30.0
_FORGET_SECONDS = 10.0
_YOUNG_SECONDS = 300.0
# Of scaling by the work: look so often, give back after so many looks, rent for so much work.
_ADAPT_INTERVAL = "10s"
_ADAPT_COUNT = 12
_ADAPT_TARGET = "5 minutes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is rented; all of it is known before the first machine."""

    cluster: str
    """Name, and value of the tag."""
    region: str
    """Where."""
    profile: str | None
    """Of the AWS configuration files."""
    availability_zone: str | None
    """Or any."""
    vpc: str
    """Network."""
    subnet_id: str
    """Subnet of it."""
    ami: str
    """Machine image."""
    scheduler_instance_type: str
    """Of one machine."""
    worker_instance_type: str
    """Of the others."""
    is_gpu: bool
    """The workers' machines have graphics processors."""
    docker_image: str
    """Holds this package."""
    iam_instance_profile: str | None
    """Name or ARN."""
    use_private_ip: bool
    """No public addresses."""
    spot: bool
    """Spare capacity, for the workers alone."""
    key_name: str | None
    """SSH key."""
    filesystem_size: int
    """GB."""
    tags: dict[str, str]
    """Of everything, `CLUSTER_TAG` among them."""
    n_processes: int
    """Worker processes a machine."""
    n_threads: int
    """Threads of the engine in each of them."""
    environment: dict[str, str]
    """Of scheduler and workers; no secret."""
    start_seconds: float
    """How long the start may take."""
    idle_seconds: float
    """Without work for this long, the machines end."""
    max_hours: float
    """After this time they end in any case."""


class Gate:
    """Counts the requests for machines, and lets no more through once it is closed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_under_way = 0
        self._is_closed = False
        self._started: dict[str, float] = {}

    def enter(self) -> None:
        """Begin a request.

        Raises
        ------
        ClusterError
            If the gate is closed.
        """
        with self._changed:
            if self._is_closed:
                raise ClusterError("the cluster is being given back")
            self._n_under_way += 1

    def leave(self, answer: dict[str, Any] | None = None) -> None:
        """End a request, and note which machines it started."""
        with self._changed:
            for machine in (answer or {}).get("Instances", []):
                self._started[machine["InstanceId"]] = time.monotonic()
            self._n_under_way -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in, and wait for those under way."""
        with self._changed:
            self._is_closed = True
            if not self._changed.wait_for(lambda: self._n_under_way == 0, _FLIGHT_SECONDS):
                logger.warning(
                    "a request for a machine was not answered; looking for it by its tag"
                )

    @property
    def young(self) -> set[str]:
        """Machines that AWS may not list yet."""
        now = time.monotonic()
        return {m for m, started in self._started.items() if now - started < _YOUNG_SECONDS}

    @property
    def is_closed(self) -> bool:
        """Tell whether the cluster is being given back."""
        return self._is_closed


class _Machine:
    """What the machines of scheduler and workers share."""

    cluster: Machines
    instance: dict[str, Any] | None
    instance_tags: dict[str, str]
    use_private_ip: bool

    def call(self, name: str) -> None:
        """Give the machine a name, which is a tag of its request, and the configuration of Dask.

        The library would send all that the user has configured, which may hold secrets.
        """
        self.set_env = f'env DASK_INTERNAL_INHERIT_CONFIG="{self.cluster.inherited}"'
        self.name = f"fruits-dask-{self.cluster.request.cluster}-{name}"
        self.instance_tags = {**self.instance_tags, "Name": self.name}

    async def create_vm(self) -> tuple[str, str | None]:
        """Start a machine, and return its addresses within the cluster and from outside."""
        # Ctrl-C cancels what is awaited; a request that AWS has got must come to its answer.
        started = asyncio.ensure_future(super().create_vm())  # type: ignore[misc]
        started.add_done_callback(_look_at)
        found: tuple[str, str | None] = await asyncio.shield(started)
        return found

    async def configure_vm(self, client: Any) -> tuple[str, str | None]:  # noqa: ANN401
        """Wait for the addresses.

        The library adds tags here, and tries for five minutes where it may not; they are in the
        request. It knows one address alone, but the firewall knows members of the cluster by the
        private ones.
        """
        deadline = time.monotonic() + self.cluster.request.start_seconds
        wanted = ["PrivateIpAddress", *(["PublicIpAddress"] * (not self.use_private_ip))]
        while True:
            machine = self.instance or {}
            if all(machine.get(name) for name in wanted):
                outside = None if self.use_private_ip else str(machine["PublicIpAddress"])
                return str(machine["PrivateIpAddress"]), outside
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{machine['InstanceId']} got no {wanted[-1]} within "
                    f"{self.cluster.request.start_seconds:.0f} s; look at the addresses that are "
                    f"left in the subnet {self.cluster.request.subnet_id}"
                )
            await asyncio.sleep(_ADDRESS_SECONDS)
            answer = await client.describe_instances(
                Filters=[{"Name": "instance-id", "Values": [machine["InstanceId"]]}]
            )
            for reservation in answer["Reservations"]:  # none as long as AWS does not list it yet
                [self.instance] = reservation["Instances"]

    async def destroy_vm(self) -> None:
        """End the machine, if there is one; what is refused here is found by its tag later."""
        if self.instance is not None:
            with contextlib.suppress(BotoCoreError, ClientError):
                await super().destroy_vm()  # type: ignore[misc]


class SchedulerMachine(_Machine, EC2Scheduler):  # type: ignore[misc]
    """The machine of the scheduler."""

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - options of the library
        super().__init__(**kwargs)
        request = self.cluster.request
        self.call("scheduler")
        self.command = " ".join(
            [
                *(self.set_env, "python -m distributed.cli.dask_scheduler"),
                *("--protocol tls --port", str(SCHEDULER_PORT)),
                # On the loopback interface: it is plain HTTP, and reached through a tunnel.
                *("--dashboard-address", f"127.0.0.1:{DASHBOARD_PORT}"),
                *("--idle-timeout", f"{request.idle_seconds:.0f}s"),
            ]
        )
        self.gpu_instance = False

    async def wait_for_scheduler(self) -> None:
        """Wait until the scheduler listens, or its machine has ended, or it takes too long."""
        address = getattr(self, "external_address", None) or self.address
        host, port = address.split("://")[1].split(":")
        request, account = self.cluster.request, self.cluster.account
        machine = str((self.instance or {})["InstanceId"])
        deadline = time.monotonic() + request.start_seconds
        next_look = time.monotonic() + _LOOK_SECONDS
        while not await _listens(host, int(port)):
            now = time.monotonic()
            if self.cluster.gate.is_closed:
                raise ClusterError("the cluster is being given back")
            if now > next_look:
                next_look = now + _LOOK_SECONDS
                if machine in await asyncio.to_thread(account.ended, request.cluster):
                    raise ClusterError(_ended(machine, request))
            if now > deadline:
                raise ClusterError(_mute(machine, host, request))
            await asyncio.sleep(0.2)


class WorkerMachine(_Machine, EC2Worker):  # type: ignore[misc]
    """A machine with worker processes.

    Parameters
    ----------
    scheduler : str
        Address of the scheduler.
    name : str
        By which the cluster knows this machine, and Dask its processes.
    **kwargs
        Options of the library.
    """

    def __init__(self, scheduler: str, *, name: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(scheduler, **kwargs)
        request = self.cluster.request
        self.call(name)
        self.command = " ".join(
            [
                *(self.set_env, "python -m distributed.cli.dask_worker", scheduler),
                *("--name", name, "--nworkers", str(request.n_processes)),
                # One task computes while another reads, decodes and stores.
                "--nthreads 2 --local-directory /tmp",
                # A share of the machine; two threads a core would each be counted as a core.
                *("--memory-limit", f"{1 / request.n_processes:.4f}"),
                # Its pages are on a port of all interfaces otherwise, even without a dashboard.
                "--no-dashboard --dashboard-address 127.0.0.1:0",
                *("--death-timeout", f"{request.idle_seconds:.0f}s"),
            ]
        )
        self.gpu_instance = request.is_gpu

    async def start(self) -> None:
        """Start the machine; one that AWS refuses is noted, and the others go on."""
        try:
            await super().start()
        except Exception as exc:  # noqa: BLE001 - the library raises what it met, of any class
            self.cluster.refusals.append(exc)
            self.status = Status.running  # as far as the library is concerned


class _ByMachine(Adaptive):  # type: ignore[misc]
    """Counts worker processes, as Dask does, and changes whole machines."""

    @property
    def _n_processes(self) -> int:
        return int(self.cluster.request.n_processes)

    async def safe_target(self) -> int:
        """Round up to whole machines."""
        target: int = await super().safe_target()
        return math.ceil(target / self._n_processes) * self._n_processes

    async def scale_up(self, n: int) -> None:
        """Rent, up to `n` processes."""
        self.cluster.scale(n // self._n_processes)

    async def recommendations(self, target: int) -> dict[str, Any]:
        """Give back no more machines than `target` leaves over, whichever processes were chosen."""
        found: dict[str, Any] = await super().recommendations(target)
        if found["status"] == "down" and self._n_processes > 1:
            chosen = sorted({name.rpartition("-")[0] for name in found["workers"]})
            n_left_over = (len(self.plan) - target) // self._n_processes
            machines = set(chosen[:n_left_over])
            found["workers"] = [n for n in self.plan if n.rpartition("-")[0] in machines]
        return found


class Machines(EC2Cluster):  # type: ignore[misc]
    """A scheduler on a machine of its own, and machines with workers.

    Parameters
    ----------
    request : Request
        What is rented.
    groups : list of str
        Its firewalls.
    account : Account
        Whose machines.
    gate : Gate
        Through which every request for a machine goes.
    security : distributed.Security
        Certificates of the cluster.
    """

    def __init__(
        self,
        request: Request,
        groups: list[str],
        account: Account,
        gate: Gate,
        security: Security,
    ) -> None:
        self.request = request
        self.account = account
        self.gate = gate
        self.refusals: list[Exception] = []
        self.inherited = inherited_config(security, request.start_seconds)
        profile = request.iam_instance_profile
        super().__init__(
            region=request.region,
            availability_zone=request.availability_zone,
            bootstrap=False,  # it is for an older Ubuntu
            auto_shutdown=True,
            ami=request.ami,
            scheduler_instance_type=request.scheduler_instance_type,
            worker_instance_type=request.worker_instance_type,
            vpc=request.vpc,
            subnet_id=request.subnet_id,
            security_groups=groups,
            filesystem_size=request.filesystem_size,
            key_name=request.key_name,
            iam_instance_profile=_instance_profile(profile) if profile else None,
            docker_image=request.docker_image,
            docker_args="--init",
            extra_bootstrap=prepare_commands(request),
            env_vars=request.environment,
            instance_tags=request.tags,
            volume_tags=request.tags,
            use_private_ip=request.use_private_ip,
            spot=request.spot,
            n_workers=0,  # they come when the scheduler is there
            security=security,
            name=request.cluster,
        )

    async def _start(self) -> None:
        # The library has just set these, and starts with what is here.
        self.scheduler_class, self.worker_class = SchedulerMachine, WorkerMachine
        self.boto_session = self._own_session()
        self.quiet = True  # it prints to standard output
        await super()._start()

    def follow_the_work(self, fewest: int, most: int) -> None:
        """Rent and give back machines within bounds, as there is work.

        A machine takes minutes to come, so only what will last for some is worth one.
        """
        n = self.request.n_processes
        self.adapt(
            minimum=fewest * n,
            maximum=most * n,
            interval=_ADAPT_INTERVAL,
            wait_count=_ADAPT_COUNT,
            target_duration=_ADAPT_TARGET,
            worker_key=_host,  # a machine goes with all of its processes
            Adaptive=_ByMachine,
        )

    def forget(self) -> None:
        """Let go of what is here; the machines are ended by their tag, all in one way."""
        self.shutdown_scheduler = False
        self.workers.clear()
        self.worker_spec.clear()
        self._created.clear()
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            self.close(timeout=_FORGET_SECONDS)

    def _own_session(self) -> AioSession:
        session = AioSession(profile=self.request.profile)
        session.register("provide-client-params.ec2.RunInstances", self._complete)
        session.register("before-call.ec2.RunInstances", self._asked)
        session.register("after-call.ec2.RunInstances", self._answered)
        session.register("after-call-error.ec2.RunInstances", self._failed)
        return session

    def _complete(self, params: dict[str, Any], **_: object) -> None:
        """Put right what the library hard-codes, in the request itself."""
        for mapping in params["BlockDeviceMappings"]:
            mapping["Ebs"]["Encrypted"] = True
        params["MetadataOptions"] = {
            "HttpTokens": "required",  # version 2 only
            "HttpEndpoint": "enabled",
            "HttpPutResponseHopLimit": 1,  # the container shares the network of its machine
        }
        # Later tags would be too late for a client that is killed in between.
        kinds = ["network-interface"]
        kinds += ["spot-instances-request"] * ("InstanceMarketOptions" in params)
        for kind in kinds:
            tags = aws_tags(self.request.tags)
            params["TagSpecifications"].append({"ResourceType": kind, "Tags": tags})
        params["UserData"] = compressed(str(params["UserData"]))

    def _asked(self, **_: object) -> None:
        self.gate.enter()

    def _answered(self, parsed: dict[str, Any], **_: object) -> None:
        self.gate.leave(parsed)

    def _failed(self, **_: object) -> None:
        self.gate.leave()

    def _new_worker_name(self, worker_number: int) -> str:
        return f"worker-{worker_number}"

    def new_worker_spec(self) -> dict[str, dict[str, Any]]:
        """Name the next machine, and the processes that it will have."""
        spec: dict[str, dict[str, Any]] = super().new_worker_spec()
        if self.request.n_processes > 1:
            suffixes = [f"-{i}" for i in range(self.request.n_processes)]
            spec = {name: {**machine, "group": suffixes} for name, machine in spec.items()}
        return spec


def inherited_config(security: Security, no_worker_seconds: float) -> str:
    """Serialize what scheduler and workers need of Dask's configuration, and nothing else."""
    tls = "distributed.comm.tls"
    config: dict[str, Any] = {}
    dask.config.set(
        {
            **WORKER_SETTINGS,
            # Where all machines were taken back, nothing should wait for ever.
            "distributed.scheduler.no-workers-timeout": f"{no_worker_seconds:.0f}s",
            "distributed.comm.default-scheme": "tls",
            "distributed.comm.require-encryption": True,
            f"{tls}.ca-file": security.tls_ca_file,
            f"{tls}.scheduler.key": security.tls_scheduler_key,
            f"{tls}.scheduler.cert": security.tls_scheduler_cert,
            f"{tls}.worker.key": security.tls_worker_key,
            f"{tls}.worker.cert": security.tls_worker_cert,
        },
        config=config,
    )
    return str(dask.config.serialize(config))


def prepare_commands(request: Request) -> list[str]:
    """List what a machine does before its container starts, as lines of cloud-init's runcmd."""
    minutes = max(1, math.floor(request.max_hours * 60))
    commands = [
        f"shutdown -h +{minutes}",
        "command -v docker || { apt-get update -y && apt-get install -y docker.io; }",
    ]
    host = request.docker_image.partition("/")[0]
    if host.endswith(".amazonaws.com"):  # a registry of the account: the profile opens it
        helper = "amazon-ecr-credential-helper"
        helpers = f'{{"credHelpers":{{"{host}":"ecr-login"}}}}'
        commands += [
            f"command -v docker-credential-ecr-login || apt-get install -y {helper}",
            "mkdir -p /root/.docker",
            f"echo '{helpers}' > /root/.docker/config.json",
        ]
    return commands


def compressed(user_data: str) -> bytes:
    """Compress what a machine is told at its start; cloud-init reads gzip.

    Raises
    ------
    ClusterError
        If it is larger than EC2 takes.
    """
    data = gzip.compress(user_data.encode(), mtime=0)
    if len(data) > USER_DATA_BYTES:
        raise ClusterError(
            f"the user data takes {len(data):,} bytes, and EC2 takes {USER_DATA_BYTES:,}; shorten "
            "the docker_image and what AWS_ENDPOINT_URL is"
        )
    return data


def _instance_profile(name: str) -> dict[str, str]:
    return {"Arn" if name.startswith("arn:") else "Name": name}


def _host(worker: WorkerState) -> str:
    return str(worker.host)


def _look_at(task: asyncio.Future[Any]) -> None:
    """Take notice of an error that nobody waits for any longer."""
    if not task.cancelled():
        task.exception()


async def _listens(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_KNOCK_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _console(machine: str, request: Request) -> str:
    return f"aws ec2 get-console-output --latest --region {request.region} --instance-id {machine}"


def _ended(machine: str, request: Request) -> str:
    return (
        f"the machine of the scheduler ({machine}) ended during its start. Most often "
        f"{request.docker_image} cannot be pulled (its name, the route to its registry, the "
        f"instance profile), or spare capacity was taken back. `{_console(machine, request)}` "
        "shows what it said"
    )


def _mute(machine: str, host: str, request: Request) -> str:
    return (
        f"no scheduler answers at {host}:{SCHEDULER_PORT} within {request.start_seconds:.0f} s. "
        f"Look at: the security group (does it admit this machine to port {SCHEDULER_PORT}?), the "
        f"route between here and the subnet {request.subnet_id} (a VPN, or use_private_ip = false "
        f"in a public subnet), the pull of {request.docker_image} (start_timeout gives it longer), "
        f"and what the machine says: `{_console(machine, request)}`"
    )
