"""Settings, resolved once: flag > environment > TOML file > stored result > default."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from .errors import ConfigError
from .records import StoreOptions

ENV_PREFIX = "FRUITS_"

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
        "local", description="local, or the address of a Dask scheduler (tcp:// or tls://)"
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Worker processes of the local cluster (default: from cores and memory)"
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
        "eu-*", description="Regions where buckets may be, comma-separated patterns"
    )

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
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(f"there is no configuration file {path}") from exc
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"{path} is not a readable TOML file: {exc}") from exc


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
