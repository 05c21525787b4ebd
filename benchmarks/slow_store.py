"""Extraction from a store that answers late: photos and result in a bucket, 0 and 30 ms of delay.

A server in this process (moto, loopback) answers every request the given time later than it could.
Where reading, decoding, computing and storing overlap, that costs (almost) nothing.
"""

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from common import PHOTOS, SHARED, JsonFile, Row, conclude, print_table
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from fruits_dask.bench import measure_extraction
from fruits_dask.config import Settings
from fruits_dask.demo import make_public_bucket, public_options
from fruits_dask.progress import Silent
from fruits_dask.storage import S3Store

BUCKET = "photos"
TARGET = 0.9


class LateServer:
    """An S3 server whose every answer comes `delay_seconds` late."""

    def __init__(self) -> None:
        self.delay_seconds = 0.0
        self.n_requests = 0
        self._application = DomainDispatcherApplication(create_backend_app)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer one request (WSGI)."""
        self.n_requests += 1
        time.sleep(self.delay_seconds)
        return self._application(environ, start_response)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve on the loopback interface; yield the address."""
        server = make_server("127.0.0.1", 0, self, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def upload(photos: Path, endpoint_url: str, limit: int) -> None:
    """Put the photos into the bucket."""
    store = S3Store(public_options(endpoint_url))
    files = sorted(photos.rglob("*.jpg"))[:limit]

    def put(path: Path) -> None:
        store.write(f"s3://{BUCKET}/{path.relative_to(photos).as_posix()}", path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, files))


def main(
    *,
    photos: Annotated[Path, typer.Option(help="Folder of photos")] = PHOTOS,
    limit: Annotated[int, typer.Option(help="Photos of it")] = 6_833,
    engine: Annotated[str, typer.Option(help="tensorflow or openvino")] = "openvino",
    delay_ms: Annotated[float, typer.Option(help="How late every answer is")] = 30.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure pairs without and with the delay."""
    os.environ["KERAS_HOME"] = str(SHARED / "keras")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    late, numbers, rows = LateServer(), count(), []
    with late.running() as endpoint_url:
        make_public_bucket(endpoint_url, BUCKET)
        upload(photos, endpoint_url, limit)

        def measure(delay_seconds: float) -> tuple[float, int]:
            late.delay_seconds, before = delay_seconds, late.n_requests
            settings = Settings(
                input=f"s3://{BUCKET}",
                output=f"s3://results/{next(numbers)}",
                weights="imagenet",
                engine=engine,
                endpoint_url=endpoint_url,
                anonymous=True,
            )
            speed = measure_extraction(settings, progress=Silent())
            return speed.steady, late.n_requests - before

        make_public_bucket(endpoint_url, "results")
        for number in range(1, rounds + 1):
            (fast, n_requests), (slow, _) = measure(0.0), measure(delay_ms / 1000)
            rows.append(_row(number, fast, slow, n_requests))
    ratio = statistics.median(row["ratio"] for row in rows)
    print_table(
        f"Extraction ({engine}, 2 workers) from a store that answers {delay_ms:g} ms late",
        ("round", "images/s, 0 ms", f"images/s, {delay_ms:g} ms", "ratio", "requests"),
        [
            (r["round"], f"{r['fast']:.0f}", f"{r['slow']:.0f}", f"{r['ratio']:.3f}", r["requests"])
            for r in rows
        ],
    )
    print(
        f"median ratio {ratio:.3f}, target {TARGET}: {'reached' if ratio >= TARGET else 'MISSED'}"
    )
    conclude(json_file, rows, {"engine": engine, "delay_ms": delay_ms, "photos": limit})


def _row(number: int, fast: float, slow: float, n_requests: int) -> Row:
    return {
        "round": number,
        "fast": fast,
        "slow": slow,
        "ratio": slow / fast,
        "requests": n_requests,
    }


if __name__ == "__main__":
    typer.run(main)
