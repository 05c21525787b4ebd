"""The command line: words, exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import logging
import re
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import fruits_dask
from fruits_dask import pipeline
from fruits_dask.cli import app
from fruits_dask.config import RENTED_SETTINGS, Settings, flag_name
from fruits_dask.errors import ClusterError, ConfigError, FruitsDaskError
from fruits_dask.records import FORMAT_VERSION
from fruits_dask.sample import n_sample_images
from jobs import command, names, photo, snapshot, write_photos

COMMANDS = (
    *("run", "plan", "extract", "reduce", "report"),
    *("retry-failed", "sample", "doctor", "bench"),
)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give an empty working folder and wide lines, and put the log handlers of pytest back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    root = logging.getLogger()
    kept, level = root.handlers[:], logging.getLogger("fruits_dask").level
    yield
    root.handlers[:] = kept
    logging.getLogger("fruits_dask").setLevel(level)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="fruits_dask")


def plain(text: str) -> str:
    """Without colours, and on one line."""
    return " ".join(_STYLE.sub("", text).split())


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = call(name, "--help")
    assert done.exit_code == 0
    assert f"Usage: fruits_dask {name}" in plain(done.stdout)
    assert done.stderr == ""


def test_the_commands_are_these() -> None:
    help_text = plain(call("--help").stdout)
    found = {c.name or str(c.callback) for c in app.registered_commands}
    assert found == set(COMMANDS)
    assert all(name in help_text for name in COMMANDS)


def test_help_describes_every_setting() -> None:
    """Flag and first words of its description, from the one place where they are kept.

    What rented machines are belongs into a file; the flags are for what a run may want otherwise.
    """
    help_text = plain(call("run", "--help").stdout).replace("│ ", "")
    flags = {"region", "instance_type", "docker_image", "spot", "max_hours", "max_cost"}
    for name, field in Settings.model_fields.items():
        if name in set(RENTED_SETTINGS) - flags:
            continue
        assert flag_name(name) in help_text
        assert str(field.description).split(" (")[0][:20] in help_text


def test_h_is_help() -> None:
    assert call("run", "-h").stdout == call("run", "--help").stdout


def test_no_command_at_all_shows_help() -> None:
    done = call()
    assert "Usage: fruits_dask" in plain(done.output)
    assert done.exit_code == 2


def test_the_version() -> None:
    done = call("--version")
    assert (done.exit_code, done.stdout) == (0, f"fruits_dask {fruits_dask.__version__}\n")


# ---------------------------------------------------------------- settings


def dry_run(*arguments: str) -> dict[str, tuple[object, str]]:
    """Run with --dry-run; name -> value and origin."""
    done = call("run", "--dry-run", *arguments)
    assert done.exit_code == 0, done.output
    found = {}
    for line in done.stdout.splitlines():
        setting, _, origin = line.rpartition("  # ")
        name, _, value = setting.partition(" = ")
        found[name] = (json.loads(value), origin)
    return found


def test_a_dry_run_shows_where_each_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flag over environment over file over default, and nothing is done."""
    file = tmp_path / "fruits.toml"
    file.write_text("components = 7\nlimit = 70\nworkers = 1\n", "utf-8")
    monkeypatch.setenv("FRUITS_LIMIT", "80")
    monkeypatch.setenv("FRUITS_WORKERS", "2")
    found = dry_run("--config", str(file), "--workers", "3")
    assert found["components"] == (7, str(file))
    assert found["limit"] == (80, "FRUITS_LIMIT")
    assert found["workers"] == (3, "flag")
    assert found["output"] == ("fruits-output", "default")
    assert set(found) == set(Settings.model_fields)
    assert names(tmp_path) == {"fruits.toml"}


def test_a_dry_run_can_be_kept_as_a_configuration(tmp_path: Path) -> None:
    """Its lines are TOML but for null, which TOML does not know."""
    done = call("run", "--dry-run", "--components", "0.95", "--anonymous")
    lines = [line for line in done.stdout.splitlines() if "= null" not in line]
    file = tmp_path / "kept.toml"
    file.write_text("\n".join(lines), "utf-8")
    assert tomllib.loads(file.read_text("utf-8"))["components"] == 0.95
    assert dry_run("--config", str(file))["anonymous"] == (True, str(file))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compnents", "3"], "No such option: --compnents"),
        (["--components", "0"], "--components = '0' (from flag)"),
        (["--components", "many"], "--components"),
        (["--limit", "-1"], "--limit"),
        (["--workers", "1.5"], "--workers"),
        (["--engine", "torch"], "'tensorflow'"),
        (["--endpoint-url", "ftp://127.0.0.1"], "expected http://HOST:PORT"),
        (["--cluster", "moon"], "tcp://"),
        (["--input", "gs://bucket"], "is not supported; give a local folder or s3://"),
        (["--input", "s3://"], "names no bucket"),
        (["--input", "/usr", "--backbone", "mobilenet_v3"], "did you mean mobilenet_v2"),
        (["--config", "absent.toml"], "no configuration file absent.toml"),
        (["surplus"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_one_message(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = call("run", *arguments)
    assert done.exit_code == 2, done.output
    assert words in plain(done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("components = ", "not a readable TOML file"),
        ("componets = 3", "there is no setting 'componets'; did you mean 'components'?"),
        ("components = 'x'", "--components = 'x'"),
        ("[run]\ncomponents = 3", "there is no setting 'run'"),
    ],
)
def test_a_bad_configuration_file_is_said(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "fruits.toml"
    file.write_text(content, "utf-8")
    done = call("run", "--dry-run", "--config", str(file))
    assert done.exit_code == 2
    assert words in plain(done.stderr)
    assert str(file) in plain(done.stderr)


def test_a_password_in_an_address_is_not_repeated() -> None:
    done = call("run", "--endpoint-url", "http://me:hunter2@127.0.0.1:9")
    assert done.exit_code == 2
    assert "user name or password" in done.stderr
    assert "hunter2" not in done.output


def test_a_variable_that_is_no_setting_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_COMPONENT", "3")
    done = call("run", "--dry-run")
    assert done.exit_code == 0
    assert "FRUITS_COMPONENT is no setting" in done.stderr
    assert "did you mean FRUITS_COMPONENTS?" in done.stderr
    assert "warning" not in done.stdout


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FruitsDaskError("broken"), 1),
        (ClusterError("no cluster"), 1),
        (ConfigError("wrong"), 2),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a defect"), 1),
    ],
)
def test_what_goes_wrong_is_one_message_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    done = call("run", "--input", ".")
    assert done.exit_code == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert (str(error) or "stopped; what is stored stays") in done.stderr


def test_markup_in_a_message_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths with brackets are no colours."""

    def fail(*_: object, **__: object) -> None:
        raise FruitsDaskError("/photos/[red]/[/nothing].jpg")

    monkeypatch.setattr(pipeline, "run", fail)
    assert "/photos/[red]/[/nothing].jpg" in call("run", "--input", ".").stderr


@pytest.mark.parametrize(("flag", "shown"), [("-v", False), ("-vv", True)])
def test_a_traceback_is_for_those_who_ask(
    flag: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FruitsDaskError("broken")

    monkeypatch.setattr(pipeline, "run", fail)
    done = call("run", "--input", ".", flag)
    assert ("Traceback" in done.stderr) == shown
    assert "error: broken" in done.stderr


def test_the_handler_of_sigterm_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    call("plan", "--input", str(tmp_path / "absent"))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["reduce", "report", "retry-failed"])
def test_work_on_a_result_that_is_not_there(name: str, tmp_path: Path) -> None:
    done = call(name, "--output", str(tmp_path / "absent"))
    assert done.exit_code == 2
    assert f"there is no result in {tmp_path / 'absent'}" in plain(done.stderr)
    assert names(tmp_path) == set()


def test_a_record_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    record = json.dumps({"format_version": FORMAT_VERSION + 1})
    (tmp_path / "out/run.json").write_text(record, "utf-8")
    done = call("report", "--output", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "use the version that made it" in plain(done.stderr)


# ---------------------------------------------------------------- plan, sample, doctor


def test_a_plan_tells_the_cut_and_stores_the_manifest_alone(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 150)
    done = call("plan", "--input", "in", "--output", "out", "--weights", "fruits")
    assert done.exit_code == 0, done.stderr
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said["manifest"] == str(tmp_path / "out/manifest.parquet")
    assert said["images"].startswith("150, ")
    assert said["labels"] == "2"
    assert said["splits"] == "Test 74, Training 76"
    assert said["partitions"] == "3 of 64 images"
    assert names(tmp_path / "out") == {"manifest.parquet", "run.json"}
    assert "150 images" in done.stderr
    again = call("plan", "--input", "in", "--output", "out", "--weights", "fruits")
    assert "was there before" in again.stdout


def test_a_plan_without_images_fails_and_says_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = call("plan", "--input", "in", "--output", "out", "--weights", "fruits")
    assert done.exit_code == 1
    assert f"found no image below {tmp_path / 'in'}" in plain(done.stderr)


def test_samples_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    done = call("sample", "photos", "--per-label", "1")
    assert done.exit_code == 0, done.stderr
    n_images = n_sample_images(n_per_label=1)
    assert done.stdout == f"{n_images} photos in photos\n"
    files = names(tmp_path / "photos")
    assert len(files) == n_images
    assert all(re.fullmatch(r"(Training|Test)/[^/]+/[^/]+\.jpg", name) for name in files)


def test_samples_need_a_place_and_a_number() -> None:
    assert call("sample").exit_code == 2
    assert call("sample", "photos", "--per-label", "0").exit_code == 2


def test_the_doctor_finds_nothing_wrong_and_leaves_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 5)
    before = snapshot(tmp_path)
    done = call("doctor", "--input", "in", "--output", "out", "--weights", "fruits")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "nothing stands in the way of a run"
    assert "5 images" in done.stdout
    assert "FAIL" not in done.stdout
    assert {name: state[0] for name, state in snapshot(tmp_path).items()} == {
        name: state[0] for name, state in before.items()
    }


def test_the_doctor_tells_all_problems_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(photo(1))
    done = call(
        *("doctor", "--input", "absent", "--output", str(tmp_path / "file" / "out")),
        *("--weights", "absent.h5"),
    )
    assert done.exit_code == 1
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert {"output", "weights"} < set(failed)
    assert len(failed) >= 3
    assert "Traceback" not in done.output


def test_the_doctor_sees_an_output_that_a_run_would_refuse(tmp_path: Path) -> None:
    """What would go wrong, before it does: somebody else's folder, and one inside the input."""
    write_photos(tmp_path / "in", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work", "utf-8")
    for output in ("mine", "in/out"):
        done = call("doctor", "--input", "in", "--output", output, "--weights", "fruits")
        assert done.exit_code == 1, f"{output}: {done.stdout}"
        assert "FAIL" in done.stdout
    assert "in/out" not in " ".join(names(tmp_path))


@pytest.mark.slow
def test_the_module_and_the_script_are_the_same_command(tmp_path: Path) -> None:
    done = command("run", "--dry-run", "--limit", "3", cwd=tmp_path)
    assert done.returncode == 0
    assert "limit = 3  # flag" in done.stdout
    assert done.stderr == ""
    assert command("--nothing", cwd=tmp_path).returncode == 2
