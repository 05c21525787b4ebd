"""deploy/: the template is sound and deploys, and operators have the rights they need and no more.

moto enforces actions, but neither the resources nor the conditions of a policy for EC2. So what is
tried here is which actions there are; resources and conditions are read in the template.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto import settings as moto_settings
from moto.core.authorization import ActionAuthenticatorMixin

from ec2.cloud import IMAGE, REGION, SUBNET_CIDR, VPC_CIDR, Cloud
from ec2.conftest import Command, put_photos
from ec2.waiting import assert_nothing_left

pytestmark = [pytest.mark.slow, pytest.mark.ec2]

DEPLOY = Path(__file__).parents[2] / "deploy"
STACK = DEPLOY / "stack.yaml"
POLICY_CHARACTERS = 6144
# Not asked for by the package, but by people: what a message or the run tells them to call.
BY_HAND = {"ec2:GetConsoleOutput", "ssm:StartSession", "ssm:ResumeSession", "ssm:TerminateSession"}
# AWS checks these as part of another call; moto does not.
UNSEEN = {"iam:PassRole", "ec2:CreateTags"}

Outputs = dict[str, str]


@pytest.fixture
def stack(cloud: Cloud) -> Outputs:
    """Deploy the template, and return its outputs."""
    client = cloud.client("cloudformation")
    parameters = {"VpcCidr": VPC_CIDR, "ClientCidr": "127.0.0.1/32", "BudgetEmail": "a@example.com"}
    with warnings.catch_warnings():  # moto knows neither budgets nor policies of buckets
        warnings.filterwarnings("ignore", message=".*(Budget|BucketPolicy)")
        client.create_stack(
            StackName="fruits-dask",
            TemplateBody=STACK.read_text(),
            Parameters=[
                {"ParameterKey": name, "ParameterValue": value}
                for name, value in parameters.items()
            ],
            Capabilities=["CAPABILITY_IAM"],
        )
    [found] = client.describe_stacks(StackName="fruits-dask")["Stacks"]
    assert found["StackStatus"] == "CREATE_COMPLETE"
    return {output["OutputKey"]: output["OutputValue"] for output in found["Outputs"]}


@pytest.fixture
def policy(cloud: Cloud, stack: Outputs) -> dict[str, Any]:
    iam = cloud.client("iam")
    arn = stack["OperatorPolicyArn"]
    version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
    found = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
    return found if isinstance(found, dict) else json.loads(found)


def actions_of(policy: dict[str, Any]) -> set[str]:
    found = (s["Action"] for s in policy["Statement"])
    return {a for actions in found for a in ([actions] if isinstance(actions, str) else actions)}


def test_the_template_is_sound() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("cfn-lint"), "--regions", REGION, "--", STACK],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", ["settings.sh", "remove.sh"])
def test_the_scripts_are_bash_and_say_how_they_are_used(script: str) -> None:
    done = subprocess.run([DEPLOY / script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"usage: {script} STACK" in done.stderr


def test_the_outputs_feed_the_cluster_table(
    cloud: Cloud, stack: Outputs, shared: Path, command: Command, tmp_path: Path
) -> None:
    [subnet] = cloud.client().describe_subnets(SubnetIds=[stack["SubnetId"]])["Subnets"]
    assert subnet["CidrBlock"] == SUBNET_CIDR
    assert stack["Region"] == REGION
    bucket, prefix = stack["Input"].removeprefix("s3://").split("/")
    put_photos(cloud, bucket, prefix, shared)
    settings = tmp_path / "stack.toml"
    settings.write_text(
        f"""
        weights = "fruits"
        components = 10
        input = "{stack["Input"]}"
        [cluster]
        kind = "ec2"
        region = "{stack["Region"]}"
        subnet_id = "{stack["SubnetId"]}"
        security_groups = ["{stack["SecurityGroupId"]}"]
        iam_instance_profile = "{stack["InstanceProfile"]}"
        docker_image = "{IMAGE}"
        ami = "/fruits/ami"
        instance_type = "c7i.large"
        """
    )
    done = command(
        *("run", "--config", str(settings), "--output", f"{stack['Output']}/first"),
        *("--workers", "1", "--limit", "30"),
    )
    assert done.returncode == 0, done.stderr
    assert "30 with features, 0 failures" in done.stdout
    assert cloud.count_actions()["DeleteSecurityGroup"] == 0  # that of the stack stays
    assert_nothing_left(cloud)


def test_nobody_may_do_more_than_needed(policy: dict[str, Any]) -> None:
    assert len(json.dumps(policy, separators=(",", ":"))) <= POLICY_CHARACTERS
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        assert not any("*" in a for a in ([actions] if isinstance(actions, str) else actions))
        if statement["Resource"] == "*":
            condition = statement["Condition"]["StringEquals"]
            assert condition["aws:RequestedRegion"] == REGION
    by_name = {statement["Sid"]: statement for statement in policy["Statement"]}
    tag = "aws:ResourceTag/fruits-dask:cluster"
    for name in ("GiveBack", "UseMadeFirewall"):
        assert by_name[name]["Condition"]["StringLike"][tag] == "?*"
    for name in ("RentMachine", "RentDisk", "RentRest", "MakeFirewall"):
        condition = by_name[name]["Condition"]["StringLike"]
        assert condition["aws:RequestTag/fruits-dask:cluster"] == "?*"
    assert by_name["RentMachine"]["Condition"]["StringEquals"] == {
        "ec2:MetadataHttpTokens": "required"
    }
    assert by_name["RentDisk"]["Condition"]["Bool"] == {"ec2:Encrypted": "true"}
    assert by_name["GiveRole"]["Condition"]["StringEquals"] == {
        "iam:PassedToService": "ec2.amazonaws.com"
    }


@pytest.fixture
def enforced(cloud: Cloud, environment: dict[str, str]) -> Iterator[Callable[[set[str]], None]]:
    """Let moto enforce rights, for an operator with the given actions."""
    iam = cloud.client("iam")
    iam.create_user(UserName="operator")
    key = iam.create_access_key(UserName="operator")["AccessKey"]
    before = moto_settings.INITIAL_NO_AUTH_ACTION_COUNT

    def enforce(actions: set[str]) -> None:
        moto_settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf")
        document = {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": sorted(actions), "Resource": "*"}],
        }
        iam.put_user_policy(
            UserName="operator", PolicyName="rights", PolicyDocument=json.dumps(document)
        )
        environment["AWS_ACCESS_KEY_ID"] = key["AccessKeyId"]
        environment["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
        moto_settings.INITIAL_NO_AUTH_ACTION_COUNT = ActionAuthenticatorMixin.request_count = 0

    yield enforce
    moto_settings.INITIAL_NO_AUTH_ACTION_COUNT = before
    iam.delete_user_policy(UserName="operator", PolicyName="rights")
    iam.delete_access_key(UserName="operator", AccessKeyId=key["AccessKeyId"])
    iam.delete_user(UserName="operator")


def test_the_operator_has_what_is_needed_and_no_more(
    cloud: Cloud,
    policy: dict[str, Any],
    config: Path,
    command: Command,
    enforced: Callable[[set[str]], None],
) -> None:
    """With all actions everything passes; without any one of those for machines it fails."""
    allowed = actions_of(policy)

    def up_and_down(actions: set[str]) -> str:
        enforced(actions)
        up = command("cluster", "up", "team", "--config", str(config), "--workers", "1")
        down = command("cluster", "down", "team") if up.returncode == 0 else up
        moto_settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf")
        if down.returncode:
            give_back(cloud)
            return down.stderr
        assert_nothing_left(cloud)
        return ""

    assert up_and_down(allowed) == ""
    needed = {a for a in allowed if a.startswith(("ec2:", "ssm:", "iam:"))} - BY_HAND - UNSEEN
    assert len(needed) == 10
    for action in sorted(needed):
        message = up_and_down(allowed - {action})
        assert action.split(":")[1] in message, f"{action}: {message!r}"
        assert "Traceback" not in message


def give_back(cloud: Cloud) -> None:
    """End what a client without the right to do so had to leave."""
    ec2 = cloud.client()
    if cloud.alive:
        ec2.terminate_instances(InstanceIds=cloud.alive)
    for group in cloud.made_groups:
        ec2.delete_security_group(GroupId=group)
