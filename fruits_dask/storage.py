"""Bytes in and out: local folders and s3://, the only home of fsspec and s3fs.

Addresses are plain strings: ``s3://bucket/key`` or an absolute local path. Whole objects are
written in one step, so a reader sees an object complete or not at all: locally under a temporary
name that is then renamed, on S3 with a single PUT (or a multipart upload, which appears on
completion).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .errors import AccessDeniedError, ConfigError, NotFoundError, StorageError
from .records import ObjectInfo, StoreOptions

if TYPE_CHECKING:
    from types import TracebackType

    from s3fs import S3FileSystem

logger = logging.getLogger(__name__)

S3_PREFIX = "s3://"
_TEMPORARY_SUFFIX = ".fruits-tmp"
_LIST_PAGE_KEYS = 1000
_SINGLE_PUT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """What a store tells of one of our own files."""

    name: str
    """Path relative to the folder that was listed."""
    size_bytes: int
    """Length in bytes."""
    modified_seconds: float
    """Time of the last write, by the clock of the store, in seconds since 1970."""


class Store(Protocol):
    """Whole objects below addresses; the seam between this package and where bytes live."""

    def list_images(self, root: str, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
        """Stream the objects below `root` whose names end in one of `suffixes`."""

    def list_folder(self, folder: str) -> list[StoredObject]:
        """Return every object below `folder`; an absent folder is an empty one."""

    def read(self, path: str) -> bytes:
        """Return the whole object, with one request."""

    def open(self, path: str) -> IO[bytes]:
        """Open an object for random access."""

    def write(self, path: str, data: bytes) -> None:
        """Write a whole object in one step."""

    def upload(self, local_file: Path, path: str) -> None:
        """Move a local file to `path` in one step."""

    def exists(self, path: str) -> bool:
        """Tell whether there is an object at `path`."""

    def remove(self, path: str) -> None:
        """Remove an object, or a folder with all below it; absent is fine."""

    def prune(self, folder: str) -> None:
        """Remove a folder if it is empty."""

    def region(self, path: str) -> str | None:
        """Name of the region where the bytes are, or None when the store does not say."""


def is_s3(path: str) -> bool:
    """Tell whether an address is on S3."""
    return path.startswith(S3_PREFIX)


def normalize(address: str) -> str:
    """Bring an address to its one spelling.

    Parameters
    ----------
    address : str
        ``s3://bucket/prefix``, ``file:///folder`` or a local path.

    Returns
    -------
    str
        ``s3://bucket/prefix`` without a trailing slash, or an absolute local path.

    Raises
    ------
    ConfigError
        For any other kind of address.
    """
    if is_s3(address):
        bucket = address.removeprefix(S3_PREFIX).partition("/")[0]
        if not bucket:
            raise ConfigError(f"{address!r} names no bucket; expected s3://bucket/prefix")
        return address.rstrip("/")
    scheme = urlsplit(address).scheme if "://" in address else ""
    if scheme not in ("", "file"):
        shown = re.sub("//[^/]*@", "//***@", address)  # there may be a password
        raise ConfigError(f"{shown!r} is not supported; give a local folder or s3://bucket/prefix")
    local = _file_url_path(address) if scheme else address
    path = os.path.abspath(Path(local).expanduser())  # noqa: PTH100 - keeps symlinks
    try:
        path.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{path!r} is no valid UTF-8; rename the folder") from exc
    return path


def real_path(address: str) -> str:
    """Return an address with the links in it followed; an s3:// address as it is."""
    return address if is_s3(address) else os.path.realpath(address)


def _file_url_path(address: str) -> str:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{address!r} is on another machine; give a local folder or s3://")
    return url2pathname(parts.path)


def open_store(address: str, options: StoreOptions) -> Store:
    """Return the store that holds an address.

    Parameters
    ----------
    address : str
        A normalized address.
    options : StoreOptions
        How to reach S3.

    Returns
    -------
    Store
        The same object for the same arguments, within one process.
    """
    return _s3_store(options) if is_s3(address) else LocalStore()


@functools.cache
def _s3_store(options: StoreOptions) -> S3Store:
    return S3Store(options)


class ReadAhead:
    """Read objects in order, a bounded number of them ahead of the consumer.

    Iterating yields ``(path, bytes or the StorageError)``. Use it as a context manager, so that the
    threads end with the work.

    Parameters
    ----------
    store : Store
        Where the objects are.
    paths : iterable of str
        Addresses, read in this order.
    n_concurrent : int
        Requests under way at a time; also how many objects are held in memory.
    """

    def __init__(self, store: Store, paths: Iterable[str], *, n_concurrent: int) -> None:
        self._store = store
        self._paths = iter(paths)
        self._n_concurrent = n_concurrent
        self._pool = ThreadPoolExecutor(n_concurrent, thread_name_prefix="read")
        self._pending: deque[tuple[str, Future[bytes]]] = deque()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[str, bytes | StorageError]]:
        while self._fill():
            path, future = self._pending.popleft()
            try:
                yield path, future.result()
            except StorageError as exc:
                yield path, exc

    def _fill(self) -> bool:
        while len(self._pending) < self._n_concurrent:
            path = next(self._paths, None)
            if path is None:
                break
            self._pending.append((path, self._pool.submit(self._store.read, path)))
        return bool(self._pending)


class LocalStore:
    """Folders of this machine, or of a disk that all workers mount."""

    def list_images(self, root: str, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
        """Stream the image files below a folder in byte order of their paths.

        Links to folders are followed, except those that lead back to a folder they are in.
        """
        if not Path(root).is_dir():
            raise NotFoundError(f"there is no folder {root}; check the spelling of the input")
        yield from _walk(root, suffixes, ancestors=())

    def list_folder(self, folder: str) -> list[StoredObject]:
        """Return every file below `folder`, sorted by name."""
        found = []
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # removed while we list
                    status = path.stat()
                    relative = path.relative_to(folder).as_posix()
                    found.append(_stored(relative, status.st_size, status.st_mtime))
        return sorted(found, key=lambda item: item.name)

    def read(self, path: str) -> bytes:
        """Return the content of a regular file."""
        with _local_errors(path), open(path, "rb", opener=_open_at_once) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise StorageError(f"{path} is not a regular file")
            return stream.read()

    def open(self, path: str) -> IO[bytes]:
        """Open a file for random access."""
        with _local_errors(path):
            return Path(path).open("rb")

    def write(self, path: str, data: bytes) -> None:
        """Write under a temporary name, then rename."""
        with self._replacing(path) as temporary, temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def upload(self, local_file: Path, path: str) -> None:
        """Move a local file to `path`."""
        with self._replacing(path) as temporary:
            shutil.move(local_file, temporary)

    def exists(self, path: str) -> bool:
        """Tell whether there is a file at `path`."""
        return Path(path).is_file()

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all below it."""
        with _local_errors(path), contextlib.suppress(FileNotFoundError):
            if Path(path).is_dir() and not Path(path).is_symlink():
                shutil.rmtree(path)
            else:
                Path(path).unlink()

    def prune(self, folder: str) -> None:
        """Remove a folder if it is empty."""
        with contextlib.suppress(OSError):
            Path(folder).rmdir()

    def region(self, path: str) -> str | None:
        """Local files stay on this machine, which has no region."""
        return None

    @contextlib.contextmanager
    def _replacing(self, path: str) -> Iterator[Path]:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY_SUFFIX}")
        with _local_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _open_at_once(path: str, flags: int) -> int:
    # A FIFO would wait for somebody who writes into it.
    return os.open(path, flags | os.O_NONBLOCK)


def is_temporary(name: str) -> bool:
    """Tell whether a file name is one that an unfinished local write left behind."""
    return name.endswith(_TEMPORARY_SUFFIX)


def _stored(name: str, size_bytes: int, modified_seconds: float) -> StoredObject:
    return StoredObject(name=name, size_bytes=size_bytes, modified_seconds=modified_seconds)


def _byte_order(entry: os.DirEntry[str]) -> bytes:
    # A folder sorts as its name with a slash, so that the walk comes out in the byte order of whole
    # paths, which is the order in which S3 lists keys.
    return os.fsencode(entry.name + "/" if _holds(entry.is_dir) else entry.name)


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except OSError:  # a link to itself is neither file nor folder
        return False


def _walk(
    folder: str, suffixes: tuple[str, ...], ancestors: tuple[tuple[int, int], ...]
) -> Iterator[ObjectInfo]:
    with _local_errors(folder), os.scandir(folder) as entries:
        status = Path(folder).stat()
        found = sorted(entries, key=_byte_order)
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        logger.warning("%s leads back to a folder it is in; not followed", folder)
        return
    for entry in found:
        if _holds(entry.is_dir):
            yield from _walk(entry.path, suffixes, (*ancestors, identity))
        elif _holds(entry.is_file) and entry.name.lower().endswith(suffixes):
            with contextlib.suppress(FileNotFoundError):  # removed while we list
                yield _local_object(entry)


def _local_object(entry: os.DirEntry[str]) -> ObjectInfo:
    status = entry.stat()
    # A name that is no valid UTF-8 cannot be stored in a table; written with escapes it is listed,
    # cannot be read, and so ends in failures/ where the user sees it.
    path = os.fsencode(entry.path).decode("utf-8", "backslashreplace")
    etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(path=path, etag=etag, size_bytes=status.st_size)


@contextlib.contextmanager
def _local_errors(path: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as exc:
        raise NotFoundError(f"{path} is not there (any more)") from exc
    except PermissionError as exc:
        raise AccessDeniedError(f"no permission for {path}; check its owner and mode") from exc
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise StorageError(f"{path}: {reason}") from exc


@functools.cache
def _file_system_class() -> type[S3FileSystem]:
    from s3fs import S3FileSystem  # noqa: PLC0415 - s3fs takes 0.5 s, local runs need it not

    class PlainKeys(S3FileSystem):  # type: ignore[misc]
        """Takes ``?versionId=`` in a key for what it is, a part of the key."""

        def split_path(self, path: str) -> tuple[str, str, None]:
            return (*_split(path), None)

    return PlainKeys


class S3Store:
    """S3, or a service that speaks its protocol.

    Parameters
    ----------
    options : StoreOptions
        Endpoint, profile and kind of access. Keys come from the usual AWS places only.
    """

    def __init__(self, options: StoreOptions) -> None:
        self._options = options

    @functools.cached_property
    def _fs(self) -> S3FileSystem:
        options = self._options
        # Not `requester_pays=True`: before s3fs 2026.9 its cat_file forgets to send the header.
        payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        return _file_system_class()(
            anon=options.anonymous,
            endpoint_url=options.endpoint_url,
            profile=options.profile,
            use_listings_cache=False,
            s3_additional_kwargs=payer,
            config_kwargs={
                "connect_timeout": 10,
                "read_timeout": 30,
                "max_pool_connections": 64,
                # s3fs tries five times around these.
                "retries": {"mode": "standard", "max_attempts": 3},
            },
        )

    def list_images(self, root: str, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
        """Stream the image objects below a prefix; one LIST for every 1,000 keys."""
        bucket = _split(root)[0]
        for item in self._list(root):
            key = str(item["Key"])
            if key.lower().endswith(suffixes):
                yield ObjectInfo(
                    path=f"{S3_PREFIX}{bucket}/{key}",
                    etag=str(item["ETag"]).strip('"'),
                    size_bytes=int(item["Size"]),
                )

    def list_folder(self, folder: str) -> list[StoredObject]:
        """Return every object below a prefix, sorted by name."""
        start = len(_split(folder)[1].rstrip("/")) + 1 if _split(folder)[1] else 0
        found = [
            _stored(str(item["Key"])[start:], int(item["Size"]), _seconds(item.get("LastModified")))
            for item in self._list(folder)
        ]
        return sorted(found, key=lambda item: item.name)

    def read(self, path: str) -> bytes:
        """Return the content of an object, with one GET."""
        with _s3_errors(path):
            # One stream: more would ask for the size first, a second request for every image.
            return cast("bytes", self._fs.cat_file(path, max_concurrency=1))

    def open(self, path: str) -> IO[bytes]:
        """Open an object for random access through ranged GETs."""
        with _s3_errors(path):
            payer = self._options.requester_pays
            stream = self._fs.open(path, "rb", cache_type="none", requester_pays=payer)
        return cast("IO[bytes]", _Reader(path, stream))

    def write(self, path: str, data: bytes) -> None:
        """Write with a single PUT, or a multipart upload for large data."""
        with _s3_errors(path):
            self._fs.pipe_file(path, data)

    def upload(self, local_file: Path, path: str) -> None:
        """Upload a local file and remove it."""
        if local_file.stat().st_size <= _SINGLE_PUT_BYTES:
            self.write(path, local_file.read_bytes())
        else:
            with _s3_errors(path):
                self._fs.put_file(str(local_file), path)
        local_file.unlink()

    def exists(self, path: str) -> bool:
        """Tell whether there is an object at `path`."""
        bucket, key = _split(path)
        with _s3_errors(path):
            try:
                self._fs.call_s3("head_object", Bucket=bucket, Key=key)
            except FileNotFoundError:
                return False
        return True

    def remove(self, path: str) -> None:
        """Remove the object at `path` and all objects below it."""
        bucket, key = _split(path)
        keys = [key, *(f"{key}/{item.name}" for item in self.list_folder(path))]
        with _s3_errors(path):
            for start in range(0, len(keys), _LIST_PAGE_KEYS):
                objects = [{"Key": item} for item in keys[start : start + _LIST_PAGE_KEYS]]
                answer = self._fs.call_s3(
                    "delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True}
                )
                _check_deleted(bucket, answer)

    def prune(self, folder: str) -> None:
        """Do nothing: on S3 there are no empty folders."""

    def region(self, path: str) -> str | None:
        """Region of the bucket, as its own service states it."""
        bucket = _split(path)[0]
        with _s3_errors(f"{S3_PREFIX}{bucket}"):
            answer = self._fs.call_s3("head_bucket", Bucket=bucket)
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return answer.get("BucketRegion") or headers.get("x-amz-bucket-region") or None

    def _list(self, folder: str) -> Iterator[dict[str, Any]]:
        bucket, key = _split(folder)
        prefix = f"{key.rstrip('/')}/" if key else ""
        token: dict[str, str] = {}
        while True:
            with _s3_errors(folder):
                page = self._fs.call_s3(
                    "list_objects_v2",
                    Bucket=bucket,
                    Prefix=prefix,
                    MaxKeys=_LIST_PAGE_KEYS,
                    **token,
                )
            yield from page.get("Contents", [])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}


def _check_deleted(bucket: str, answer: dict[str, Any]) -> None:
    """Raise what a DeleteObjects request, which as a whole succeeds, says of single keys."""
    for error in answer.get("Errors", []):
        path, code = f"{S3_PREFIX}{bucket}/{error.get('Key')}", error.get("Code")
        if code == "AccessDenied":
            raise AccessDeniedError(f"{path} could not be removed: {code}; check your permissions")
        raise StorageError(f"{path} could not be removed: {code}")


class _Reader(io.RawIOBase):
    """An open object whose errors are translated."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        with _s3_errors(self._path):
            return self._stream.read(size)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _seconds(modified: object) -> float:
    timestamp = getattr(modified, "timestamp", None)
    return float(timestamp()) if timestamp else time.time()


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix(S3_PREFIX).partition("/")
    return bucket, key


@contextlib.contextmanager
def _s3_errors(path: str) -> Iterator[None]:
    """Translate what s3fs, botocore and aiohttp raise."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as exc:
        raise NotFoundError(f"{path} is not there (any more)") from exc
    except PermissionError as exc:
        raise AccessDeniedError(
            f"access to {path} was denied ({exc}); check the policy of the bucket and your keys"
        ) from exc
    except OSError as exc:
        raise StorageError(f"{path}: {exc}") from exc
    except Exception as exc:
        translated = _botocore_error(path, exc)
        if translated is None:
            raise
        raise translated from exc


def _botocore_error(path: str, exc: Exception) -> StorageError | None:
    from aiohttp import ClientError as HttpError  # noqa: PLC0415 - only when something failed
    from botocore import exceptions  # noqa: PLC0415

    if isinstance(exc, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return AccessDeniedError(
            f"no AWS credentials found for {path}; set AWS_PROFILE or --profile, log in with "
            "`aws configure`, or give --anonymous for a public bucket"
        )
    if isinstance(exc, exceptions.EndpointConnectionError | exceptions.ConnectTimeoutError):
        return StorageError(f"{path}: {exc} Check the network and --endpoint-url.")
    known = exceptions.BotoCoreError | exceptions.ClientError | HttpError | TimeoutError
    return StorageError(f"{path}: {exc}") if isinstance(exc, known) else None
