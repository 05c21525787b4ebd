"""The hot pieces of an extraction, each alone; plain tests too, unless --benchmark-enable.

make bench-pieces
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fruits_dask.decode import decode
from fruits_dask.features import metadata, read_vectors, vector_table, write_table
from fruits_dask.featurize import build_featurizer, prepare_network
from fruits_dask.featurize.weights import Weights, load_weights
from fruits_dask.records import Features, Pixels, StoreOptions
from fruits_dask.reduce.moments import Moments
from fruits_dask.sample import sample_images
from fruits_dask.storage import LocalStore, ReadAhead

N_IMAGES = 64
N_FEATURES = 1280


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_weights("fruits", None, StoreOptions())


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    return [jpeg for _, jpeg in islice(sample_images(n_per_label=5), N_IMAGES)]


@pytest.fixture(scope="module")
def pixels(jpegs: list[bytes], weights: Weights) -> Pixels:
    return np.stack([decode(jpeg, image_px=weights.backbone.image_px) for jpeg in jpegs])


@pytest.fixture(scope="module")
def features() -> Features:
    return np.random.default_rng(0).random((2048, N_FEATURES), np.float32)


@pytest.fixture(scope="module")
def keys() -> pa.Table:
    paths = [f"s3://fruits/Training/Lemon/{number:04d}.jpg" for number in range(2048)]
    return pa.table({"path": paths, "label": ["Lemon"] * 2048, "split": ["Training"] * 2048})


def test_read(benchmark: Callable[..., Any], jpegs: list[bytes], tmp_path: Path) -> None:
    """64 small files, 16 at a time."""
    paths = [tmp_path / f"{number}.jpg" for number in range(len(jpegs))]
    for path, jpeg in zip(paths, jpegs, strict=True):
        path.write_bytes(jpeg)

    def read() -> list[bytes]:
        with ReadAhead(LocalStore(), map(str, paths), n_concurrent=16) as reads:
            return [data for _, data in reads if isinstance(data, bytes)]

    assert benchmark(read) == jpegs


@pytest.mark.parametrize("image_px", [128, 224])
def test_decode(benchmark: Callable[..., Any], jpegs: list[bytes], image_px: int) -> None:
    """One 100 px photo."""
    assert benchmark(decode, jpegs[0], image_px=image_px).shape == (image_px, image_px, 3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tensorflow", "openvino"])
def test_featurize(
    benchmark: Callable[..., Any], pixels: Pixels, weights: Weights, engine: str
) -> None:
    """64 photos of 128 px through the bundled network, on one thread."""
    network = prepare_network(engine, weights)
    found = benchmark(build_featurizer(weights.spec(engine=engine), network), pixels)
    assert found.shape == (len(pixels), N_FEATURES)
    assert np.isfinite(found).all()


def test_store(
    benchmark: Callable[..., Any],
    features: Features,
    keys: pa.Table,
    weights: Weights,
    tmp_path: Path,
) -> None:
    """A part of 2,048 rows."""
    path = str(tmp_path / "part.parquet")
    described = metadata(weights.spec(engine="tensorflow"))

    def store() -> None:
        write_table(LocalStore(), path, vector_table(keys, features, "features", described))

    benchmark(store)
    assert np.array_equal(read_vectors(LocalStore(), path, "features").vectors, features)


def test_reduce(benchmark: Callable[..., Any], features: Features) -> None:
    """The moments of 2,048 rows, what the exact reducer does with a part."""
    found = benchmark(Moments.of, features)
    assert np.allclose(found.mean, features.mean(axis=0))
