"""What can go wrong while machines are rented, each time with nothing left."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ec2.cloud import Cloud, refusal
from ec2.conftest import Command
from ec2.waiting import assert_nothing_left, wait_until
from servers import Answer

pytestmark = [pytest.mark.slow, pytest.mark.ec2]

Start = Callable[..., "subprocess.Popen[str]"]


def arguments(config: Path, bucket: str) -> tuple[str, ...]:
    return (
        *("run", "--config", str(config), "--input", f"s3://{bucket}/photos"),
        *("--output", f"s3://{bucket}/rented"),
    )


def refuse_nth(action: str, number: int, answer: Answer) -> Callable[..., Answer | None]:
    """Refuse an action from its `number`-th call on."""
    seen = 0

    def refuse(asked: str, query: dict[str, str]) -> Answer | None:
        nonlocal seen
        seen += asked == action
        return answer if asked == action and seen >= number else None

    return refuse


def test_no_capacity(cloud: Cloud, bucket: str, config: Path, command: Command) -> None:
    cloud.refuse = refuse_nth("RunInstances", 1, refusal("InsufficientInstanceCapacity"))
    done = command(*arguments(config, bucket))
    assert done.returncode == 1
    assert "no such machine free" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_left(cloud)


def test_capacity_for_one_of_two(cloud: Cloud, bucket: str, config: Path, command: Command) -> None:
    """The first is the scheduler's."""
    cloud.refuse = refuse_nth("RunInstances", 3, refusal("InsufficientInstanceCapacity"))
    done = command(*arguments(config, bucket))
    assert done.returncode == 0, done.stderr
    assert "fewer machines" in done.stderr
    assert "1 workers" in done.stderr
    assert_nothing_left(cloud)


def test_the_scheduler_dies_during_its_start(
    cloud: Cloud, bucket: str, config: Path, command: Command
) -> None:
    cloud.wishes.ends_at_once = lambda guest: guest.is_scheduler
    done = command(*arguments(config, bucket))
    assert done.returncode == 1
    assert "ended during its start" in done.stderr, done.stderr
    assert "get-console-output" in done.stderr
    assert_nothing_left(cloud)


def test_the_image_never_starts(cloud: Cloud, bucket: str, config: Path, command: Command) -> None:
    config.write_text(config.read_text().replace("1 minute", "6 seconds"))
    cloud.wishes.never_starts = lambda guest: guest.is_scheduler
    done = command(*arguments(config, bucket))
    assert done.returncode == 1
    for word in ("no scheduler answers", "security group", "subnet", "pull", "console"):
        assert word in done.stderr, done.stderr
    assert_nothing_left(cloud)


def test_all_workers_die_during_their_start(
    cloud: Cloud, bucket: str, config: Path, command: Command
) -> None:
    cloud.wishes.ends_at_once = lambda guest: not guest.is_scheduler
    done = command(*arguments(config, bucket))
    assert done.returncode == 1
    assert "no worker reached the scheduler" in done.stderr, done.stderr
    assert_nothing_left(cloud)


def test_throttled(cloud: Cloud, bucket: str, config: Path, command: Command) -> None:
    """Every third request is refused at first, for being too fast."""
    asked = 0

    def refuse(action: str, query: dict[str, str]) -> Answer | None:
        nonlocal asked
        asked += 1
        throttled = asked % 3 == 0 and asked < 30
        return refusal("RequestLimitExceeded", status="503 Slow") if throttled else None

    cloud.refuse = refuse
    done = command(*arguments(config, bucket))
    assert done.returncode == 0, done.stderr
    assert_nothing_left(cloud)


def test_an_action_is_denied(cloud: Cloud, bucket: str, config: Path, command: Command) -> None:
    cloud.refuse = refuse_nth(
        "RunInstances", 1, refusal("UnauthorizedOperation", status="403 Forbidden")
    )
    done = command(*arguments(config, bucket))
    assert done.returncode == 1
    assert "operator policy in deploy/" in done.stderr, done.stderr
    assert_nothing_left(cloud)


@pytest.mark.parametrize(
    "moment", ["CreateSecurityGroup", "RunInstances", "scheduler", "workers", "joined"]
)
def test_ctrl_c_during_the_start(
    cloud: Cloud, bucket: str, config: Path, start: Start, moment: str
) -> None:
    reached: Callable[[], bool] = {
        "scheduler": lambda: any(g.is_scheduler for g in cloud.guests.values()),
        "workers": lambda: len(cloud.guests) > 1,
        "joined": lambda: "features" in str(cloud.count_paths()),
    }.get(moment, lambda: cloud.count_actions()[moment] > 0)
    with start(*arguments(config, bucket)) as process:
        wait_until(reached, what=moment, seconds=60)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=90)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert_nothing_left(cloud)


def test_all_machines_are_taken_back(cloud: Cloud, bucket: str, config: Path, start: Start) -> None:
    config.write_text(config.read_text().replace("1 minute", "15 seconds"))
    with start(*arguments(config, bucket), "--partition-size", "1") as process:
        wait_until(lambda: "features" in str(cloud.count_paths()), what="a part", seconds=90)
        workers = [g.id for g in cloud.guests.values() if not g.is_scheduler]
        cloud.client().terminate_instances(InstanceIds=workers)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    assert "all workers are gone" in stderr
    assert_nothing_left(cloud)


def test_a_profile_is_for_this_machine_alone(
    bucket: str, config: Path, command: Command, environment: dict[str, str]
) -> None:
    """The machines have a role; they know no profile of the user."""
    credentials = config.with_name("credentials")
    keys = [environment.pop(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
    credentials.write_text(
        f"[me]\naws_access_key_id = {keys[0]}\naws_secret_access_key = {keys[1]}\n"
    )
    environment["AWS_SHARED_CREDENTIALS_FILE"] = str(credentials)
    done = command(*arguments(config, bucket), "--profile", "me", "--workers", "1")
    assert done.returncode == 0, done.stderr


def test_a_second_ctrl_c_says_how_to_give_back_the_rest(
    cloud: Cloud, bucket: str, config: Path, start: Start, command: Command
) -> None:
    with start(*arguments(config, bucket)) as process:
        wait_until(lambda: len(cloud.guests) == 3, what="three machines", seconds=60)
        cloud.refuse = refuse_nth(
            "TerminateInstances", 1, refusal("RequestLimitExceeded", status="503 Slow")
        )
        process.send_signal(signal.SIGINT)
        wait_until(lambda: cloud.count_actions()["TerminateInstances"] > 0, what="giving back")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    [told] = [line for line in stderr.splitlines() if "NOT ALL IS GIVEN BACK" in line]
    cloud.refuse = lambda action, query: None
    done = command(*told.split("`")[1].split())
    assert done.returncode == 0, done.stderr
    assert_nothing_left(cloud)


def test_a_killed_client(cloud: Cloud, bucket: str, config: Path, start: Start) -> None:
    """The machines end by themselves; what costs nothing goes with `cluster down`."""
    text = config.read_text().replace("[cluster]", '[cluster]\nidle_timeout = "4 seconds"')
    config.write_text(text)
    with start(*arguments(config, bucket)) as process:
        wait_until(lambda: len(cloud.guests) == 3, what="three machines", seconds=60)
        time.sleep(5)
        process.kill()
    wait_until(lambda: cloud.alive == [], what="the machines end", seconds=60)


def test_list_and_down(
    cloud: Cloud, bucket: str, config: Path, start: Start, command: Command
) -> None:
    with start(*arguments(config, bucket)) as process:
        wait_until(lambda: len(cloud.guests) == 3, what="three machines", seconds=60)
        process.kill()
    listed = command("cluster", "list")
    assert listed.returncode == 0, listed.stderr
    [name] = {line.split()[0] for line in listed.stdout.splitlines() if line.startswith("run-")}
    assert all(machine in listed.stdout for machine in cloud.alive)
    unknown = command("cluster", "down", "run-0")
    assert unknown.returncode == 2
    assert name in unknown.stderr
    done = command("cluster", "down", name)
    assert done.returncode == 0, done.stderr
    assert_nothing_left(cloud)
    assert "nothing is rented" in command("cluster", "list").stdout
