"""`storage`: one contract for all stores, then what is special of local folders and of S3."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from s3fs import S3FileSystem

from conftest import Place
from fruits_dask.errors import AccessDeniedError, ConfigError, NotFoundError, StorageError
from fruits_dask.records import IMAGE_SUFFIXES, StoreOptions
from fruits_dask.storage import (
    LocalStore,
    ReadAhead,
    S3Store,
    is_s3,
    is_temporary,
    normalize,
    open_store,
)
from servers import Answer, RecordingMoto, Request, S3rver, S3Service

KEYS = {
    "space": "Apple Golden 1/r 0.jpg",
    "leading space": " a.jpg",
    "accent": "p\u00eache/\u00e9.jpg",
    "decomposed accent": "pe\u0302che/e\u0301.jpg",
    "plus": "a+b c.jpg",
    "percent": "100%.jpg",
    "percent code": "%2F%41.jpg",
    "hash": "a#b.jpg",
    "question mark": "what?.jpg",
    "query": "a?x=1&y=2.jpg",
    "version query": "a?versionId=b.jpg",
    "emoji": "\U0001f34e.jpg",
    "quotes": 'it\'s "so".jpg',
    "leading dot": ".hidden/.a.jpg",
    "leading dots": "..a.jpg",
    "wildcards": "[x]*{a,b}.jpg",
    "backslash": "a\\b.jpg",
    "colon": "12:30.jpg",
    "angle": "<x>&amp;.jpg",
    "tilde": "~a.jpg",
    "tab": "a\tb.jpg",
}
N_AHEAD = 4
REFUSED_WITHIN_SECONDS = 15
HANG_SECONDS = 2
EVERYONE_MAY = (
    '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*","Action":"s3:*",'
    '"Resource":["arn:aws:s3:::%s","arn:aws:s3:::%s/*"]}]}'
)


@pytest.mark.parametrize("name", KEYS.values(), ids=KEYS.keys())
def test_any_name_makes_the_round_trip(place: Place, name: str) -> None:
    path = place.at(name)
    place.store.write(path, name.encode())
    assert place.store.read(path) == name.encode()
    assert place.store.exists(path)
    assert place.names() == [name]
    assert [item.path for item in place.store.list_images(place.root, (".jpg",))] == [path]
    with place.store.open(path) as stream:
        assert stream.read() == name.encode()
    place.fill("other")
    place.store.remove(path)
    assert place.names() == ["other"]


def test_an_absent_object_is_not_found(place: Place) -> None:
    place.fill("other")
    assert not place.store.exists(place.at("absent"))
    with pytest.raises(NotFoundError, match="absent"):
        place.store.read(place.at("absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        place.store.open(place.at("absent"))


def test_a_folder_is_no_object(place: Place) -> None:
    place.fill("folder/a")
    assert not place.store.exists(place.at("folder"))
    with pytest.raises(StorageError):
        place.store.read(place.at("folder"))


def test_an_absent_folder_is_empty(place: Place) -> None:
    assert place.names() == []


def test_an_empty_object_is_kept(place: Place) -> None:
    place.store.write(place.at("_SUCCESS"), b"")
    assert place.store.exists(place.at("_SUCCESS"))
    assert place.store.read(place.at("_SUCCESS")) == b""


def test_a_second_write_replaces_the_first(place: Place) -> None:
    place.store.write(place.at("a"), b"long before")
    place.store.write(place.at("a"), b"now")
    assert place.store.read(place.at("a")) == b"now"
    assert place.names() == ["a"]


def test_listed_objects_have_name_size_and_time(place: Place) -> None:
    place.store.write(place.at("b/x.parquet"), b"12345")
    place.store.write(place.at("a.json"), b"1")
    found = place.store.list_folder(place.root)
    assert [(item.name, item.size_bytes) for item in found] == [("a.json", 1), ("b/x.parquet", 5)]
    assert all(abs(item.modified_seconds - time.time()) < 60 for item in found)


def test_a_listing_ends_at_the_folder(place: Place) -> None:
    place.fill("part/a", "part-2/a", "party", "pa")
    assert [item.name for item in place.store.list_folder(place.at("part"))] == ["a"]
    images = place.store.list_images(place.at("part"), ("a",))
    assert [item.path for item in images] == [place.at("part/a")]


def test_removing_a_folder_removes_all_below_it_and_nothing_else(place: Place) -> None:
    place.fill("pca/model", "pca/scores/0", "pca2/a", "pca.csv")
    place.store.remove(place.at("pca"))
    assert place.names() == ["pca.csv", "pca2/a"]


def test_removing_what_is_absent_is_fine(place: Place) -> None:
    place.fill("a")
    place.store.remove(place.at("absent"))
    place.store.remove(place.at("a"))
    place.store.remove(place.at("a"))
    assert place.names() == []


def test_upload_moves_a_file(place: Place, tmp_path: Path) -> None:
    local = tmp_path / "here.bin"
    local.write_bytes(b"content")
    place.store.upload(local, place.at("new folder/there.bin"))
    assert place.store.read(place.at("new folder/there.bin")) == b"content"
    assert not local.exists()


def test_open_reads_any_piece(place: Place) -> None:
    data = bytes(range(256)) * 4096
    place.store.write(place.at("a"), data)
    with place.store.open(place.at("a")) as stream:
        stream.seek(-10, os.SEEK_END)
        assert stream.read() == data[-10:]
        stream.seek(1000)
        assert stream.read(5) == data[1000:1005]


def test_only_images_are_listed_whatever_the_case_of_their_suffix(place: Place) -> None:
    place.fill("a.JPG", "b.jpeg", "c.png", "d.txt", "jpg", "e.jpg.txt", "f/g.Tiff")
    found = [item.path for item in place.store.list_images(place.root, IMAGE_SUFFIXES)]
    assert found == [place.at(name) for name in ("a.JPG", "b.jpeg", "c.png", "f/g.Tiff")]


def test_an_etag_changes_with_the_content(place: Place) -> None:
    def etag() -> str:
        (found,) = place.store.list_images(place.root, (".jpg",))
        return found.etag

    place.store.write(place.at("a.jpg"), b"one")
    first = etag()
    assert first == etag()
    place.store.write(place.at("a.jpg"), b"three")
    assert first != etag()
    assert '"' not in first


def test_real_photos_come_back_as_they_are(place: Place, photos: list[Path]) -> None:
    for photo in photos[:3]:
        place.store.write(place.at(photo.name), photo.read_bytes())
        assert place.store.read(place.at(photo.name)) == photo.read_bytes()


# `ReadAhead`


class Watched(LocalStore):
    """Keeps which reads were started."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def read(self, path: str) -> bytes:
        self.started.append(path)
        time.sleep(0.01 if path.endswith("0") else 0)  # so that they end in another order
        return super().read(path)


def local_files(folder: Path, n_files: int) -> list[str]:
    """Write small files with their number as content, and return their paths."""
    paths = [folder / f"{i:03d}" for i in range(n_files)]
    for i, path in enumerate(paths):
        path.write_text(str(i))
    return [str(path) for path in paths]


@pytest.mark.parametrize("n_concurrent", [1, 3, 16])
def test_read_ahead_keeps_the_order_and_its_bound(tmp_path: Path, n_concurrent: int) -> None:
    paths, store = local_files(tmp_path, 40), Watched()
    with ReadAhead(store, paths, n_concurrent=n_concurrent) as reads:
        for n_done, (path, data) in enumerate(reads):
            assert (path, data) == (paths[n_done], str(n_done).encode())
            time.sleep(0.002)
            assert len(store.started) <= n_done + n_concurrent
    assert sorted(store.started) == paths


def test_read_ahead_reads_several_at_a_time(tmp_path: Path) -> None:
    paths = local_files(tmp_path, N_AHEAD)
    together = threading.Barrier(N_AHEAD, timeout=10)

    class Meeting(LocalStore):
        def read(self, path: str) -> bytes:
            together.wait()
            return super().read(path)

    with ReadAhead(Meeting(), paths, n_concurrent=N_AHEAD) as reads:
        assert [path for path, _ in reads] == paths


def test_read_ahead_hands_over_an_error_in_its_place(tmp_path: Path) -> None:
    paths = local_files(tmp_path, 9)
    Path(paths[4]).unlink()
    with ReadAhead(LocalStore(), paths, n_concurrent=3) as reads:
        results = dict(reads)
    assert list(results) == paths
    failed = {path: type(data) for path, data in results.items() if not isinstance(data, bytes)}
    assert failed == {paths[4]: NotFoundError}


def test_read_ahead_stops_with_its_block(tmp_path: Path) -> None:
    paths, store = local_files(tmp_path, 40), Watched()
    before = threading.active_count()
    with ReadAhead(store, paths, n_concurrent=N_AHEAD) as reads:
        next(iter(reads))
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert len(store.started) <= N_AHEAD + 1


def test_read_ahead_does_not_hide_a_mistake(tmp_path: Path) -> None:
    class Broken(LocalStore):
        def read(self, path: str) -> bytes:
            raise ZeroDivisionError

    with (
        ReadAhead(Broken(), ["a"], n_concurrent=1) as reads,
        pytest.raises(ZeroDivisionError),
    ):
        list(reads)


# Local folders


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Let the kernel refuse larger files of this process, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "part"
    LocalStore().write(str(target), b"old")
    with largest_file(1000), pytest.raises(StorageError, match="too large"):
        LocalStore().write(str(target), bytes(2000))
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert target.read_bytes() == b"old"


def test_a_first_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(StorageError, match="too large"):
        LocalStore().write(str(tmp_path / "part"), bytes(2000))
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_write_has_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: seen.append([path.name for path in tmp_path.iterdir()])
    )
    LocalStore().write(str(tmp_path / "a.jpg"), b"data")
    assert seen, "a write that is not brought to disk before its rename can be lost"
    ((name,),) = seen
    assert is_temporary(name)
    assert name.startswith(".")
    assert not name.endswith(IMAGE_SUFFIXES)


def test_a_reader_never_sees_half_a_write(tmp_path: Path) -> None:
    store, path = LocalStore(), str(tmp_path / "a")
    whole = [bytes([letter]) * 300_000 for letter in b"xyz"]
    store.write(path, whole[0])
    writer = threading.Thread(target=lambda: [store.write(path, whole[i % 3]) for i in range(60)])
    writer.start()
    n_read = 0
    while writer.is_alive():
        assert store.read(path) in whole
        n_read += 1
    writer.join()
    assert n_read > 1


def test_names_that_only_look_temporary_are_not(tmp_path: Path) -> None:
    assert not is_temporary("fruits-tmp.jpg")
    assert not is_temporary(".a.jpg")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="directory"):
        LocalStore().read(str(tmp_path))


def test_a_fifo_does_not_block_a_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe.jpg"
    os.mkfifo(path)
    errors: list[Exception] = []

    def read() -> None:
        try:
            LocalStore().read(str(path))
        except StorageError as exc:
            errors.append(exc)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(HANG_SECONDS)
    hangs = reader.is_alive()
    if hangs:
        path.open("wb").close()
        reader.join(HANG_SECONDS)
    assert not hangs
    assert "not a regular file" in str(errors[0])


def test_a_fifo_is_not_listed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "real.jpg").touch()
    assert listed(tmp_path) == ["real.jpg"]


def test_an_absent_input_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="check the spelling"):
        list(LocalStore().list_images(str(tmp_path / "absent"), (".jpg",)))


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.jpg").touch()
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "near").symlink_to(tmp_path / "far")
    assert listed(tmp_path / "input") == ["near/a.jpg"]


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_back_to_a_folder_ends(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "x.jpg").touch()
    (folder / "again").symlink_to(target)
    assert listed(tmp_path) == ["a/b/x.jpg"]


def test_two_links_to_each_other_end(tmp_path: Path) -> None:
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").touch()
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    assert listed(tmp_path) == ["one/other/x.jpg", "one/x.jpg", "two/other/x.jpg", "two/x.jpg"]


@pytest.mark.parametrize("target", ["self.jpg", "nowhere"])
def test_a_link_to_nothing_is_skipped(tmp_path: Path, target: str) -> None:
    (tmp_path / "self.jpg").symlink_to(target)
    (tmp_path / "x.jpg").touch()
    assert listed(tmp_path) == ["x.jpg"]


def test_a_name_that_is_no_text_is_listed_and_cannot_be_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).touch()
    (found,) = LocalStore().list_images(str(tmp_path), (".jpg",))
    assert found.path == f"{tmp_path}/caf\\xe9.jpg"
    with pytest.raises(NotFoundError):
        LocalStore().read(found.path)


def listed(folder: Path) -> list[str]:
    """Relative paths of the images below a folder, in the order of the listing."""
    found = LocalStore().list_images(str(folder), (".jpg",))
    return [item.path.removeprefix(f"{folder}/") for item in found]


FOLDER_NAMES = st.text("aB-.0\u00e9\u00ff\U0001f34e ", min_size=1, max_size=4).filter(
    lambda name: name.strip(".") != ""
)
TREES = st.sets(
    st.lists(FOLDER_NAMES, max_size=2).map(lambda names: "/".join([*names, "x"]) + ".jpg")
    | st.lists(FOLDER_NAMES, min_size=1, max_size=3).map(lambda names: "/".join(names) + ".jpg"),
    min_size=1,
    max_size=12,
)


@given(names=TREES)
@settings(deadline=None, max_examples=60)
def test_a_folder_is_listed_in_the_order_of_the_bytes_of_whole_paths(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = write_tree(Path(folder), names)
        assert listed(Path(folder)) == sorted(files, key=str.encode)


@given(names=TREES)
@settings(deadline=None, max_examples=12)
def test_a_folder_is_listed_in_the_order_of_s3(
    moto_process: RecordingMoto, names: set[str]
) -> None:
    service = S3Service(name="moto", endpoint_url=moto_process.endpoint_url)
    bucket = service.new_bucket()
    with tempfile.TemporaryDirectory() as folder:
        for name in write_tree(Path(folder), names):
            put(bucket, name)
        local = listed(Path(folder))
    found = S3Store(service.options).list_images(f"s3://{bucket}", (".jpg",))
    assert [item.path for item in found] == [f"s3://{bucket}/{name}" for name in local]


def write_tree(folder: Path, names: set[str]) -> list[str]:
    """Write empty files; leave out those whose folder is already a file, or the reverse."""
    written = []
    for name in sorted(names):
        path = folder / name
        if path.is_dir() or any((folder / parent).is_file() for parent in Path(name).parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        written.append(name)
    return written


def put(bucket: str, key: str) -> None:
    """Store an empty object in moto, without the network."""
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, b"")


# Requests to S3


@pytest.mark.parametrize(("n_keys", "n_lists"), [(0, 1), (1, 1), (1000, 1), (1001, 2), (2500, 3)])
def test_one_list_for_a_thousand_keys(
    moto_server: RecordingMoto, moto_place: Place, n_keys: int, n_lists: int
) -> None:
    bucket = moto_place.root.split("/")[2]
    for number in range(n_keys):
        put(bucket, f"folder/{number:05d}.jpg")
    found = list(moto_place.store.list_images(moto_place.root, (".jpg",)))
    assert [item.path for item in found] == [
        moto_place.at(f"{number:05d}.jpg") for number in range(n_keys)
    ]
    assert moto_server.count() == {"LIST": n_lists}


def test_a_long_folder_is_listed_whole_by_another_server(s3rver_process: S3rver) -> None:
    service = S3Service(name="s3rver", endpoint_url=s3rver_process.endpoint_url)
    bucket = service.new_bucket()
    names = [f"{number:05d}.jpg" for number in range(1001)]
    for name in names:
        s3rver_process.put_empty(bucket, name)
    found = S3Store(service.options).list_images(f"s3://{bucket}", (".jpg",))
    assert [item.path for item in found] == [f"s3://{bucket}/{name}" for name in names]


def test_more_than_a_thousand_objects_are_removed(moto_place: Place) -> None:
    bucket = moto_place.root.split("/")[2]
    for number in range(1001):
        put(bucket, f"folder/{number}")
    put(bucket, "kept")
    moto_place.store.remove(moto_place.root)
    remaining = moto_place.store.list_folder(f"s3://{bucket}")
    assert [item.name for item in remaining] == ["kept"]


def test_one_get_for_an_image_and_nothing_else(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    names = [f"{KEYS['space']}-{number}" for number in range(50)]
    moto_place.fill(*names)
    moto_server.forget()
    forget_connections()
    cold = S3Store(StoreOptions(endpoint_url=moto_server.endpoint_url))
    with ReadAhead(cold, map(moto_place.at, names), n_concurrent=16) as reads:
        assert [data for _, data in reads] == [name.encode() for name in names]
    expected = {("GET", moto_place.at(name).removeprefix("s3:/")): 1 for name in names}
    assert moto_server.count_paths() == expected


def test_a_large_object_is_one_get_and_one_put(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    data = bytes(20 * 2**20)
    moto_place.store.write(moto_place.at("large"), data)
    assert moto_place.store.read(moto_place.at("large")) == data
    assert moto_server.count() == {"PUT": 1, "GET": 1}


def test_a_write_or_a_question_is_one_request(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    moto_place.store.write(moto_place.at("a"), b"1")
    moto_place.store.exists(moto_place.at("a"))
    assert moto_server.count() == {"PUT": 1, "HEAD": 1}


def test_nothing_is_remembered_of_what_others_change(moto_place: Place) -> None:
    service = S3Service(name="moto", endpoint_url=endpoint_of(moto_place))
    bucket = moto_place.root.split("/")[2]
    assert moto_place.names() == []
    service.client().put_object(Bucket=bucket, Key="folder/a", Body=b"1")
    assert moto_place.names() == ["a"]
    assert moto_place.store.exists(moto_place.at("a"))
    service.client().delete_object(Bucket=bucket, Key="folder/a")
    assert moto_place.names() == []
    assert not moto_place.store.exists(moto_place.at("a"))


def endpoint_of(place: Place) -> str:
    """Address of the service behind a place."""
    assert isinstance(place.store, S3Store)
    endpoint_url = place.store._options.endpoint_url
    assert endpoint_url
    return endpoint_url


def touch_everything(store: S3Store, place: Place) -> None:
    """Make each kind of request that reads: LIST, GET, HEAD, ranged GET."""
    list(store.list_images(place.root, (".jpg",)))
    store.read(place.at("a.jpg"))
    store.exists(place.at("a.jpg"))
    with store.open(place.at("a.jpg")) as stream:
        stream.read(1)


def test_requester_pays_is_said_in_every_request(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    moto_place.fill("a.jpg")
    moto_server.forget()
    options = StoreOptions(endpoint_url=moto_server.endpoint_url, requester_pays=True)
    touch_everything(S3Store(options), moto_place)
    payers = {
        (request.method, request.is_list, request.headers.get("x-amz-request-payer"))
        for request in moto_server.requests
    }
    assert payers == {
        ("GET", True, "requester"),
        ("GET", False, "requester"),
        ("HEAD", False, "requester"),
    }


def test_nobody_pays_without_being_asked(moto_server: RecordingMoto, moto_place: Place) -> None:
    moto_place.fill("a.jpg")
    assert isinstance(moto_place.store, S3Store)
    touch_everything(moto_place.store, moto_place)
    assert not any("x-amz-request-payer" in request.headers for request in moto_server.requests)
    assert all("authorization" in request.headers for request in moto_server.requests)


def test_anonymous_requests_carry_no_signature(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    moto_place.fill("a.jpg")
    bucket = moto_place.root.split("/")[2]
    service = S3Service(name="moto", endpoint_url=moto_server.endpoint_url)
    service.client().put_bucket_policy(Bucket=bucket, Policy=EVERYONE_MAY % (bucket, bucket))
    moto_server.forget()
    options = StoreOptions(endpoint_url=moto_server.endpoint_url, anonymous=True)
    touch_everything(S3Store(options), moto_place)
    assert len(moto_server.requests) >= 4
    assert not any("authorization" in request.headers for request in moto_server.requests)


# What S3 says of a place


@pytest.mark.parametrize("region", ["eu-west-3", "us-west-2"])
def test_the_region_is_that_of_the_bucket(moto_server: RecordingMoto, region: str) -> None:
    service = S3Service(name="moto", endpoint_url=moto_server.endpoint_url)
    bucket = service.new_bucket(region)
    assert S3Store(service.options).region(f"s3://{bucket}/some/prefix") == region


def test_a_service_without_regions_has_none(s3rver_process: S3rver) -> None:
    service = S3Service(name="s3rver", endpoint_url=s3rver_process.endpoint_url)
    assert S3Store(service.options).region(f"s3://{service.new_bucket()}") is None


def test_a_local_folder_has_no_region(tmp_path: Path) -> None:
    assert LocalStore().region(str(tmp_path)) is None


def test_an_absent_bucket_is_not_found(s3_service: S3Service) -> None:
    store = S3Store(s3_service.options)
    for question in (store.region, store.read, store.list_folder):
        with pytest.raises(NotFoundError, match="no-such-bucket"):
            question("s3://no-such-bucket/a")


# What goes wrong with S3


def test_a_private_bucket_refuses_strangers(moto_server: RecordingMoto, moto_place: Place) -> None:
    moto_place.fill("a")
    store = S3Store(StoreOptions(endpoint_url=moto_server.endpoint_url, anonymous=True))
    with pytest.raises(AccessDeniedError, match="policy of the bucket"):
        store.read(moto_place.at("a"))
    with pytest.raises(PermissionError, match="policy of the bucket"):
        store.write(moto_place.at("a"), b"")


def test_wrong_keys_are_refused(s3rver_process: S3rver) -> None:
    service = S3Service(name="s3rver", endpoint_url=s3rver_process.endpoint_url)
    path = f"s3://{service.new_bucket()}/a"
    with other_keys("SOMEONE", "ELSE"), pytest.raises(AccessDeniedError, match="your keys"):
        S3Store(service.options).read(path)


def forget_connections() -> None:
    """Let new stores begin cold, as in a new process."""
    for kind in (S3FileSystem, *S3FileSystem.__subclasses__()):
        kind.clear_instance_cache()


@contextmanager
def other_keys(access: str | None, secret: str | None) -> Iterator[None]:
    """Use other AWS keys, or none, for new stores."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", access), ("AWS_SECRET_ACCESS_KEY", secret)):
            patch.delenv(name) if value is None else patch.setenv(name, value)
        forget_connections()
        try:
            yield
        finally:
            forget_connections()


@pytest.mark.parametrize("keys", [(None, None), ("ONLY-HALF", None)])
def test_without_keys_the_message_says_how_to_get_some(
    moto_server: RecordingMoto, moto_place: Place, keys: tuple[str | None, str | None]
) -> None:
    moto_place.fill("a")
    with other_keys(*keys):
        store = S3Store(StoreOptions(endpoint_url=moto_server.endpoint_url))
        with pytest.raises(AccessDeniedError, match=r"AWS_PROFILE.*--profile.*--anonymous"):
            store.read(moto_place.at("a"))


def test_an_unknown_profile_is_named(moto_server: RecordingMoto, moto_place: Place) -> None:
    options = StoreOptions(endpoint_url=moto_server.endpoint_url, profile="nobody")
    with pytest.raises(StorageError, match="nobody"):
        S3Store(options).read(moto_place.at("a"))


@contextmanager
def closed_endpoint() -> Iterator[str]:
    """Address of a port where nobody listens, kept free for the time."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_a_service_that_is_down_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # each of the usual five waits longer
    with closed_endpoint() as endpoint_url:
        store = S3Store(StoreOptions(endpoint_url=endpoint_url))
        with pytest.raises(StorageError, match="Check the network and --endpoint-url"):
            store.read("s3://bucket/key")


@pytest.mark.slow
def test_a_service_that_is_down_is_told_soon() -> None:
    with closed_endpoint() as endpoint_url:
        store = S3Store(StoreOptions(endpoint_url=endpoint_url))
        start = time.monotonic()
        with pytest.raises(StorageError, match="--endpoint-url"):
            store.read("s3://bucket/key")
    assert time.monotonic() - start < REFUSED_WITHIN_SECONDS


def test_a_denied_request_is_not_repeated(moto_server: RecordingMoto, moto_place: Place) -> None:
    denied = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    moto_server.interfere = lambda request: Answer(status="403 Forbidden", body=denied)
    with pytest.raises(AccessDeniedError, match="Access Denied"):
        moto_place.store.read(moto_place.at("a"))
    with pytest.raises(AccessDeniedError, match="denied"):
        moto_place.store.exists(moto_place.at("a"))
    with pytest.raises(AccessDeniedError, match="denied"):
        moto_place.store.list_folder(moto_place.root)
    assert moto_server.count() == {"GET": 1, "HEAD": 1, "LIST": 1}


@pytest.mark.slow
def test_a_service_that_asks_to_slow_down_is_asked_again(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    moto_place.fill("a")
    answers = iter([slow_down(), slow_down()])
    moto_server.interfere = lambda request: next(answers, None)
    assert moto_place.store.read(moto_place.at("a")) == b"a"


def slow_down() -> Answer:
    """Say what S3 says under load."""
    return Answer(
        status="503 Slow Down",
        body=b"<Error><Code>SlowDown</Code><Message>Please reduce</Message></Error>",
    )


@pytest.mark.slow
def test_a_body_cut_short_is_a_storage_error(moto_server: RecordingMoto, moto_place: Place) -> None:
    moto_place.fill("a")
    short = Answer(status="200 OK", body=b"half", headers={"Content-Length": "8"})
    moto_server.interfere = lambda request: short
    with pytest.raises(StorageError):
        moto_place.store.read(moto_place.at("a"))


def test_an_object_lost_while_it_is_open_is_a_storage_error(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    moto_place.fill("a")
    with moto_place.store.open(moto_place.at("a")) as stream:
        moto_place.store.remove(moto_place.at("a"))
        with pytest.raises(StorageError):
            stream.read()


def test_objects_that_could_not_be_removed_are_an_error(
    moto_server: RecordingMoto, moto_place: Place
) -> None:
    moto_place.fill("a")
    refused = Answer(
        status="200 OK",
        body=b"<DeleteResult><Error><Key>folder/a</Key><Code>AccessDenied</Code>"
        b"<Message>Access Denied</Message></Error></DeleteResult>",
    )
    moto_server.interfere = lambda request: refused if request.method == "POST" else None
    with pytest.raises(AccessDeniedError, match="folder/a"):
        moto_place.store.remove(moto_place.at("a"))


def test_removing_a_folder_spares_what_only_shares_a_name(moto_place: Place) -> None:
    bucket = moto_place.root.split("/")[2]
    put(bucket, "folder//a")
    put(bucket, "/a")
    moto_place.store.remove(moto_place.root)
    remaining = [item.name for item in moto_place.store.list_folder(f"s3://{bucket}")]
    assert remaining == ["/a"]


def test_the_service_sees_what_the_package_wrote(s3_service: S3Service, bucket: str) -> None:
    S3Store(s3_service.options).write(f"s3://{bucket}/{KEYS['accent']}", b"1")
    client = s3_service.client()
    assert client.get_object(Bucket=bucket, Key=KEYS["accent"])["Body"].read() == b"1"


def test_the_package_sees_what_others_wrote(s3_service: S3Service, bucket: str) -> None:
    s3_service.client().put_object(Bucket=bucket, Key=KEYS["plus"], Body=b"1")
    assert S3Store(s3_service.options).read(f"s3://{bucket}/{KEYS['plus']}") == b"1"


# Addresses


@pytest.mark.parametrize(
    ("given_address", "expected"),
    [
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket//", "s3://bucket"),
        ("file:///a/b/", "/a/b"),
        ("/a/./b/../c//d", "/a/c/d"),
        ("/a b/\u00e9#?", "/a b/\u00e9#?"),
        ("~/photos", f"{Path.home()}/photos"),
        ("photos", f"{Path.cwd()}/photos"),
    ],
)
def test_an_address_has_one_spelling(given_address: str, expected: str) -> None:
    assert normalize(given_address) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize("address", ["s3://", "s3:///key", "gs://bucket/a", "https://host/a"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected s3://|give a local folder or s3://"):
        normalize(address)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        normalize("https://user:hunter2@host/photos")
    assert "hunter2" not in str(caught.value)


def test_the_address_chooses_the_store(tmp_path: Path) -> None:
    options = StoreOptions(endpoint_url="http://127.0.0.1:1")
    assert isinstance(open_store(str(tmp_path), options), LocalStore)
    assert isinstance(open_store("s3://bucket/a", options), S3Store)
    assert not is_s3("/s3://a")


def test_a_process_has_one_store_for_one_kind_of_access() -> None:
    options = StoreOptions(endpoint_url="http://127.0.0.1:1")
    same = StoreOptions(endpoint_url="http://127.0.0.1:1")
    other = StoreOptions(endpoint_url="http://127.0.0.1:1", requester_pays=True)
    assert open_store("s3://a", options) is open_store("s3://b", same)
    assert open_store("s3://a", options) is not open_store("s3://a", other)


def test_requests_are_told_apart() -> None:
    listing = Request(method="GET", path="/b", query={"list-type": "2"}, headers={})
    assert listing.is_list
    assert not Request(method="GET", path="/b/k", query={}, headers={}).is_list
