"""The embedded default: sample photos in an S3 server inside this process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from .errors import ConfigError
from .records import StoreOptions
from .sample import sample_images
from .storage import normalize, open_store
from .workspace import SAMPLE_BUCKET

# Inside the allowed regions; the server is on this machine in truth.
_REGION = "eu-west-3"
_UPLOADS = 8


@contextmanager
def embedded_server(bucket: str = SAMPLE_BUCKET) -> Iterator[str]:
    """Run an S3 server (moto) on the loopback interface, with an empty public bucket.

    Parameters
    ----------
    bucket : str
        Name of the bucket.

    Yields
    ------
    str
        Its address, ``http://127.0.0.1:PORT``.

    Raises
    ------
    ConfigError
        If moto is not installed.
    """
    try:
        from moto.server import ThreadedMotoServer  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise ConfigError(
            "without --input the job runs on sample photos in an embedded S3 server, which needs "
            "the extra `demo`: pip install 'fruits_dask[demo]'; or give --input"
        ) from exc
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line a request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint_url = f"http://{host}:{port}"
        make_public_bucket(endpoint_url, bucket)
        yield endpoint_url
    finally:
        server.stop()


def public_options(endpoint_url: str) -> StoreOptions:
    """How to reach the embedded server; it asks for no keys."""
    return StoreOptions(endpoint_url=endpoint_url, anonymous=True)


def write_sample(
    folder: str,
    options: StoreOptions,
    *,
    n_per_label: int = 40,
    on_written: Callable[[int], None] = lambda n_images: None,
) -> int:
    """Generate the sample photos and store them.

    Parameters
    ----------
    folder : str
        Local folder or s3:// prefix.
    options : StoreOptions
        How to reach it.
    n_per_label : int
        Photos of each fruit.
    on_written : callable
        Told the number of photos written so far.

    Returns
    -------
    int
        How many were written.
    """
    root = normalize(folder)
    store = open_store(root, options)
    with ThreadPoolExecutor(_UPLOADS) as pool:
        writes = []
        for key, jpeg in sample_images(n_per_label=n_per_label):
            writes.append(pool.submit(store.write, f"{root}/{key}", jpeg))
            on_written(len(writes))
        for write in writes:
            write.result()
    return len(writes)


def make_public_bucket(endpoint_url: str, bucket: str) -> None:
    """Create a bucket that anyone on this machine may read, so that no keys are needed."""
    from s3fs import S3FileSystem  # noqa: PLC0415

    everyone = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everyone]})
    server = S3FileSystem(
        anon=True, endpoint_url=endpoint_url, client_kwargs={"region_name": _REGION}
    )
    server.mkdir(bucket, region_name=_REGION)
    server.call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
