"""A result as a whole: what it was made from, if it may be written, and when it is complete."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import __version__, layout
from .errors import NotFoundError, OutputExistsError, ResultError
from .features import to_json
from .records import FORMAT_VERSION
from .storage import Store, is_temporary

logger = logging.getLogger(__name__)

_RECORD_KEYS = {"fingerprint", "identity", "settings", "stages", "versions"}
_VERSIONED = (
    "fruits_dask",
    "dask",
    "distributed",
    "dask-ml",
    "tensorflow",
    "keras",
    "openvino",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "s3fs",
    "scikit-learn",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What decides the tables of a result. Two runs with equal identities give equal tables."""

    values: dict[str, Any]
    """Name -> value, JSON types only."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the values, hexadecimal."""
        canonical = json.dumps(self.values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def replaced(self, **values: object) -> Identity:
        """Return an identity with some values replaced."""
        return Identity(values={**self.values, **values})


def read_record(store: Store, output: str) -> dict[str, Any] | None:
    """Read ``run.json``.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.

    Returns
    -------
    dict or None
        Its content; None when there is none.

    Raises
    ------
    ResultError
        If it is damaged, or of a newer format than this version knows.
    """
    path = layout.join(output, layout.RUN_JSON)
    try:
        found = json.loads(store.read(path))
    except NotFoundError:
        return None
    except ValueError as exc:
        raise ResultError(f"{path} is damaged ({exc}); start anew with --overwrite") from exc
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        raise ResultError(
            f"{path} is not of format {FORMAT_VERSION}, which this version ({__version__}) writes; "
            "use the version that made it, or --overwrite"
        )
    if missing := _RECORD_KEYS - found.keys():
        raise ResultError(
            f"{path} is damaged: no {', '.join(sorted(missing))}; start anew with --overwrite"
        )
    return found


def write_record(store: Store, output: str, record: Mapping[str, Any]) -> None:
    """Write ``run.json``."""
    store.write(layout.join(output, layout.RUN_JSON), to_json(record))


def new_record(identity: Identity) -> dict[str, Any]:
    """Return the content of ``run.json`` at the start of a run.

    Parameters
    ----------
    identity : Identity
        What decides the tables.

    Returns
    -------
    dict
        With empty records of stages, to be filled while the run goes on.
    """
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": identity.fingerprint,
        "identity": identity.values,
        "settings": {},
        "versions": dict(_versions()),
        "stages": {},
    }


def check_same(found: Mapping[str, Any], identity: Identity, output: str) -> None:
    """Refuse to resume a result that was made in another way.

    Raises
    ------
    OutputExistsError
        If the fingerprints differ; the message names every difference.
    """
    if found.get("fingerprint") == identity.fingerprint:
        return
    old = found.get("identity", {})
    differences = [
        f"  {name}: there {old.get(name)!r}, now {identity.values.get(name)!r}"
        for name in sorted({*old, *identity.values})
        if old.get(name) != identity.values.get(name)
    ]
    raise OutputExistsError(
        f"{output} holds a result of other settings:\n"
        + "\n".join(differences)
        + "\nUse the settings that are there to resume it, give another --output, or --overwrite "
        "to replace it. (`reduce` changes the components alone, without new features)"
    )


def check_ours(names: Collection[str], output: str, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or what is left of a result.

    What lies beside a result is left alone, so it is no reason to refuse its resumption.

    Parameters
    ----------
    names : collection of str
        Everything below the output, relative to it.
    output : str
        Its address.
    overwrite : bool
        The user asked to replace what is there.

    Raises
    ------
    OutputExistsError
        If files that are not of a result would be in the way.
    """
    known = [name for name in names if not (layout.is_ignored_name(name) or is_temporary(name))]
    strange = sorted(name for name in known if not layout.is_result_name(name))
    if strange and (overwrite or layout.RUN_JSON not in known):
        raise OutputExistsError(
            f"{output} holds {len(strange)} files that are not of fruits_dask, such as "
            f"{strange[0]}; give an --output of its own"
        )
    if known and layout.RUN_JSON not in known and not overwrite:
        raise OutputExistsError(
            f"{output} holds {len(known)} files, such as {known[0]}, but no run.json that says "
            "what they are; give another --output, or --overwrite to remove them"
        )


def remove_result(store: Store, output: str) -> None:
    """Remove everything of a result and nothing else."""
    for name in layout.RESULT_NAMES:
        store.remove(layout.join(output, name))


def remove_temporaries(store: Store, output: str, names: Collection[str]) -> None:
    """Remove what local writes of a killed run left behind; `names` is all below the output."""
    for name in names:
        if is_temporary(name) and not layout.is_ignored_name(name):
            store.remove(layout.join(output, name))


def is_complete(store: Store, output: str) -> bool:
    """Tell whether the result is finished."""
    return store.exists(layout.join(output, layout.SUCCESS))


def check_versions(record: dict[str, Any]) -> None:
    """Warn when a result is gone on with by other versions, and note them in the record."""
    known, now = record["versions"], dict(_versions())
    changed = [
        f"{name} {known.get(name)} -> {now[name]}" for name in now if known.get(name) != now[name]
    ]
    if changed:
        logger.warning("this result was begun with other versions: %s", ", ".join(changed))
        record["versions"] = now
        record["earlier_versions"] = [*record.get("earlier_versions", []), known]


def write_success(store: Store, output: str) -> None:
    """Mark the result as complete; nothing is written after this."""
    store.write(layout.join(output, layout.SUCCESS), b"")


def _versions() -> Iterator[tuple[str, str]]:
    for name in _VERSIONED:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
