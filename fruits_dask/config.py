"""Settings, resolved once: flag > environment > TOML file > stored result > default."""

from __future__ import annotations

import difflib
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_serializer, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from .errors import ConfigError
from .records import StoreOptions

ENV_PREFIX = "FRUITS_"

# How the address of a Dask scheduler begins.
ADDRESS_PREFIXES = ("tcp://", "tls://")
# A table of this name in a TOML file groups what cluster it is; its settings are as flat as the
# rest.
_CLUSTER_TABLE = "cluster"
_IN_TABLE = {"kind": "cluster", "n_workers": "workers"}
# Settings that are about rented machines alone.
RENTED_SETTINGS = (
    *("region", "availability_zone", "vpc", "subnet_id", "security_groups", "client_cidr"),
    *("ami", "instance_type", "scheduler_instance_type", "worker_instance_type", "docker_image"),
    *("iam_instance_profile", "use_private_ip", "spot", "key_name", "filesystem_size"),
    *("instance_tags", "processes_per_worker", "start_timeout", "idle_timeout", "max_hours"),
    *("max_cost", "hourly_prices"),
)
_SECONDS_OF_UNIT = {"second": 1.0, "minute": 60.0, "hour": 3600.0}

NWorkers = Annotated[int, Field(ge=1, le=1024)]
Components = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]


class Settings(BaseSettings):
    """Everything that a user can choose; the descriptions are also the help of the flags."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    input: str | None = Field(
        None,
        min_length=1,
        description="Folder or s3:// prefix of the photos (default: generated sample photos)",
    )
    output: str = Field(
        "fruits-output", min_length=1, description="Folder or s3:// prefix of the result"
    )
    weights: str | None = Field(
        None,
        min_length=1,
        description="imagenet, fruits, or a Keras weights file (local or s3://) "
        "(default: imagenet; fruits for the sample photos)",
    )
    backbone: str | None = Field(
        None, description="Network that makes the features (default: the one of the weights)"
    )
    engine: Literal["tensorflow", "openvino"] = Field(
        "tensorflow",
        description="What runs the network: tensorflow, or openvino (faster, an extra package)",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="float32, or bf16: faster and less exact, with --engine openvino on CPUs "
        "that have bfloat16",
    )
    components: Components = Field(
        100, description="Principal components: a number, or a share of the variance such as 0.95"
    )
    reducer: Literal["incremental", "exact"] = Field(
        "incremental",
        description="How the components are fitted: incremental (dask-ml's IncrementalPCA), or "
        "exact (from the covariance of all rows)",
    )
    cluster: str = Field(
        "local",
        description="local, ec2 (machines are rented, and given back), or the address of a Dask "
        "scheduler (tcp:// or tls://)",
    )
    workers: Annotated[tuple[NWorkers, NWorkers] | None, NoDecode] = Field(
        None,
        description="Worker processes of the local cluster (default: from cores and memory), or "
        "machines to rent (default: 2); MIN:MAX rents as many as there is work for",
    )
    memory_limit: str | None = Field(
        None, description="Memory of one local worker, such as 4GiB (default: an equal share)"
    )
    dashboard_address: str = Field(
        "127.0.0.1:8787", description="Where the local cluster serves its dashboard"
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Take at most this many photos, balanced over the labels"
    )
    partition_size: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="Photos of one task (default: from the number of photos)"
    )
    concurrent_reads: int = Field(
        16, ge=1, le=256, description="Photos that one worker reads at a time"
    )
    max_megapixels: float = Field(
        64.0, gt=0, le=1000, description="Larger photos are not decoded but listed as failures"
    )
    max_failed_share: float = Field(
        0.01, ge=0, le=1, description="Share of failed photos above which the exit code is 3"
    )
    endpoint_url: str | None = Field(
        None, description="Address of an S3-compatible service (default: AWS)"
    )
    profile: str | None = Field(None, description="Profile in the AWS configuration files")
    anonymous: bool = Field(False, description="Send unsigned requests, for public buckets")
    requester_pays: bool = Field(False, description="Agree to pay for requests and transfer")
    allowed_regions: str = Field(
        "eu-*",
        description="Regions where buckets and rented machines may be, comma-separated patterns",
    )
    region: str | None = Field(
        None, min_length=1, description="Region of rented machines (default: that of the input)"
    )
    availability_zone: str | None = Field(
        None, description="Zone of rented machines (default: that of the subnet)"
    )
    vpc: str | None = Field(None, description="Network of rented machines (default: the default)")
    subnet_id: str | None = Field(
        None, description="Subnet of rented machines (default: the first one of the network)"
    )
    security_groups: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Firewall of rented machines, comma-separated (default: one is made, which "
        "admits the cluster itself and this machine, and goes with it)",
    )
    client_cidr: str | None = Field(
        None,
        description="Addresses that the made firewall admits, such as 10.1.2.3/32 (default: the "
        "address of this machine)",
    )
    ami: str = Field(
        "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
        description="Machine image, or the name of an SSM parameter that holds it; Ubuntu",
    )
    instance_type: str = Field("c7i.xlarge", description="Kind of the machines that are rented")
    scheduler_instance_type: str | None = Field(
        None, description="Kind of the scheduler's machine (default: instance_type)"
    )
    worker_instance_type: str | None = Field(
        None, description="Kind of the workers' machines (default: instance_type)"
    )
    docker_image: str | None = Field(
        None,
        description="Image with this package, REPOSITORY:TAG; `cluster tag` prints the tag that "
        "fits this machine",
    )
    iam_instance_profile: str | None = Field(
        None, description="Instance profile, by name or ARN, through which machines reach S3"
    )
    use_private_ip: bool = Field(
        True, description="Reach the machines inside their network; false rents public addresses"
    )
    spot: bool = Field(False, description="Rent spare capacity, cheaper and taken back at will")
    key_name: str | None = Field(None, description="SSH key of rented machines")
    filesystem_size: int = Field(40, ge=8, le=16_384, description="Disk of a machine, GB")
    instance_tags: dict[str, str] = Field(
        default_factory=dict, description="More tags of everything that is rented"
    )
    processes_per_worker: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="Worker processes on a rented machine (default: one a core)"
    )
    start_timeout: str = Field("15 minutes", description="How long rented machines may take")
    idle_timeout: str = Field(
        "20 minutes", description="Without work for this long, rented machines end by themselves"
    )
    max_hours: float = Field(
        12.0, gt=0, le=168, description="After this many hours rented machines end in any case"
    )
    max_cost: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Stop before rented machines cost more; the next run resumes. In the currency "
        "of hourly_prices",
    )
    hourly_prices: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Price of an hour of an instance type, by its name"
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: object) -> object:
        if value is None or isinstance(value, list | tuple):
            return value
        low, colon, high = str(value).partition(":")
        try:
            found = (int(low), int(high if colon else low))
        except ValueError:
            raise ValueError("expected a whole number, or MIN:MAX such as 2:16") from None
        if found[0] > found[1]:
            raise ValueError("expected MIN:MAX with the smaller number first")
        return found

    @field_serializer("workers")
    def _as_given(self, value: tuple[int, int] | None) -> int | str | None:
        if value is None:
            return None
        low, high = value
        return low if low == high else f"{low}:{high}"

    @field_validator("security_groups", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("start_timeout", "idle_timeout")
    @classmethod
    def _duration(cls, value: str) -> str:
        seconds_of(value)
        return value

    @field_validator("components", mode="before")
    @classmethod
    def _number_or_share(cls, value: object) -> object:
        try:
            text = str(value)
            number = float(text) if "." in text else int(text)
        except (TypeError, ValueError):
            number = 0
        if number < 1 and not 0 < number < 1:
            raise ValueError("expected a whole number from 1, or a share between 0 and 1")
        return number

    @field_validator("precision")
    @classmethod
    def _fits_engine(cls, value: str, info: ValidationInfo) -> str:
        if value != "float32" and info.data.get("engine") != "openvino":
            raise ValueError("is for --engine openvino alone")
        return value

    @field_validator("endpoint_url")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("expected http://HOST:PORT or https://HOST")
            if parts.username or parts.password:
                raise ValueError("must not carry a user name or password")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take the values as given; `resolve` reads the sources, because it keeps their names."""
        return (init_settings,)

    @property
    def store_options(self) -> StoreOptions:
        """How to reach the stores of the input and the output."""
        return StoreOptions(
            endpoint_url=self.endpoint_url,
            profile=self.profile,
            anonymous=self.anonymous,
            requester_pays=self.requester_pays,
        )

    @property
    def is_rented(self) -> bool:
        """Tell whether the workers are on machines that this package rents."""
        return self.cluster != "local" and not self.cluster.startswith(ADDRESS_PREFIXES)

    @property
    def worker_store_options(self) -> StoreOptions:
        """How workers reach them: rented machines have roles, and no profile of this user."""
        options = self.store_options
        return replace(options, profile=None) if self.is_rented else options


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Settings with the place that each value came from."""

    settings: Settings
    """The values."""
    origins: dict[str, str]
    """Name of a setting -> ``flag``, ``FRUITS_...``, a file, ``run.json`` or ``default``."""


def resolve(
    flags: Mapping[str, object] | None = None,
    *,
    config_file: Path | None = None,
    stored: Mapping[str, object] | None = None,
) -> Resolved:
    """Merge the settings of all places.

    Parameters
    ----------
    flags : mapping of str to object, optional
        Values from the command line; None means not given.
    config_file : Path, optional
        A TOML file with any of the settings.
    stored : mapping of str to object, optional
        Settings of a result that is worked on again, weaker than the other three.

    Returns
    -------
    Resolved
        The values and where each came from.

    Raises
    ------
    ConfigError
        If a name is unknown or a value is not acceptable.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    layers: list[tuple[str, Mapping[str, object]]] = [
        ("run.json", stored or {}),
        (str(config_file), _read_toml(config_file) if config_file else {}),
        ("environment", _read_environment()),
        ("flag", given),
    ]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    for name_of_layer, layer in layers:
        for name, value in layer.items():
            _check_name(name, name_of_layer)
            values[name] = value
            origins[name] = _env_name(name) if name_of_layer == "environment" else name_of_layer
    return Resolved(settings=_validate(values, origins), origins=origins)


def seconds_of(duration: str) -> float:
    """Read a duration such as ``20 minutes``.

    Raises
    ------
    ValueError
        If it is none.
    """
    number, _, unit = duration.strip().partition(" ")
    try:
        seconds = float(number) * _SECONDS_OF_UNIT[unit.strip().rstrip("s")]
    except (KeyError, ValueError) as exc:
        raise ValueError("expected a duration such as '20 minutes'") from exc
    if not 0 < seconds < math.inf:
        raise ValueError("expected a duration above zero")
    return seconds


def flag_name(setting: str) -> str:
    """Spelling of a setting on the command line, such as ``--max-failed-share``."""
    return "--" + setting.replace("_", "-")


def unknown_environment() -> dict[str, str]:
    """Find ``FRUITS_`` variables that name no setting, each with the nearest known name.

    Returns
    -------
    dict of str to str
        Variable -> nearest variable that exists, or an empty string.
    """
    known = [_env_name(name) for name in Settings.model_fields]
    strange = [n for n in os.environ if n.upper().startswith(ENV_PREFIX) and n.upper() not in known]
    return {n: next(iter(difflib.get_close_matches(n.upper(), known, 1)), "") for n in strange}


def _env_name(setting: str) -> str:
    return ENV_PREFIX + setting.upper()


def _read_environment() -> dict[str, Any]:
    try:
        return EnvSettingsSource(Settings)()
    except SettingsError as exc:
        raise ConfigError(f"environment: {exc}") from exc


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return _flat(tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError as exc:
        raise ConfigError(f"there is no configuration file {path}") from exc
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"{path} is not a readable TOML file: {exc}") from exc


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of the table [cluster] beside the others."""
    table = content.get(_CLUSTER_TABLE)
    if not isinstance(table, dict):
        return content
    rest = {name: value for name, value in content.items() if name != _CLUSTER_TABLE}
    return rest | {_IN_TABLE.get(str(name), str(name)): value for name, value in table.items()}


def _check_name(name: str, layer: str) -> None:
    if name not in Settings.model_fields:
        near = difflib.get_close_matches(name, Settings.model_fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{layer}: there is no setting {name!r}{hint}")


def _validate(values: dict[str, Any], origins: dict[str, str]) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as exc:
        raise ConfigError("\n".join(_describe(exc, origins))) from exc


def _describe(exc: ValidationError, origins: dict[str, str]) -> list[str]:
    """One line a setting: a value with two allowed types would otherwise be two errors."""
    lines: dict[str, list[str]] = {}
    found: dict[str, object] = {}
    for error in exc.errors(include_url=False, include_context=False):
        name = str(error["loc"][0])
        lines.setdefault(name, []).append(error["msg"].removeprefix("Value error, "))
        # What looks like an address with a password is not repeated in a message.
        found[name] = "***" if "@" in str(error["input"]) else error["input"]
    return [
        f"{flag_name(name)} = {found[name]!r} (from {origins[name]}): {', or '.join(messages)}"
        for name, messages in lines.items()
    ]
