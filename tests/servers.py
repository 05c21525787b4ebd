"""S3 on the loopback interface for tests: moto with a record of all requests, and s3rver."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
from botocore.config import Config
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server

from fruits_dask.records import StoreOptions

REGION = "eu-west-3"
# s3rver knows this pair only; moto takes any.
ACCESS_KEY = SECRET_KEY = "S3RVER"  # noqa: S105
S3RVER = Path(__file__).parent / "s3rver" / "node_modules" / ".bin" / "s3rver"
MISSING_S3RVER = "" if S3RVER.exists() else "needs `npm ci --prefix tests/s3rver`"

_bucket_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it reached the server."""

    method: str
    """GET, HEAD, PUT, POST or DELETE."""
    path: str
    """Decoded path, ``/bucket/key``."""
    query: Mapping[str, str]
    """Decoded parameters, the first value of each."""
    headers: Mapping[str, str]
    """Headers by lower-case name."""

    @property
    def is_list(self) -> bool:
        """Tell whether this lists keys."""
        return self.method == "GET" and "list-type" in self.query


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server says instead of doing what it was asked."""

    status: str
    """Such as ``403 Forbidden``."""
    body: bytes = b""
    """XML, or whatever is to be sent."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """More headers; a ``Content-Length`` may lie."""


class RecordingMoto(ThreadedMotoServer):
    """Moto on 127.0.0.1, any free port, that keeps every request and can be told to misbehave."""

    def __init__(self) -> None:
        super().__init__(ip_address="127.0.0.1", port=0, verbose=False)
        self.requests: list[Request] = []
        self.interfere: Callable[[Request], Answer | None] = lambda request: None

    @property
    def endpoint_url(self) -> str:
        """Address of the server."""
        host, port = self.get_host_and_port()
        return f"http://{host}:{port}"

    def forget(self) -> None:
        """Begin a new record, and behave."""
        self.requests.clear()
        self.interfere = lambda request: None

    def count(self) -> Counter[str]:
        """Count the requests so far by kind: LIST, or the method."""
        return Counter("LIST" if r.is_list else r.method for r in self.requests)

    def count_paths(self) -> Counter[tuple[str, str]]:
        """Count the requests so far by method and path."""
        return Counter((request.method, request.path) for request in self.requests)

    def _server_entry(self) -> None:
        application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._recorded(application), threaded=True, request_handler=Quiet
        )
        self._server_ready_event.set()
        self._server.serve_forever()

    def _recorded(self, application: Any) -> Callable[..., Iterable[bytes]]:
        def handle(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            request = _read(environ)
            self.requests.append(request)
            answer = self.interfere(request)
            if answer is None:
                return application(environ, start_response)
            start_response(answer.status, [*answer.headers.items()])
            return [] if request.method == "HEAD" else [answer.body]

        return handle


class S3rver:
    """The npm package s3rver, an S3 server that shares no code with moto.

    Parameters
    ----------
    folder : Path
        Where it keeps its buckets.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [S3RVER, "-d", folder, "-a", "127.0.0.1", "-p", "0", "-s"]
        # Its continuation tokens use a cipher that OpenSSL 3 calls legacy.
        env = {**os.environ, "NODE_OPTIONS": "--openssl-legacy-provider"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        self.endpoint_url = self._wait()

    def put_empty(self, bucket: str, name: str) -> None:
        """Store an empty object without a request."""
        (self._folder / bucket / f"{name}._S3rver_object").touch()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _wait(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "listening on" in line:
                return f"http://{line.split()[-1]}"
        self.stop()
        raise RuntimeError("s3rver did not start")


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Service:
    """One running S3 service."""

    name: str
    """``moto`` or ``s3rver``."""
    endpoint_url: str
    """Where it listens."""

    @property
    def options(self) -> StoreOptions:
        """How the package reaches it."""
        return StoreOptions(endpoint_url=self.endpoint_url)

    def client(self, region: str = REGION) -> Any:
        """Reach it without the package, through boto3."""
        return _client(self.endpoint_url, region)

    def new_bucket(self, region: str = REGION) -> str:
        """Make an empty bucket and return its name."""
        name = f"fruits-{next(_bucket_numbers)}"
        place = {"LocationConstraint": region}
        self.client(region).create_bucket(Bucket=name, CreateBucketConfiguration=place)
        return name


@functools.cache
def _client(endpoint_url: str, region: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=region,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
    )


class Quiet(MotoRequestHandler):
    """Says nothing on stderr."""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 - its base names it
        """Drop a line of the log."""


def _read(environ: Mapping[str, Any]) -> Request:
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    return Request(
        method=environ["REQUEST_METHOD"],
        path=environ["PATH_INFO"].encode("latin-1").decode(),
        query={name: values[0] for name, values in query.items()},
        headers=headers,
    )
