"""The whole job on rented machines: the same result as on this one, and nothing left."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ec2.cloud import IMAGE, REGION, Cloud
from ec2.conftest import Command
from ec2.waiting import assert_nothing_left, wait_until
from fruits_dask.records import StoreOptions
from fruits_dask.storage import LocalStore, open_store
from jobs import assert_same_tables, tables

pytestmark = [pytest.mark.slow, pytest.mark.ec2]

Start = Callable[..., subprocess.Popen[str]]


def fetch(cloud: Cloud, bucket: str, prefix: str, target: Path) -> Path:
    """Copy a result from the bucket to a folder."""
    store = open_store(f"s3://{bucket}", StoreOptions(endpoint_url=cloud.endpoint_url))
    for item in store.list_folder(f"s3://{bucket}/{prefix}"):
        data = store.read(f"s3://{bucket}/{prefix}/{item.name}")
        LocalStore().write(str(target / item.name), data)
    return target


def test_the_whole_job(
    cloud: Cloud, bucket: str, config: Path, command: Command, tmp_path: Path
) -> None:
    photos = ("--input", f"s3://{bucket}/photos")
    rented = command("run", "--config", str(config), *photos, "--output", f"s3://{bucket}/rented")
    assert rented.returncode == 0, rented.stderr
    assert "60 with features, 0 failures" in rented.stdout
    assert rented.stdout.startswith("result ")
    assert "AWS-StartPortForwardingSession" in rented.stderr
    assert_nothing_left(cloud)
    assert [len(g.user_data) > 0 for g in cloud.guests.values()] == [True] * 3
    local = command(
        *("run", "--config", str(config), *photos, "--output", f"s3://{bucket}/local"),
        *("--cluster", "local", "--workers", "2", "--dashboard-address", "127.0.0.1:0"),
    )
    assert local.returncode == 0, local.stderr
    assert_same_tables(
        tables(fetch(cloud, bucket, "rented", tmp_path / "rented")),
        tables(fetch(cloud, bucket, "local", tmp_path / "local")),
    )
    assert_no_secrets(cloud, tmp_path / "rented", rented.stdout + rented.stderr)
    record = json.loads((tmp_path / "rented" / "run.json").read_text())
    places = (f"s3://{bucket}/photos", f"s3://{bucket}/rented", "the workers")
    assert record["regions"] == dict.fromkeys(places, REGION)


def assert_no_secrets(cloud: Cloud, result: Path, said: str) -> None:
    """Neither keys of the cluster nor of AWS are in what a run writes or says."""
    written = b"".join(p.read_bytes() for p in result.rglob("*") if p.is_file()) + said.encode()
    for secret in (b"PRIVATE KEY", b"BEGIN CERTIFICATE", b"aws_secret_access_key", b"S3RVER"):
        assert secret not in written


def test_what_is_asked_of_ec2(cloud: Cloud, bucket: str, config: Path, command: Command) -> None:
    config.write_text(config.read_text() + 'spot = true\n[cluster.instance_tags]\nteam = "fruit"\n')
    done = command(
        *("extract", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented", "--limit", "8"),
    )
    assert done.returncode == 0, done.stderr
    requests = [query for action, query in cloud.actions if action == "RunInstances"]
    assert len(requests) == 3
    for query in requests:
        assert query["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
        assert query["MetadataOptions.HttpTokens"] == "required"
        assert query["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert query["NetworkInterface.1.AssociatePublicIpAddress"] == "false"
        assert query["IamInstanceProfile.Name"] == "fruits-worker"
        tagged = tags_of(query)
        kinds = {"instance", "volume", "network-interface"}
        is_spot = query.get("InstanceMarketOptions.MarketType") == "spot"
        assert set(tagged) == kinds | ({"spot-instances-request"} if is_spot else set())
        for tags in tagged.values():
            assert tags["fruits-dask:cluster"].startswith("run-")
            assert tags["team"] == "fruit"
    assert sum("InstanceMarketOptions.MarketType" in query for query in requests) == 2
    assert all(len(gzip.compress(g.user_data)) < 8_000 for g in cloud.guests.values())
    scheduler, *workers = sorted(cloud.guests.values(), key=lambda g: not g.is_scheduler)
    assert "127.0.0.1:8787" in scheduler.command  # the dashboard
    assert all(b"shutdown -h +720" in g.user_data for g in cloud.guests.values())
    assert all(g.user_data.count(IMAGE.encode()) == 1 for g in workers)
    [rules] = [query for action, query in cloud.actions if action.startswith("AuthorizeSecurity")]
    assert {v for k, v in rules.items() if "CidrIp" in k} == {"127.0.0.1/32"}
    assert rules["IpPermissions.2.FromPort"] == rules["IpPermissions.2.ToPort"] == "8786"


def tags_of(query: dict[str, str]) -> dict[str, dict[str, str]]:
    """Read the tags of a request: kind of resource -> tags."""
    found: dict[str, dict[str, str]] = {}
    for name, kind in query.items():
        if name.startswith("TagSpecification.") and name.endswith(".ResourceType"):
            start = name.removesuffix("ResourceType") + "Tag."
            keys = {k: v for k, v in query.items() if k.startswith(start) and k.endswith(".Key")}
            found[kind] = {v: query[k.removesuffix("Key") + "Value"] for k, v in keys.items()}
    return found


def test_several_processes_on_a_machine(
    cloud: Cloud, bucket: str, config: Path, command: Command
) -> None:
    config.write_text(config.read_text().replace("processes_per_worker = 1", ""))
    done = command(
        *("extract", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented", "--workers", "1", "--partition-size", "10"),
    )
    assert done.returncode == 0, done.stderr
    assert "2 workers, Dask dashboard" in done.stderr
    assert_nothing_left(cloud)


def test_a_kept_cluster_serves_several_runs(
    cloud: Cloud,
    bucket: str,
    config: Path,
    command: Command,
    tmp_path: Path,
) -> None:
    up = command("cluster", "up", "team", "--config", str(config), "--workers", "1")
    assert up.returncode == 0, up.stderr
    assert "run --cluster team" in up.stdout
    kept = set(cloud.alive)
    assert len(kept) == 2
    again = command("cluster", "up", "team", "--config", str(config))
    assert again.returncode == 2
    assert "there is a cluster team" in again.stderr
    settings = tmp_path / "plain.toml"
    settings.write_text('weights = "fruits"\ncomponents = 5\n')
    for number in range(2):
        done = command(
            *("run", "--config", str(settings), "--cluster", "team", "--limit", "16"),
            *("--input", f"s3://{bucket}/photos", "--output", f"s3://{bucket}/{number}"),
        )
        assert done.returncode == 0, done.stderr
        assert set(cloud.alive) == kept
    down = command("cluster", "down", "team")
    assert down.returncode == 0, down.stderr
    assert_nothing_left(cloud)
    gone = command("run", "--cluster", "team", "--output", "s3://x/y", "--input", "s3://x/z")
    assert gone.returncode == 2
    assert "the name of a cluster that `cluster up` rented" in gone.stderr


def test_max_cost_stops_and_the_next_run_goes_on(
    cloud: Cloud, bucket: str, config: Path, command: Command
) -> None:
    """The machines may be used for one second longer than it takes to give them back."""
    prices = '[cluster.hourly_prices]\n"c7i.large" = 1200.0\n'  # 3 machines: one a second
    config.write_text(config.read_text() + prices)
    arguments = (
        *("run", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented", "--partition-size", "10"),
    )
    stopped = command(*arguments, "--max-cost", "61")
    assert stopped.returncode == 1, stopped.stderr
    assert "of --max-cost 61" in stopped.stderr
    assert "run again to resume" in stopped.stderr
    assert_nothing_left(cloud)
    done = command(*arguments, "--max-cost", "1000")
    assert done.returncode == 0, done.stderr
    assert "done before" in done.stderr
    assert_nothing_left(cloud)


def test_a_notice_retires_the_machine(
    cloud: Cloud, bucket: str, config: Path, start: Start
) -> None:
    """The metadata service announces that one of two machines is taken back."""
    config.write_text(config.read_text() + "spot = true\n")
    with start(
        *("run", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented", "--partition-size", "2"),
    ) as process:
        wait_until(lambda: len(cloud.guests) == 3, what="three machines", seconds=60)
        doomed = next(g for g in cloud.guests.values() if not g.is_scheduler)
        cloud.metadata.announced.add(doomed.address)
        wait_until(lambda: doomed.id not in cloud.alive, what="the machine is left", seconds=60)
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "60 with features, 0 failures" in stdout
    assert_nothing_left(cloud)


def test_a_bucket_in_america_is_refused(cloud: Cloud, config: Path, command: Command) -> None:
    s3 = cloud.client("s3", "us-east-1")
    s3.create_bucket(Bucket="america")
    done = command(
        *("run", "--config", str(config), "--input", "s3://america/photos"),
        *("--output", "s3://america/result"),
    )
    assert done.returncode == 2
    assert "outside the allowed regions (eu-*); nothing was read" in done.stderr
    assert cloud.count_actions()["RunInstances"] == 0
    assert not [r for r in cloud.requests if r.is_list]
