"""Serve a folder of photos as an S3 bucket on the loopback interface, until interrupted.

For measuring a run from S3 on one machine::

    python benchmarks/serve_folder.py ../shared/data/fruits360
    python -m fruits_dask run --input s3://photos/fruits360 --endpoint-url http://127.0.0.1:PORT ...
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from fruits_dask.demo import embedded_server, public_options
from fruits_dask.storage import S3Store

BUCKET = "photos"


def main(folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Upload all files below FOLDER and wait."""
    with embedded_server(BUCKET) as endpoint_url:
        store = S3Store(public_options(endpoint_url))
        root = folder.resolve()
        prefix = f"s3://{BUCKET}/{root.name}"
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]

        def upload(path: Path) -> None:
            store.write(f"{prefix}/{path.relative_to(root).as_posix()}", path.read_bytes())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(upload, files))
        print(f"{len(files):,} objects; --input {prefix} --endpoint-url {endpoint_url} --anonymous")
        threading.Event().wait()


if __name__ == "__main__":
    typer.run(main)
