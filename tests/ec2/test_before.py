"""Before a cent is spent: what does not fit is said, and nothing is rented."""

from __future__ import annotations

from pathlib import Path

import pytest

from ec2.cloud import IMAGE, Cloud
from ec2.conftest import Command
from fruits_dask.cluster.versions import environment_tag

pytestmark = [pytest.mark.slow, pytest.mark.ec2]

PRICES = '[cluster.hourly_prices]\n"c7i.large" = 0.1\n'
WRONG = [
    (
        'instance_type = "c7i.large"',
        'instance_type = "c99.huge"',
        "has no instance type 'c99.huge'",
    ),
    ('instance_type = "c7i.large"', 'instance_type = "c7g.large"', "is no x86_64 machine"),
    ('instance_type = "c7i.large"', 'instance_type = "t3.micro"', "too little for 1 worker"),
    (IMAGE, "registry.example/fruits-dask", "is not pinned"),
    (IMAGE, "registry.example/fruits-dask:latest", "is not pinned"),
    (IMAGE, "registry.example/fruits-dask:0.1.0-0123456789ab", "has other versions"),
    (IMAGE, "registry.example/fruits'dask:1", "must not contain quotes"),
    ('ami = "/fruits/ami"', 'ami = "/fruits/none"', "no such SSM parameter"),
    ("processes_per_worker = 1", "max_cost = 1.0", "--max-cost needs the price of an hour"),
    ("processes_per_worker = 1", 'region = "us-east-1"', "outside the allowed regions"),
    ("processes_per_worker = 1", 'region = "eu-central-1"', "would leave its region"),
    ("processes_per_worker = 1", 'client_cidr = "0.0.0.0/0"', "is most of the world"),
    ("processes_per_worker = 1", 'client_cidr = "home"', "client_cidr"),
    ("processes_per_worker = 1", 'vpc = "vpc-1"', "is in vpc-"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_said_by_the_doctor_and_before_a_run(
    cloud: Cloud, bucket: str, config: Path, command: Command, wrong: tuple[str, str, str]
) -> None:
    old, new, message = wrong
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    place = ("--input", f"s3://{bucket}/photos", "--output", f"s3://{bucket}/rented")
    seen = command("doctor", "--config", str(config), *place)
    assert seen.returncode == 1
    assert message in seen.stdout, seen.stdout
    done = command("run", "--config", str(config), *place)
    assert done.returncode in (1, 2)
    assert message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert cloud.count_actions()["RunInstances"] == 0
    assert cloud.made_groups == []


@pytest.mark.parametrize("rule", ["world", "default"])
def test_firewalls_that_are_nobodys(
    cloud: Cloud, bucket: str, config: Path, command: Command, rule: str
) -> None:
    ec2 = cloud.client()
    mine = [{"Name": "vpc-id", "Values": [cloud.vpc]}]
    [default] = ec2.describe_security_groups(Filters=mine)["SecurityGroups"]
    group = default["GroupId"]
    if rule == "world":
        group = ec2.create_security_group(GroupName="g", Description="g", VpcId=cloud.vpc)[
            "GroupId"
        ]
        ec2.authorize_security_group_ingress(
            GroupId=group, IpProtocol="tcp", FromPort=8786, ToPort=8787, CidrIp="0.0.0.0/0"
        )
    config.write_text(config.read_text() + f'security_groups = ["{group}"]\n')
    done = command(
        *("run", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented"),
    )
    assert done.returncode == 2
    expected = "open to the world on ports 8786 to 8787" if rule == "world" else "is the default"
    assert expected in done.stderr
    assert cloud.count_actions()["RunInstances"] == 0


def test_no_keys(bucket: str, config: Path, command: Command, environment: dict[str, str]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del environment[name]
    done = command("cluster", "list")
    assert done.returncode == 2
    assert "sign in" in done.stderr


def test_the_doctor_finds_nothing_wrong(
    cloud: Cloud, bucket: str, config: Path, command: Command
) -> None:
    text = config.read_text().replace("0.1.0", environment_tag())
    config.write_text(text + PRICES)
    seen = command(
        *("doctor", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented"),
    )
    assert seen.returncode == 0, seen.stdout
    assert "2 x c7i.large with 1 processes each in eu-west-3" in seen.stdout
    assert "an hour at most: 0.30" in seen.stdout
    assert cloud.count_actions()["RunInstances"] == 0


def test_an_estimate_says_hours_and_money(
    cloud: Cloud, bucket: str, config: Path, command: Command
) -> None:
    config.write_text(config.read_text() + PRICES)
    done = command(
        *("plan", "--estimate", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented"),
    )
    assert done.returncode == 0, done.stderr
    pairs = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert pairs["tried"].startswith("60 photos, ")
    low, high = (float(word) for word in pairs["hours"].split(" to "))
    assert 0 < low < high
    cost = [float(word.rstrip(",")) for word in pairs["cost"].split()[:3:2]]
    assert cost == pytest.approx([0.3 * low, 0.3 * high], abs=0.01)
    assert cloud.count_actions()["RunInstances"] == 0
