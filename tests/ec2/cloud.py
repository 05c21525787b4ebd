"""EC2 on one machine: moto answers, and what an instance would run, runs here as a process.

Every address is on the loopback network: instances get theirs from 127.77.0.0/16, and an answer
that names any other is refused before anybody sees it. Processes are started with a guard that
ends them when they connect anywhere else.
"""

from __future__ import annotations

import base64
import gzip
import io
import ipaddress
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
import yaml
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from werkzeug.serving import make_server

from servers import ACCESS_KEY, REGION, SECRET_KEY, Answer, Quiet, RecordingMoto

VPC_CIDR = "127.77.0.0/16"
SUBNET_CIDR = "127.77.1.0/24"
IMAGE = "registry.example/fruits-dask:0.1.0"
LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
GUARD = Path(__file__).parent / "guard"
POLL_SECONDS = 0.05

_ADDRESS = re.compile(rb"<(?:privateIpAddress|ipAddress|publicIp)>([^<]+)<")
_SCHEDULER = "distributed.cli.dask_scheduler"


def refusal(code: str, *, status: str = "400 Bad Request", message: str = "in a test") -> Answer:
    """Answer as EC2 does when it refuses."""
    body = (
        f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
        "<RequestID>0</RequestID></Response>"
    )
    return Answer(status=status, body=body.encode(), headers={"Content-Type": "text/xml"})


@dataclass(slots=True)
class Guest:
    """What runs in place of an instance."""

    id: str
    """Of the instance."""
    address: str
    """On the loopback network."""
    user_data: bytes
    """As the instance got it."""
    command: list[str]
    """What its container runs."""
    environment: dict[str, str]
    """Of the container."""
    process: subprocess.Popen[bytes] | None = None
    """None where a test lets the image never start."""
    log: Path | None = None
    """What it said."""

    @property
    def is_scheduler(self) -> bool:
        """Tell what it is."""
        return _SCHEDULER in self.command


@dataclass(slots=True)
class Wishes:
    """How the machines misbehave; each is asked with what runs there."""

    never_starts: Callable[[Guest], bool] = lambda guest: False
    ends_at_once: Callable[[Guest], bool] = lambda guest: False


class Metadata:
    """The metadata service of all instances, version 2; each has a path of its own."""

    def __init__(self) -> None:
        self.announced: set[str] = set()
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=Quiet
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def url_of(self, address: str) -> str:
        """Where the instance of this address asks, in place of 169.254.169.254."""
        return f"http://127.0.0.1:{self._server.server_port}/{address}"

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        _, address, path = environ["PATH_INFO"].split("/", 2)
        status, body = "404 Not Found", b""
        if (environ["REQUEST_METHOD"], path) == ("PUT", "latest/api/token"):
            status, body = "200 OK", f"token-{address}".encode()
        elif environ.get("HTTP_X_AWS_EC2_METADATA_TOKEN") != f"token-{address}":
            status = "401 Unauthorized"
        elif path == "latest/meta-data/spot/instance-action" and address in self.announced:
            status, body = "200 OK", b'{"action": "terminate", "time": "2026-11-21T12:00:00Z"}'
        start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]


class Cloud(RecordingMoto):
    """Moto with EC2, and the processes of its instances."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.guests: dict[str, Guest] = {}
        self.actions: list[tuple[str, dict[str, str]]] = []
        self.refuse: Callable[[str, dict[str, str]], Answer | None] = lambda action, query: None
        self.wishes = Wishes()
        self.metadata = Metadata()
        self._ended = threading.Event()
        self._host = threading.Thread(target=self._run_guests, name="guests", daemon=True)

    # ------------------------------------------------------------ life

    def __enter__(self) -> Cloud:
        self.start()
        for service in ("ec2", "iam", "cloudformation", "ecr", "ssm"):
            get_backend(service)[DEFAULT_ACCOUNT_ID].reset()
        self._furnish()
        self.metadata.start()
        self._host.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._host.join()
        for guest in self.guests.values():
            _kill(guest)
        self.metadata.stop()
        self.stop()

    def client(self, service: str = "ec2", region: str = REGION) -> Any:
        """Reach it through boto3."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint_url,
            region_name=region,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )

    def _furnish(self) -> None:
        ec2, iam, ssm = self.client(), self.client("iam"), self.client("ssm")
        self.vpc = ec2.create_vpc(CidrBlock=VPC_CIDR)["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=self.vpc, CidrBlock=SUBNET_CIDR)
        self.subnet = subnet["Subnet"]["SubnetId"]
        self.ami = ec2.describe_images()["Images"][0]["ImageId"]
        ssm.put_parameter(Name="/fruits/ami", Value=self.ami, Type="String", Overwrite=True)
        iam.create_instance_profile(InstanceProfileName="fruits-worker")

    # ------------------------------------------------------------ what a test asks

    @property
    def alive(self) -> list[str]:
        """Identifiers of instances that have not ended."""
        instances = ec2_backends[DEFAULT_ACCOUNT_ID][REGION].all_instances()
        return [i.id for i in instances if i._state.name not in ("terminated", "shutting-down")]

    @property
    def made_groups(self) -> list[str]:
        """Identifiers of the security groups that a cluster made."""
        tagged = [{"Name": "tag-key", "Values": ["fruits-dask:cluster"]}]
        groups = self.client().describe_security_groups(Filters=tagged)["SecurityGroups"]
        return [group["GroupId"] for group in groups]

    @property
    def processes(self) -> list[int]:
        """Ids of the processes of all guests that still run."""
        guests = [g.process for g in self.guests.values() if g.process is not None]
        return [p.pid for p in guests if p.poll() is None]

    def count_actions(self) -> Counter[str]:
        """Count what was asked of EC2 and its like."""
        return Counter(action for action, _ in self.actions)

    # ------------------------------------------------------------ requests

    def _recorded(self, application: Any) -> Callable[..., Iterable[bytes]]:
        inner = super()._recorded(application)

        def handle(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            query = _form(environ)
            action = query.get("Action") or environ.get("HTTP_X_AMZ_TARGET", "")
            if not action:
                return inner(environ, start_response)
            self.actions.append((action, query))
            if (answer := self.refuse(action, query)) is not None:
                start_response(answer.status, [*answer.headers.items()])
                return [answer.body]
            body = b"".join(inner(environ, start_response))
            for address in _ADDRESS.findall(body):
                if ipaddress.ip_address(address.decode()) not in LOOPBACK:
                    raise RuntimeError(f"{action} would hand out {address.decode()}")
            return [body]

        return handle

    # ------------------------------------------------------------ machines

    def _run_guests(self) -> None:
        backend = ec2_backends[DEFAULT_ACCOUNT_ID][REGION]
        while not self._ended.wait(POLL_SECONDS):
            for instance in backend.all_instances():
                state = instance._state.name
                guest = self.guests.get(instance.id)
                if guest is None and state == "running":
                    self.guests[instance.id] = self._boot(instance)
                elif guest is not None and state != "running":
                    _kill(guest)
                elif guest is not None and _has_ended(guest):
                    assert b"shutdown -h now" in guest.user_data
                    instance.terminate()

    def _boot(self, instance: Any) -> Guest:
        assert ipaddress.ip_address(instance.private_ip) in ipaddress.ip_network(VPC_CIDR)
        sent = base64.b64decode(instance.user_data.as_bytes())
        assert len(sent) <= 16_384
        user_data = gzip.decompress(sent)
        commands = yaml.safe_load(user_data)["runcmd"]
        [line] = [c for c in commands if c.startswith("docker run ")]
        environment, command = parse_docker(line)
        guest = Guest(
            id=instance.id,
            address=instance.private_ip,
            user_data=user_data,
            command=command,
            environment=environment,
        )
        if self.wishes.never_starts(guest):
            return guest
        if self.wishes.ends_at_once(guest):
            command = ["false"]
        guest.log = self.folder / f"{instance.id}.log"
        with guest.log.open("wb") as log:
            guest.process = subprocess.Popen(
                [*command, "--host", guest.address] if command != ["false"] else command,
                env=guest_environment(environment)
                | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata.url_of(guest.address)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return guest


def parse_docker(line: str) -> tuple[dict[str, str], list[str]]:
    """Take a `docker run` line apart: environment, and command with this Python."""
    words = shlex.split(line)
    start = words.index("env")  # after the image
    environment: dict[str, str] = {}
    for flag, value in itertools.pairwise(words[: start - 1]):
        if flag == "-e":
            environment |= dict([value.split("=", 1)])
    environment |= dict([words[start + 1].split("=", 1)])
    assert words[start + 2] == "python"
    return environment, [sys.executable, *words[start + 3 :]]


def guest_environment(environment: dict[str, str]) -> dict[str, str]:
    """Give a process what an instance has, and nothing of this shell."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # What the instance profile would give.
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "PYTHONPATH": str(GUARD),
        **environment,
    }


def _form(environ: dict[str, Any]) -> dict[str, str]:
    if environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        return {name: values[0] for name, values in parse_qs(body.decode()).items()}
    return {}


def _has_ended(guest: Guest) -> bool:
    return guest.process is not None and guest.process.poll() is not None


def _kill(guest: Guest) -> None:
    if guest.process is not None and guest.process.poll() is None:
        os.killpg(guest.process.pid, signal.SIGKILL)
        guest.process.wait()
