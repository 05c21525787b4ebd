"""Pieces of renting that need no machine: money, names, user data, answers of AWS."""

from __future__ import annotations

import gzip
import os
import stat
import threading
from pathlib import Path

import dask
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from distributed.security import Security

from fruits_dask.cluster import kept
from fruits_dask.cluster.ec2 import account, costs, machines
from fruits_dask.errors import ClusterError, ConfigError

HOUR = 3600.0
PRICES = {"c7i.large": 0.5, "c7i.xlarge": 1.0}


# ---------------------------------------------------------------- money


def test_an_hour_costs_the_scheduler_and_all_workers() -> None:
    assert costs.hourly_cost(PRICES, "c7i.large", "c7i.xlarge", 8) == 8.5
    assert costs.hourly_cost(PRICES, "c7i.large", "c7i.2xlarge", 8) is None


def test_a_limit_needs_prices() -> None:
    costs.check_price(None, None, {"c7i.large"})
    costs.check_price(1.0, 5.0, {"c7i.large"})
    with pytest.raises(ConfigError, match=r"an hour of c7i\.large and c7i\.xlarge"):
        costs.check_price(None, 5.0, {"c7i.xlarge", "c7i.large"})
    with pytest.raises(ConfigError, match="within a minute"):
        costs.check_price(60.0, 1.0, {"c7i.large"})


@pytest.mark.parametrize(
    ("hourly", "max_cost", "max_hours", "hours", "message"),
    [
        (10.0, 5.0, 12.0, 0.5, "--max-cost 5.00"),
        (None, None, 2.0, 2.0, "--max-hours 2"),
        (1.0, 50.0, 2.0, 2.0, "--max-hours 2"),
    ],
)
def test_the_budget_ends_in_time(
    hourly: float | None, max_cost: float | None, max_hours: float, hours: float, message: str
) -> None:
    now = 1000.0
    budget = costs.Budget(
        hourly=hourly, max_cost=max_cost, max_hours=max_hours, clock=lambda: now, start=1000.0
    )
    now += hours * HOUR - 61  # a minute is kept for giving back
    budget.check()
    now += 2
    with pytest.raises(ClusterError, match=f"{message}.*run again to resume"):
        budget.check()


# ---------------------------------------------------------------- user data


def test_user_data_is_compressed_and_measured() -> None:
    assert gzip.decompress(machines.compressed("#cloud-config\n" * 5000)).startswith(b"#cloud")
    with pytest.raises(ClusterError, match=r"and EC2 takes 16,384"):
        machines.compressed(os.urandom(20_000).hex())


def test_only_what_is_needed_of_the_configuration_travels() -> None:
    security = Security.temporary()
    with dask.config.set({"distributed.secret": "hunter2", "s3.password": "hunter3"}):
        sent = dask.config.deserialize(machines.inherited_config(security, 60))
    assert set(sent) == {"distributed"}
    assert set(sent["distributed"]) == {"comm", "admin", "worker", "nanny", "scheduler"}
    assert sent["distributed"]["comm"]["tls"]["ca-file"] == security.tls_ca_file
    assert "client" not in sent["distributed"]["comm"]["tls"]
    assert "hunter" not in str(sent)


# ---------------------------------------------------------------- the gate


def test_a_closed_gate_lets_nobody_in() -> None:
    gate = machines.Gate()
    gate.enter()
    gate.leave({"Instances": [{"InstanceId": "i-1"}]})
    gate.close()
    assert gate.young == {"i-1"}
    with pytest.raises(ClusterError, match="given back"):
        gate.enter()


def test_the_gate_waits_for_requests_under_way() -> None:
    gate = machines.Gate()
    gate.enter()
    closing = threading.Thread(target=gate.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    gate.leave({"Instances": [{"InstanceId": "i-late"}]})
    closing.join(5)
    assert not closing.is_alive()
    assert gate.young == {"i-late"}


# ---------------------------------------------------------------- kept clusters


def cluster(name: str = "team") -> kept.KeptCluster:
    return kept.KeptCluster(
        name=name,
        region="eu-west-3",
        address="tls://127.77.1.4:8786",
        n_threads=1,
        hourly=1.5,
        max_hours=12.0,
        start=1e9,
        idle_seconds=1200.0,
        tls={"tls_ca_file": "-----BEGIN CERTIFICATE-----"},
    )


def test_how_to_reach_a_cluster_is_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = kept.save(cluster())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kept.is_kept("team")
    assert kept.load("team") == cluster()
    kept.forget("team")
    assert not kept.is_kept("team")
    with pytest.raises(ClusterError, match="cluster down team"):
        kept.load("team")


@pytest.mark.parametrize("name", ["", "local", "ec2", "run-1", "Team", "a/b", "../x", "a" * 32])
def test_names_that_no_cluster_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        kept.check_name(name)
    assert not kept.is_kept(name)


# ---------------------------------------------------------------- answers of AWS


def answer(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "so"}}, "RunInstances")


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("UnauthorizedOperation", "operator policy"),
        ("InsufficientInstanceCapacity", "another"),
        ("VcpuLimitExceeded", "Service Quotas"),
        ("ExpiredToken", "sign in again"),
    ],
)
def test_a_refusal_says_what_to_do(code: str, advice: str) -> None:
    with (
        pytest.raises(ClusterError, match=rf"cannot rent: .*{code}.*{advice}"),
        account.aws_errors("rent"),
    ):
        raise answer(code)


def test_no_keys_and_no_network() -> None:
    with pytest.raises(ConfigError, match="sign in"), account.aws_errors("rent"):
        raise NoCredentialsError
    with pytest.raises(ClusterError, match="AWS_ENDPOINT_URL"), account.aws_errors("rent"):
        raise EndpointConnectionError(endpoint_url="https://ec2")
