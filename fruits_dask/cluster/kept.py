"""Clusters that are kept for several runs: how to reach them, on this machine alone.

The file holds the certificates of a cluster, and is readable by its owner alone.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from distributed.security import Security

_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_TLS = ("tls_ca_file", "tls_client_key", "tls_client_cert")  # what a client shows and asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCluster:
    """How to reach a cluster, and what it costs."""

    name: str
    """As the user called it."""
    region: str
    """Where it is."""
    address: str
    """Of its scheduler."""
    n_threads: int
    """Threads of the engine in each worker process."""
    hourly: float | None
    """Price of an hour, where it is known."""
    max_hours: float
    """After which its machines end."""
    start: float
    """When it was rented, seconds since 1970."""
    idle_seconds: float
    """Without work for this long it ends."""
    tls: dict[str, str]
    """Certificates and keys."""

    @property
    def security(self) -> Security:
        """Certificates as Dask wants them."""
        from distributed.security import Security  # noqa: PLC0415 - slow; a name needs none of it

        return Security(require_encryption=True, **self.tls)


def check_name(name: str) -> None:
    """Refuse a name that cannot be that of a cluster.

    Raises
    ------
    ConfigError
        Saying what can.
    """
    if not _NAME.fullmatch(name) or name in ("local", "ec2") or name.startswith("run-"):
        raise ConfigError(
            f"{name!r} cannot be the name of a cluster: expected a letter, then letters, digits "
            "and -, 31 at most, and none of local, ec2, run-..."
        )


def certificates(security: Security) -> dict[str, str]:
    """Take the certificates and keys out of `security`."""
    return {name: str(getattr(security, name)) for name in _TLS}


def save(cluster: KeptCluster) -> Path:
    """Write down how to reach a cluster; return the file."""
    path = _path(cluster.name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        json.dump(asdict(cluster), stream)
    return path


def is_kept(name: str) -> bool:
    """Tell whether this machine knows how to reach a cluster of that name."""
    return _NAME.fullmatch(name) is not None and _path(name).is_file()


def load(name: str) -> KeptCluster:
    """Read how to reach a cluster.

    Raises
    ------
    ClusterError
        If the file is not of this version.
    """
    try:
        return KeptCluster(**json.loads(_path(name).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise ClusterError(
            f"{_path(name)} does not say how to reach the cluster {name} ({exc}); `cluster down "
            f"{name}` gives it back"
        ) from exc


def forget(name: str) -> None:
    """Remove what `save` wrote, if it is there."""
    if _NAME.fullmatch(name):
        _path(name).unlink(missing_ok=True)


def _path(name: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state, "fruits_dask", "clusters", f"{name}.json")
