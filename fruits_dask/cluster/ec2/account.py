"""What is asked of EC2 beside starting machines: find by tag, end, firewalls, facts."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_network
from typing import Any

import botocore.config
import botocore.session
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from ...errors import ClusterError, ConfigError

CLUSTER_TAG = "fruits-dask:cluster"
"""Every resource that is rented carries it; its value is the name of the cluster."""

SCHEDULER_PORT = 8786
WORLD_BITS = 8
"""A network with a shorter prefix is the world, however it is spelled."""

_ALIVE = ("pending", "running", "shutting-down", "stopping", "stopped")
_ENDED = ("shutting-down", "terminated", "stopping", "stopped")
_NOT_ENDING = ("pending", "running", "stopping", "stopped")
_POLL_SECONDS = 1.0
_UNLISTED_SECONDS = 30.0
# What AWS answers, and what to do about it.
_ADVICE = {
    "AuthFailure": "the keys are not valid; see `aws sts get-caller-identity`",
    "InvalidClientTokenId": "the keys are not valid; see `aws sts get-caller-identity`",
    "ExpiredToken": "the session has expired; sign in again (`aws sso login`)",
    "RequestExpired": "the session has expired, or the clock of this machine is wrong",
    "UnauthorizedOperation": "the operator policy in deploy/ allows what is needed",
    "AccessDenied": "the operator policy in deploy/ allows what is needed",
    "AccessDeniedException": "the operator policy in deploy/ allows what is needed",
    "InsufficientInstanceCapacity": "AWS has no such machine free there now; try another "
    "instance_type, another subnet_id, or later",
    "SpotMaxPriceTooLow": "there is no spare capacity now; set spot = false",
    "MaxSpotInstanceCountExceeded": "the quota for spot machines is used up; ask for more under "
    "Service Quotas, Amazon EC2",
    "VcpuLimitExceeded": "the quota for virtual CPUs is used up; rent fewer --workers, or ask for "
    "more under Service Quotas, Amazon EC2, Running On-Demand instances",
    "InstanceLimitExceeded": "the quota for machines is used up; rent fewer --workers",
    "InvalidAMIID.NotFound": "there is no such ami in this region",
    "InvalidAMIID.Malformed": "the ami is no identifier; expected ami-...",
    "InvalidKeyPair.NotFound": "there is no such key_name in this region",
    "InvalidSubnetID.NotFound": "there is no such subnet_id in this region",
    "InvalidGroup.NotFound": "there is no such security group in this region",
    "InvalidParameterValue": "one of the settings under [cluster] is not accepted",
    "RequestLimitExceeded": "AWS answers too many requests of this account; try again in a minute",
    "ParameterNotFound": "there is no such SSM parameter in this region; set ami to an AMI",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One rented instance."""

    id: str
    """Identifier, ``i-...``."""
    cluster: str
    """Name of the cluster it belongs to."""
    name: str
    """Its own name, which says whether it is the scheduler's."""
    state: str
    """``pending``, ``running``, ``shutting-down``, ``stopping`` or ``stopped``."""
    kind: str
    """Instance type."""
    started: str
    """When it was asked for, ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What an instance type is."""

    name: str
    """Such as ``c7i.xlarge``."""
    n_cores: int
    """Virtual CPUs."""
    memory_bytes: int
    """Memory."""
    architectures: tuple[str, ...]
    """Such as ``x86_64``."""
    n_gpus: int
    """Graphics processors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """Where machines are rented."""

    id: str
    """Identifier, ``subnet-...``."""
    vpc: str
    """Network it is part of, ``vpc-...``."""
    addresses: IPv4Network
    """Private addresses."""


class Account:
    """EC2 of one account in one region.

    Parameters
    ----------
    region : str or None
        Where; None for the region of the AWS configuration.
    profile : str or None
        Of the AWS configuration files.

    Raises
    ------
    ConfigError
        If there is no such profile, or no region.
    """

    def __init__(self, region: str | None, profile: str | None) -> None:
        with aws_errors("read the AWS configuration"):
            self._session = botocore.session.Session(profile=profile)
            found = region or self._session.get_config_variable("region")
            if not found:
                raise ConfigError("the AWS configuration names no region; give --region")
            self.region = str(found)
            self._ec2 = self._client("ec2")

    def _client(self, service: str) -> Any:  # noqa: ANN401 - botocore is untyped
        config = botocore.config.Config(
            connect_timeout=10, read_timeout=30, retries={"mode": "standard", "max_attempts": 6}
        )
        return self._session.create_client(service, region_name=self.region, config=config)

    def caller(self) -> str:
        """Return the ARN of whoever the keys belong to."""
        with aws_errors("find out whose keys these are"):
            return str(self._client("sts").get_caller_identity()["Arn"])

    def parameter(self, name: str) -> str:
        """Return the value of an SSM parameter."""
        with aws_errors(f"read the SSM parameter {name}"):
            answer = self._client("ssm").get_parameter(Name=name)
            return str(answer["Parameter"]["Value"])

    def kind(self, name: str) -> Kind:
        """Look up an instance type.

        Raises
        ------
        ConfigError
            If this region does not have it.
        """
        try:
            with aws_errors(f"look up the instance type {name}"):
                answer = self._ec2.describe_instance_types(InstanceTypes=[name])
        except ClusterError as exc:
            if "InvalidInstanceType" in str(exc):
                raise ConfigError(
                    f"{self.region} has no instance type {name!r}; choose another instance_type"
                ) from exc
            raise
        [found] = answer["InstanceTypes"]
        return Kind(
            name=name,
            n_cores=int(found["VCpuInfo"]["DefaultVCpus"]),
            memory_bytes=int(found["MemoryInfo"]["SizeInMiB"]) * 2**20,
            architectures=tuple(found["ProcessorInfo"]["SupportedArchitectures"]),
            n_gpus=sum(int(g.get("Count", 0)) for g in found.get("GpuInfo", {}).get("Gpus", [])),
        )

    def subnet(self, subnet_id: str | None, vpc: str | None) -> Subnet:
        """Find the subnet to rent in.

        Parameters
        ----------
        subnet_id : str or None
            The wanted one.
        vpc : str or None
            Else: any of this network; else: any of the default network.

        Returns
        -------
        Subnet
            The wanted one, or the first by its identifier.

        Raises
        ------
        ConfigError
            If there is none.
        """
        if subnet_id:
            chosen: dict[str, Any] = {"SubnetIds": [subnet_id]}
        elif vpc:
            chosen = {"Filters": [{"Name": "vpc-id", "Values": [vpc]}]}
        else:
            chosen = {"Filters": [{"Name": "default-for-az", "Values": ["true"]}]}
        with aws_errors("look up the subnet"):
            found = self._ec2.describe_subnets(**chosen)["Subnets"]
        if not found:
            raise ConfigError(
                f"{vpc or 'the default network'} has no subnet in {self.region}; set subnet_id "
                "(deploy/ makes one)"
            )
        if vpc and found[0]["VpcId"] != vpc:
            raise ConfigError(f"the subnet {subnet_id} is in {found[0]['VpcId']}, not in {vpc}")
        first = min(found, key=lambda subnet: str(subnet["SubnetId"]))
        return Subnet(
            id=str(first["SubnetId"]),
            vpc=str(first["VpcId"]),
            addresses=IPv4Network(first["CidrBlock"]),
        )

    # ---------------------------------------------------------------- machines

    def machines(self, cluster: str | None = None) -> list[Machine]:
        """Find the rented machines that have not ended, by tag.

        Parameters
        ----------
        cluster : str or None
            Name of one cluster; None for those of all.
        """
        return list(self._machines(cluster, _ALIVE))

    def _machines(self, cluster: str | None, states: Sequence[str]) -> Iterator[Machine]:
        filters = [{"Name": "instance-state-name", "Values": list(states)}, _tag_filter(cluster)]
        with aws_errors("list the machines"):
            for page in self._ec2.get_paginator("describe_instances").paginate(Filters=filters):
                for reservation in page["Reservations"]:
                    yield from (_machine(found) for found in reservation["Instances"])

    def ended(self, cluster: str) -> set[str]:
        """Find machines of a cluster that have ended, or are about to; by identifier."""
        return {m.id for m in self._machines(cluster, _ENDED)}

    def end(self, cluster: str, *, known: Collection[str] = (), timeout_seconds: float) -> None:
        """End all machines of a cluster, wait until they are gone, and remove its firewalls.

        Parameters
        ----------
        cluster : str
            Its name.
        known : collection of str
            Machines that are ended even where AWS does not list them yet.
        timeout_seconds : float
            How long to wait.

        Raises
        ------
        ClusterError
            If something is left; the message names it.
        """
        deadline = time.monotonic() + timeout_seconds
        listed = list(self._machines(cluster, (*_ALIVE, "terminated")))
        ordered = {m.id for m in listed if m.state in _NOT_ENDING}
        self._end(sorted(ordered))
        for machine in set(known) - {m.id for m in listed}:
            self._end_unlisted(machine)
        while alive := self.machines(cluster):
            new = [m.id for m in alive if m.state in _NOT_ENDING and m.id not in ordered]
            self._end(new)
            ordered.update(new)
            if time.monotonic() > deadline:
                left = ", ".join(f"{m.id} ({m.state})" for m in alive)
                raise ClusterError(
                    f"still there after {timeout_seconds:.0f} s: {left}; look again with `cluster "
                    f"list --region {self.region}`, then `cluster down {cluster}`"
                )
            time.sleep(_POLL_SECONDS)
        self._remove_groups(cluster, deadline)

    def _end(self, ids: list[str]) -> None:
        if ids:
            with aws_errors(f"end the machines {', '.join(ids)}"):
                self._ec2.terminate_instances(InstanceIds=ids)

    def _end_unlisted(self, machine: str) -> None:
        """End a machine that AWS has just started, and may not know everywhere yet."""
        deadline = time.monotonic() + _UNLISTED_SECONDS
        while time.monotonic() < deadline:  # after that: gone, or found by its tag
            try:
                self._end([machine])
            except ClusterError as exc:
                if "InvalidInstanceID.NotFound" not in str(exc):
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                return

    # ---------------------------------------------------------------- firewalls

    def make_group(self, cluster: str, vpc: str, cidr: str, tags: dict[str, str]) -> str:
        """Make a firewall that admits the cluster itself, and one client to the scheduler.

        Returns
        -------
        str
            Its identifier.
        """
        with aws_errors("make a security group"):
            group = str(
                self._ec2.create_security_group(
                    GroupName=f"fruits-dask-{cluster}",
                    Description="fruits_dask: a cluster and its client; goes with the cluster",
                    VpcId=vpc,
                    TagSpecifications=[
                        {"ResourceType": "security-group", "Tags": aws_tags(tags)},
                    ],
                )["GroupId"]
            )
            # What was just made is not known everywhere at once.
            self._ec2.get_waiter("security_group_exists").wait(
                GroupIds=[group], WaiterConfig={"Delay": 1, "MaxAttempts": 30}
            )
            self._ec2.authorize_security_group_ingress(
                GroupId=group,
                IpPermissions=[
                    {
                        "IpProtocol": "tcp",
                        "FromPort": 0,
                        "ToPort": 65535,
                        "UserIdGroupPairs": [{"GroupId": group, "Description": "the cluster"}],
                    },
                    {
                        "IpProtocol": "tcp",
                        "FromPort": SCHEDULER_PORT,
                        "ToPort": SCHEDULER_PORT,
                        "IpRanges": [{"CidrIp": cidr, "Description": "the client"}],
                    },
                ],
            )
        return group

    def check_groups(self, groups: Sequence[str]) -> None:
        """Refuse firewalls that admit the whole world, or that belong to everybody.

        Raises
        ------
        ConfigError
            Naming the group.
        """
        with aws_errors("look up the security groups"):
            found = self._ec2.describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
        for group in found:
            if group["GroupName"] == "default":
                raise ConfigError(
                    f"{group['GroupId']} is the default security group of its network, which other "
                    "machines share; leave security_groups out, and one is made for the cluster"
                )
            for rule in group["IpPermissions"]:
                ranges = [r["CidrIp"] for r in rule.get("IpRanges", [])]
                ranges += [r["CidrIpv6"] for r in rule.get("Ipv6Ranges", [])]
                too_wide = any(ip_network(r, strict=False).prefixlen < WORLD_BITS for r in ranges)
                if too_wide or rule.get("PrefixListIds"):
                    raise ConfigError(
                        f"the security group {group['GroupId']} is open to the world on "
                        f"{_ports(rule)}; narrow it, or leave security_groups out, and one is made "
                        "for the cluster"
                    )

    def groups(self, cluster: str | None = None) -> dict[str, str]:
        """Find the firewalls that were made for clusters: identifier -> name of the cluster."""
        with aws_errors("list the security groups"):
            answer = self._ec2.describe_security_groups(Filters=[_tag_filter(cluster)])
        return {str(g["GroupId"]): _tags(g)[CLUSTER_TAG] for g in answer["SecurityGroups"]}

    def _remove_groups(self, cluster: str, deadline: float) -> None:
        for group in self.groups(cluster):
            while True:
                try:
                    with aws_errors(f"remove the security group {group}"):
                        self._ec2.delete_security_group(GroupId=group)
                    break
                except ClusterError as exc:
                    # The network interface of a machine goes some seconds after the machine.
                    if "DependencyViolation" not in str(exc) or time.monotonic() > deadline:
                        raise
                    time.sleep(_POLL_SECONDS)


def aws_tags(tags: dict[str, str]) -> list[dict[str, str]]:
    """Spell tags as AWS wants them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


@contextmanager
def aws_errors(action: str) -> Iterator[None]:
    """Say in one sentence what AWS refused, and what to do.

    Parameters
    ----------
    action : str
        What was tried, after "cannot".

    Raises
    ------
    ConfigError
        If there are no keys, or no such profile.
    ClusterError
        For anything else that AWS or the way to it refuses.
    """
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as exc:
        raise ConfigError(
            f"cannot {action}: {exc}; sign in (`aws configure sso`), or give --profile"
        ) from exc
    except ClientError as exc:
        raise ClusterError(f"cannot {action}: {explain(exc)}") from exc
    except BotoCoreError as exc:
        raise ClusterError(
            f"cannot {action}: {exc}; check the network, the region and AWS_ENDPOINT_URL"
        ) from exc


def explain(exc: BaseException) -> str:
    """Say what an error of AWS means; anything else as it is."""
    if not isinstance(exc, ClientError):
        return str(exc)
    error = exc.response.get("Error", {})
    code = str(error.get("Code", ""))
    advice = f"; {_ADVICE[code]}" if code in _ADVICE else ""
    return f"AWS refuses {exc.operation_name} ({code}: {error.get('Message', '')}){advice}"


def _tag_filter(cluster: str | None) -> dict[str, Any]:
    if cluster is None:
        return {"Name": "tag-key", "Values": [CLUSTER_TAG]}
    return {"Name": f"tag:{CLUSTER_TAG}", "Values": [cluster]}


def _tags(found: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in found.get("Tags", [])}


def _machine(found: dict[str, Any]) -> Machine:
    tags = _tags(found)
    return Machine(
        id=str(found["InstanceId"]),
        cluster=tags.get(CLUSTER_TAG, ""),
        name=tags.get("Name", ""),
        state=str(found["State"]["Name"]),
        kind=str(found["InstanceType"]),
        started=found["LaunchTime"].isoformat(timespec="seconds"),
    )


def _ports(rule: dict[str, Any]) -> str:
    if rule["IpProtocol"] == "-1":
        return "all ports"
    first, last = rule.get("FromPort"), rule.get("ToPort")
    return f"port {first}" if first == last else f"ports {first} to {last}"
