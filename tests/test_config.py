"""`config`: flag > environment > TOML file > stored result > default, and clear refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from fruits_dask.config import Settings, flag_name, resolve, seconds_of, unknown_environment
from fruits_dask.errors import ConfigError
from fruits_dask.records import StoreOptions

SECRET = "hunter2"  # noqa: S105 - it must not come back


def toml(folder: Path, text: str) -> Path:
    """Write a configuration file."""
    path = folder / "fruits.toml"
    path.write_text(text, "utf-8")
    return path


def test_without_anything_all_is_default() -> None:
    found = resolve()
    assert found.settings == Settings()
    assert set(found.origins) == set(Settings.model_fields)
    assert set(found.origins.values()) == {"default"}


def test_the_defaults_are_those_of_the_design() -> None:
    settings = Settings()
    assert settings.input is None
    assert settings.output == "fruits-output"
    assert settings.components == 100
    assert settings.cluster == "local"
    assert settings.allowed_regions == "eu-*"
    assert settings.dashboard_address.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("places", "limit", "origin"),
    [
        (("stored",), 1, "run.json"),
        (("stored", "file"), 2, "file"),
        (("stored", "file", "environment"), 3, "FRUITS_LIMIT"),
        (("stored", "file", "environment", "flag"), 4, "flag"),
        (("stored", "environment"), 3, "FRUITS_LIMIT"),
        (("file", "flag"), 4, "flag"),
    ],
)
def test_the_stronger_place_wins(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: tuple[str, ...],
    limit: int,
    origin: str,
) -> None:
    file = toml(tmp_path, "limit = 2") if "file" in places else None
    if "environment" in places:
        monkeypatch.setenv("FRUITS_LIMIT", "3")
    flags = {"limit": 4} if "flag" in places else None
    stored = {"limit": 1} if "stored" in places else None
    found = resolve(flags, config_file=file, stored=stored)
    assert found.settings.limit == limit
    assert found.origins["limit"] == (str(file) if origin == "file" else origin)


def test_each_setting_has_its_own_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = toml(tmp_path, 'input = "s3://fruits/photos"\nanonymous = true')
    monkeypatch.setenv("FRUITS_WORKERS", "2")
    found = resolve({"output": "out", "limit": None}, config_file=file)
    assert found.settings.input == "s3://fruits/photos"
    assert found.settings.anonymous is True
    assert found.settings.workers == (2, 2)
    origins = {name: origin for name, origin in found.origins.items() if origin != "default"}
    assert origins == {
        "input": str(file),
        "anonymous": str(file),
        "workers": "FRUITS_WORKERS",
        "output": "flag",
    }


def test_a_flag_that_is_not_given_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_OUTPUT", "there")
    assert resolve({"output": None}).settings.output == "there"


def test_a_false_flag_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_ANONYMOUS", "true")
    found = resolve({"anonymous": False})
    assert found.settings.anonymous is False
    assert found.origins["anonymous"] == "flag"


def test_an_empty_variable_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_LIMIT", "")
    found = resolve()
    assert found.settings.limit is None
    assert found.origins["limit"] == "default"


def test_what_is_stored_can_be_resolved_again() -> None:
    first = resolve({"components": 0.95, "input": "/photos", "max_megapixels": 12}).settings
    again = resolve(stored=first.model_dump(mode="json"))
    assert again.settings == first
    assert set(again.origins.values()) == {"run.json"}


@pytest.mark.parametrize(
    ("name", "near"),
    [("component", "components"), ("ouput", "output"), ("max-megapixels", "max_megapixels")],
)
def test_an_unknown_name_in_a_file_gets_the_nearest(tmp_path: Path, name: str, near: str) -> None:
    file = toml(tmp_path, f'"{name}" = 1')
    with pytest.raises(ConfigError, match=rf"'{name}'; did you mean '{near}'") as caught:
        resolve(config_file=file)
    assert str(file) in str(caught.value)


def test_a_name_like_no_other_gets_no_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no setting 'zzz'$"):
        resolve(config_file=toml(tmp_path, "zzz = 1"))


def test_a_table_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no setting 'run'"):
        resolve(config_file=toml(tmp_path, "[run]\nlimit = 1"))


def test_the_cluster_table_is_as_flat_as_the_rest(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        'limit = 2\n[cluster]\nkind = "ec2"\nn_workers = 3\nsecurity_groups = ["sg-1", "sg-2"]',
    )
    found = resolve({"workers": 4}, config_file=file)
    assert (found.settings.cluster, found.settings.workers) == ("ec2", (4, 4))
    assert found.settings.security_groups == ("sg-1", "sg-2")
    assert found.origins["cluster"] == found.origins["security_groups"] == str(file)


@pytest.mark.parametrize(
    ("given", "workers", "shown"), [(3, (3, 3), 3), ("3", (3, 3), 3), ("2:16", (2, 16), "2:16")]
)
def test_workers_are_a_number_or_a_range(
    monkeypatch: pytest.MonkeyPatch, given: object, workers: tuple[int, int], shown: object
) -> None:
    settings = resolve({"workers": given}).settings
    assert settings.workers == workers
    assert settings.model_dump()["workers"] == shown
    assert resolve(stored=settings.model_dump(mode="json")).settings == settings
    monkeypatch.setenv("FRUITS_WORKERS", str(given))
    assert resolve().settings.workers == workers


@pytest.mark.parametrize("given", ["two", "2:", ":2", "4:2", "0:2", "1:2:3", "2-4"])
def test_workers_that_are_none(given: str) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        resolve({"workers": given})


def test_an_unknown_name_in_the_cluster_table_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'subnet'; did you mean 'subnet_id'"):
        resolve(config_file=toml(tmp_path, '[cluster]\nsubnet = "subnet-1"'))


def test_security_groups_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_SECURITY_GROUPS", "sg-1, sg-2")
    assert resolve().settings.security_groups == ("sg-1", "sg-2")


@pytest.mark.parametrize(
    ("text", "seconds"), [("20 minutes", 1200), ("1 hour", 3600), ("1.5 seconds", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "soon", "0 minutes", "-1 hours", "inf hours", "1 day"])
def test_a_duration_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--idle-timeout"):
        resolve({"idle_timeout": text})


@pytest.mark.parametrize("text", ["limit 2", "limit = \n", "a = 'b"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(ConfigError, match="not a readable TOML file") as caught:
        resolve(config_file=file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        resolve(config_file=tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        resolve(config_file=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"output = 'p\xeache'")
    with pytest.raises(ConfigError, match="not a readable TOML file"):
        resolve(config_file=tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", "many"),
        ("workers", 0),
        ("limit", 0),
        ("limit", 1.5),
        ("output", 5),
        ("output", ["a"]),
        ("engine", "caffe"),
        ("components", "many"),
        ("components", "ten.five"),
        ("components", 0),
        ("components", -3),
        ("components", 1.5),
        ("components", "nan"),
        ("components", float("nan")),
        ("max_failed_share", 2),
        ("max_failed_share", -0.1),
        ("max_megapixels", 0),
        ("concurrent_reads", 1000),
        ("partition_size", 0),
        ("anonymous", "perhaps"),
        ("endpoint_url", "127.0.0.1:9000"),
        ("endpoint_url", "ftp://host"),
        ("endpoint_url", "http://"),
        ("endpoint_url", "http://[::1"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag_and_origin(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({name: value})
    message = str(caught.value)
    assert message.startswith(f"{flag_name(name)} = {value!r} (from flag): ")
    assert len(message.splitlines()) == 1


def test_a_wrong_variable_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_WORKERS", "many")
    with pytest.raises(ConfigError, match=r"--workers = 'many' \(from FRUITS_WORKERS\)"):
        resolve()


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"workers": 0, "limit": 0, "engine": "caffe"})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [(50, 50), ("50", 50), (0.95, 0.95), ("0.95", 0.95), (".5", 0.5), (1, 1), ("1", 1)],
)
def test_components_are_a_number_or_a_share(given: object, expected: float) -> None:
    found = resolve({"components": given}).settings.components
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("text", "expected"), [("64", 64), ("0.9", 0.9)])
def test_components_come_from_the_environment_too(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: float
) -> None:
    monkeypatch.setenv("FRUITS_COMPONENTS", text)
    found = resolve().settings.components
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "flags",
    [
        {"endpoint_url": f"https://user:{SECRET}@host"},
        {"endpoint_url": f"https://{SECRET}@host"},
        {"endpoint_url": f"user:{SECRET}@host"},
        {"endpoint_url": f"https://user:{SECRET}@[host"},
    ],
)
def test_a_password_is_refused_and_not_repeated(flags: Mapping[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(flags)
    assert SECRET not in str(caught.value)
    assert "--endpoint-url" in str(caught.value)


def test_a_variable_with_a_typo_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_COMPONENT", "5")
    monkeypatch.setenv("FRUITS_QQQQQQQQ", "5")
    monkeypatch.setenv("FRUITS_LIMIT", "5")
    monkeypatch.setenv("fruits_ouput", "5")
    assert unknown_environment() == {
        "FRUITS_COMPONENT": "FRUITS_COMPONENTS",
        "FRUITS_QQQQQQQQ": "",
        "fruits_ouput": "FRUITS_OUTPUT",
    }


def test_a_lower_case_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("fruits_limit", "7")
    assert unknown_environment() == {}
    assert resolve().settings.limit == 7


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().limit = 3  # type: ignore[misc]


def test_settings_themselves_do_not_look_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRUITS_LIMIT", "3")
    assert Settings().limit is None


@pytest.mark.parametrize(
    ("cluster", "profile"),
    [("local", "p"), ("tls://host:8786", "p"), ("ec2", None), ("team", None)],
)
def test_a_profile_is_not_for_rented_machines(cluster: str, profile: str | None) -> None:
    settings = resolve({"cluster": cluster, "profile": "p"}).settings
    assert settings.worker_store_options.profile == profile
    assert settings.store_options.profile == "p"


def test_store_options_hold_the_way_to_s3() -> None:
    flags = {"endpoint_url": "http://127.0.0.1:1", "profile": "p", "anonymous": True}
    options = resolve({**flags, "requester_pays": True}).settings.store_options
    assert options == StoreOptions(
        endpoint_url="http://127.0.0.1:1", profile="p", anonymous=True, requester_pays=True
    )


def test_every_setting_has_a_flag_and_a_description() -> None:
    assert flag_name("max_failed_share") == "--max-failed-share"
    assert all(field.description for field in Settings.model_fields.values())
