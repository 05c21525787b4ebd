"""An EC2 account on this machine, and a bucket of real photos in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ec2.cloud import GUARD, IMAGE, REGION, Cloud
from servers import ACCESS_KEY, SECRET_KEY

N_PHOTOS = 60

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(tmp_path) as running:
        yield running
        assert running.alive == [], "instances are left"


@pytest.fixture
def bucket(cloud: Cloud, shared: Path) -> str:
    """Put real photos of several fruits into a bucket, and return its name."""
    s3 = cloud.client("s3")
    name = f"fruits-{os.urandom(4).hex()}"
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    put_photos(cloud, name, "photos", shared)
    return name


def put_photos(cloud: Cloud, bucket: str, prefix: str, shared: Path) -> None:
    """Put real photos of several fruits into a bucket."""
    s3 = cloud.client("s3")
    folder = shared / "data" / "fruits360"
    files = sorted(folder.rglob("*.jpg"))
    for path in files[:: len(files) // N_PHOTOS][:N_PHOTOS]:
        key = f"{prefix}/{path.relative_to(folder).as_posix()}"
        s3.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


@pytest.fixture
def config(cloud: Cloud, tmp_path: Path) -> Path:
    """Write the settings of a rented cluster that the cloud can fulfil."""
    path = tmp_path / "fruits.toml"
    path.write_text(
        f"""
        weights = "fruits"
        components = 20
        [cluster]
        kind = "ec2"
        n_workers = 2
        subnet_id = "{cloud.subnet}"
        ami = "/fruits/ami"
        instance_type = "c7i.large"
        docker_image = "{IMAGE}"
        iam_instance_profile = "fruits-worker"
        processes_per_worker = 1
        start_timeout = "1 minute"
        """
    )
    return path


@pytest.fixture
def environment(cloud: Cloud, tmp_path: Path) -> dict[str, str]:
    """Environment of a user's shell, whose processes may connect to loopback addresses only."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "AWS_ENDPOINT_URL": cloud.endpoint_url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": str(GUARD),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }


@pytest.fixture
def start(
    environment: dict[str, str], config: Path, tmp_path: Path
) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line, unmodified."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fruits_dask", *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def command(start: Callable[..., subprocess.Popen[str]]) -> Command:
    """Run the command line to its end."""

    def command(*arguments: str, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        with start(*arguments) as process:
            stdout, stderr = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    return command
