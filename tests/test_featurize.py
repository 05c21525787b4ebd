"""Pixels to vectors: the numbers of a plain Keras loop, and weights that are what they say."""

from __future__ import annotations

import hashlib
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError

import h5py
import numpy as np
import openvino
import pytest
from numpy.typing import NDArray

from fruits_dask import featurize
from fruits_dask.decode import decode
from fruits_dask.errors import ConfigError, EngineError, WeightsError
from fruits_dask.featurize import (
    Featurizer,
    build_featurizer,
    get_featurizer,
    install_network,
    prepare_network,
)
from fruits_dask.featurize import weights as weights_module
from fruits_dask.featurize.backbones import BACKBONES, FRUITS_BACKBONE, find_backbone
from fruits_dask.featurize.convert import convert
from fruits_dask.featurize.keras import BATCH_SIZE, build_model
from fruits_dask.featurize.weights import Weights, imagenet_path, load_weights
from fruits_dask.records import Features, FeaturizerSpec, Pixels
from jobs import OPTIONS, environment
from servers import S3Service

N_PHOTOS = 64
# Promise 5. By row: largest difference over the largest value of that row; by norm: over all rows.
TOLERANCE = 1e-5
# Of bfloat16 to float32, row by row.
LOWEST_COSINE = 0.99
PROBE_SECONDS = 60


@pytest.fixture(scope="module", autouse=True)
def loopback_only() -> Iterator[None]:
    """Keras downloads what it misses; no test of this module may try."""
    look_up = socket.getaddrinfo

    def guarded(host: Any, *arguments: Any, **options: Any) -> Any:
        assert str(host).startswith("127.") or host == "localhost", f"look-up of {host}"
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", guarded)
        yield


@pytest.fixture(scope="module")
def keras_home(shared: Path) -> Iterator[Path]:
    """Where the ImageNet weights are, so that Keras needs no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(shared / "keras"))
        yield shared / "keras"


@pytest.fixture(scope="module", params=["fruits", "imagenet"])
def weights(request: pytest.FixtureRequest) -> Weights:
    if request.param == "imagenet":
        request.getfixturevalue("keras_home")
    return load_weights(request.param, None, OPTIONS)


@pytest.fixture(scope="module")
def fruits() -> Weights:
    return load_weights("fruits", None, OPTIONS)


def installed(
    weights: Weights, *, engine: str = "tensorflow", precision: str = "float32"
) -> FeaturizerSpec:
    spec = weights.spec(engine=engine, precision=precision, n_threads=2)
    network = prepared(engine, weights)
    install_network(spec, hashlib.sha256(network).hexdigest(), network)
    return spec


@cache
def prepared(engine: str, weights: Weights) -> bytes:
    """Convert once: it takes a second or two."""
    return prepare_network(engine, weights)


@pytest.fixture(scope="module", params=["tensorflow", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def featurizer(engine: str, weights: Weights) -> Featurizer:
    return get_featurizer(installed(weights, engine=engine))


@pytest.fixture(scope="module")
def photos_of_both_sets(shared: Path) -> list[Path]:
    sets = [sorted((shared / "data" / name).rglob("*.jpg")) for name in ("fruits360", "grocery")]
    half = N_PHOTOS // len(sets)
    return [path for files in sets for path in files[:: len(files) // half][:half]]


@pytest.fixture(scope="module")
def pixels(photos_of_both_sets: list[Path], weights: Weights) -> Pixels:
    side = weights.backbone.image_px
    return np.stack([decode(path.read_bytes(), image_px=side) for path in photos_of_both_sets])


@pytest.fixture(scope="module")
def features(featurizer: Featurizer, pixels: Pixels) -> Features:
    return featurizer(pixels)


def lowest_cosine(found: Features, expected: Features) -> float:
    """Of all rows, the one that points farthest away from where it should."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / norms).min())


def row_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Worst row of max |a - b| / max |b|."""
    return float((np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)).max())


def norm_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Frobenius norm of the difference, over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def plain_loop(paths: list[Path], weights: Weights, folder: Path) -> Features:
    """Do what a notebook does with Keras alone, photo by photo; no line of the package."""
    import keras  # noqa: PLC0415
    from keras.applications.mobilenet_v2 import MobileNetV2, preprocess_input  # noqa: PLC0415

    backbone = weights.backbone
    side = backbone.image_px
    shape = (side, side, 3)
    # A path for `weights` instead of "imagenet" loads the same file and never asks a network.
    path = folder / ("plain.h5" if weights.name == "imagenet" else "plain.weights.h5")
    path.write_bytes(weights.data)
    model = MobileNetV2(
        weights=path, include_top=False, pooling="avg", input_shape=shape, alpha=backbone.alpha
    )
    rows = []
    for path in paths:
        image = keras.utils.load_img(path, target_size=(side, side), interpolation="bilinear")
        batch = preprocess_input(keras.utils.img_to_array(image, dtype="float32")[None])
        rows.append(np.asarray(model(batch, training=False))[0])
    return np.stack(rows)


# ---------------------------------------------------------------- numbers


@pytest.mark.slow
def test_features_equal_a_plain_keras_loop(
    features: Features, photos_of_both_sets: list[Path], weights: Weights, tmp_path: Path
) -> None:
    expected = plain_loop(photos_of_both_sets, weights, tmp_path)
    assert features.shape == expected.shape == (N_PHOTOS, weights.backbone.n_features)
    assert features.dtype == np.float32
    assert row_difference(features, expected) <= TOLERANCE
    assert norm_difference(features, expected) <= TOLERANCE


@pytest.mark.slow
def test_features_tell_photos_apart(features: Features) -> None:
    """Values of a usable size, and no two rows alike: weights that were loaded, not initialised."""
    assert 0.01 < features.max() < 100
    assert (features.std(axis=0) > 1e-3).mean() > 0.5
    distances = np.linalg.norm(features[:, None] - features[None], axis=2)
    assert distances[~np.eye(len(features), dtype=bool)].min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("n_images", [1, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1, 41])
def test_any_number_of_images(
    n_images: int, featurizer: Featurizer, pixels: Pixels, features: Features
) -> None:
    found = featurizer(pixels[:n_images])
    assert found.shape == (n_images, features.shape[1])
    assert row_difference(found, features[:n_images]) <= TOLERANCE


@pytest.mark.slow
def test_no_image_gives_no_row(featurizer: Featurizer, pixels: Pixels) -> None:
    assert featurizer(pixels[:0]).shape == (0, 1280)


@pytest.mark.slow
def test_rows_do_not_depend_on_their_neighbours(
    featurizer: Featurizer, pixels: Pixels, features: Features
) -> None:
    """Neither on the place in a batch, nor on what else is in it."""
    order = np.random.default_rng(0).permutation(len(pixels))
    shuffled = np.empty_like(features)
    shuffled[order] = featurizer(pixels[order])
    assert row_difference(shuffled, features) <= TOLERANCE
    other = pixels[:BATCH_SIZE].copy()
    other[1:] = 255
    assert row_difference(featurizer(other)[:1], features[:1]) <= TOLERANCE


@pytest.mark.slow
def test_the_same_pixels_give_the_same_bits(
    featurizer: Featurizer, pixels: Pixels, features: Features
) -> None:
    """What lets a run that was cut short end in identical files."""
    assert np.array_equal(featurizer(pixels), features)


@pytest.mark.slow
def test_bf16_points_where_float32_does(weights: Weights, pixels: Pixels) -> None:
    """It is another result, or it would be no choice; and a usable one, or it would be no offer."""
    expected = get_featurizer(installed(weights, engine="openvino"))(pixels)
    spec = installed(weights, engine="openvino", precision="bf16")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineError, match="no bfloat16"):
            get_featurizer(spec)
        return
    found = get_featurizer(spec)(pixels)
    assert lowest_cosine(found, expected) >= LOWEST_COSINE
    assert norm_difference(found, expected) > TOLERANCE


@pytest.mark.slow
def test_openvino_takes_any_number_of_threads(fruits: Weights, pixels: Pixels) -> None:
    """Streams share the batches of a call; which of them takes which makes no difference."""
    side = fruits.backbone.image_px
    some = np.ascontiguousarray(pixels[:41, :side, :side])
    spec = fruits.spec(engine="openvino")
    rows = [
        build_featurizer(replace(spec, n_threads=n_threads), prepared("openvino", fruits))(some)
        for n_threads in (1, 3)
    ]
    assert row_difference(rows[1], rows[0]) <= TOLERANCE


@pytest.mark.slow
def test_openvino_needs_no_tensorflow(fruits: Weights, tmp_path: Path) -> None:
    """Neither the worker nor the process that converts imports it; only the latter, Keras."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('somebody imports TensorFlow')")
    code = """
import sys
from fruits_dask.featurize import build_featurizer, prepare_network
from fruits_dask.featurize.weights import load_weights
from fruits_dask.records import StoreOptions
w = load_weights("fruits", None, StoreOptions())
build_featurizer(w.spec(engine="openvino"), prepare_network("openvino", w))
assert "keras" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path) | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_packages_are_hidden_from_keras_alone() -> None:
    """Not from other threads, and not for longer than its import."""
    code = """
import threading
from fruits_dask.featurize.keras import without_extras

def look(name):
    try:
        __import__(name)
    except ModuleNotFoundError:
        print(name, "hidden")
    else:
        print(name, "found")

with without_extras():
    look("sklearn")
    other = threading.Thread(target=look, args=["sklearn"])
    other.start()
    other.join()
    look("matplotlib")
look("matplotlib")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    answers = ["sklearn hidden", "sklearn found", "matplotlib hidden", "matplotlib found"]
    assert done.stdout.splitlines() == answers


@pytest.mark.slow
def test_what_cannot_be_converted_is_said() -> None:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file["numbers"] = np.zeros(7, np.float32)
    with pytest.raises(EngineError, match=f"{FRUITS_BACKBONE} could not be converted"):
        convert(FRUITS_BACKBONE, stream.getvalue())


def test_a_missing_engine_is_said(monkeypatch: pytest.MonkeyPatch, fruits: Weights) -> None:
    monkeypatch.setattr(featurize, "find_spec", lambda name: None)
    missing = pytest.raises(EngineError, match=r"pip install 'fruits_dask\[openvino\]'")
    with missing:
        prepare_network("openvino", fruits)
    with missing:
        build_featurizer(fruits.spec(engine="openvino"), b"")


@pytest.mark.slow
@pytest.mark.parametrize("engine_name", ["tensorflow", "openvino"])
def test_memory_does_not_grow_with_the_calls(
    engine_name: str, fruits: Weights, tmp_path: Path
) -> None:
    """``model.predict`` in a loop leaks (keras#13118); 60 batches show it, after 10 to warm up."""
    code = f"""
import gc, numpy as np, psutil
from fruits_dask.featurize import build_featurizer, prepare_network
from fruits_dask.featurize.weights import load_weights
from fruits_dask.records import StoreOptions
w = load_weights("fruits", None, StoreOptions())
f = build_featurizer(w.spec(engine="{engine_name}"), prepare_network("{engine_name}", w))
x = np.zeros(({BATCH_SIZE}, w.backbone.image_px, w.backbone.image_px, 3), np.uint8)
rss = psutil.Process().memory_info
for _ in range(10): f(x)
gc.collect(); before = rss().rss
for _ in range(60): f(x)
gc.collect(); print(rss().rss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < 20e6
    assert done.stderr == ""  # TensorFlow's page of greetings is held back


# ---------------------------------------------------------------- once per process


@pytest.mark.slow
def test_a_featurizer_is_built_once(featurizer: Featurizer, weights: Weights, engine: str) -> None:
    """Also when the number of threads is another one, which changes no feature."""
    spec = installed(weights, engine=engine)
    assert get_featurizer(spec) is featurizer
    assert get_featurizer(replace(spec, n_threads=1)) is featurizer


def test_weights_that_were_not_delivered_are_missed(fruits: Weights) -> None:
    spec = replace(fruits.spec(engine="tensorflow"), weights_sha256="0" * 64)
    with pytest.raises(WeightsError, match="not on this worker"):
        get_featurizer(spec)


def test_damaged_weights_are_refused(fruits: Weights) -> None:
    damaged = bytearray(fruits.data)
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(WeightsError, match="network arrived damaged"):
        install_network(fruits.spec(engine="tensorflow"), fruits.sha256, bytes(damaged))
    assert bytes(damaged) not in featurize._networks.values()


# Keras tells of every layer that it skips, before it raises.
@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
@pytest.mark.slow
def test_weights_of_another_layout_do_not_fit(fruits: Weights) -> None:
    """As many numbers, of other shapes: found when Keras loads them, and said."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file["numbers"] = np.zeros(fruits.backbone.n_parameters, np.float32)
    with pytest.raises(WeightsError, match=f"do not fit {FRUITS_BACKBONE}"):
        build_model(fruits.backbone, stream.getvalue())


# ---------------------------------------------------------------- weights files


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_the_table_of_backbones_is_right(backbone: Any) -> None:
    """Its numbers are written by hand; the network says what they must be."""
    import keras  # noqa: PLC0415

    model = keras.applications.MobileNetV2(
        input_shape=(backbone.image_px, backbone.image_px, 3),
        alpha=backbone.alpha,
        include_top=False,
        pooling="avg",
        weights=None,
    )
    assert model.count_params() == backbone.n_parameters
    assert model.output_shape == (None, backbone.n_features)


# Keras 3.15 with NumPy 2, in its own `save_weights`.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.slow
def test_weights_that_keras_saves_are_taken_and_with_their_top_refused(tmp_path: Path) -> None:
    import keras  # noqa: PLC0415

    backbone = find_backbone(FRUITS_BACKBONE)
    side = backbone.image_px
    options = {"input_shape": (side, side, 3), "alpha": backbone.alpha, "weights": None}
    bare = tmp_path / "bare.weights.h5"
    full = tmp_path / "full.weights.h5"
    keras.applications.MobileNetV2(include_top=False, **options).save_weights(bare)
    keras.applications.MobileNetV2(include_top=True, **options).save_weights(full)
    found = load_weights(str(bare), FRUITS_BACKBONE, OPTIONS)
    assert found.data == bare.read_bytes()
    assert found.sha256 == hashlib.sha256(found.data).hexdigest()
    with pytest.raises(WeightsError, match=r"1,691,208 parameters.*include_top=False.*410,208"):
        load_weights(str(full), FRUITS_BACKBONE, OPTIONS)


def test_weights_for_another_backbone_are_refused(tmp_path: Path, fruits: Weights) -> None:
    path = tmp_path / "small.weights.h5"
    path.write_bytes(fruits.data)
    with pytest.raises(WeightsError, match=r"410,208 parameters, but mobilenet_v2 .* 2,257,984"):
        load_weights(str(path), "mobilenet_v2", OPTIONS)


@pytest.mark.parametrize("content", [b"", b"not HDF5", b"\x89HDF\r\n\x1a\n" + b"\0" * 100])
def test_a_file_that_is_no_hdf5_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.h5"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"notes\.h5 is not an HDF5 file"):
        load_weights(str(path), None, OPTIONS)


def test_a_cut_file_is_refused(tmp_path: Path, fruits: Weights) -> None:
    path = tmp_path / "cut.weights.h5"
    path.write_bytes(fruits.data[: len(fruits.data) // 2])
    with pytest.raises(WeightsError):
        load_weights(str(path), FRUITS_BACKBONE, OPTIONS)


def test_a_missing_file_is_said_with_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="Expected imagenet, fruits, or a Keras weights file"):
        load_weights(str(tmp_path / "absent.h5"), None, OPTIONS)


def test_weights_are_read_from_s3(s3_service: S3Service, bucket: str, fruits: Weights) -> None:
    s3_service.client().put_object(Bucket=bucket, Key="w/f.weights.h5", Body=fruits.data)
    found = load_weights(f"s3://{bucket}/w/f.weights.h5", FRUITS_BACKBONE, s3_service.options)
    assert found.sha256 == fruits.sha256


def test_named_weights_go_with_their_backbone_only() -> None:
    with pytest.raises(ConfigError, match="mobilenet_v2_035"):
        load_weights("fruits", "mobilenet_v2", OPTIONS)
    with pytest.raises(ConfigError, match="no ImageNet weights"):
        load_weights("imagenet", FRUITS_BACKBONE, OPTIONS)


def test_an_unknown_backbone_is_told_its_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean mobilenet_v2"):
        load_weights("imagenet", "mobilnet_v2", OPTIONS)


def test_imagenet_weights_are_found_where_keras_keeps_them(keras_home: Path) -> None:
    backbone = BACKBONES["mobilenet_v2"]
    assert imagenet_path(backbone).parent == keras_home / "models"
    assert load_weights("imagenet", None, OPTIONS).data == imagenet_path(backbone).read_bytes()


def test_imagenet_weights_without_a_network_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def unreachable(url: str, **options: object) -> None:
        asked.append(url)
        raise URLError("no route to host")

    monkeypatch.setattr(weights_module, "urlopen", unreachable)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_weights("imagenet", None, OPTIONS)
    for words in (str(tmp_path), "no route to host", "--weights FILE", "KERAS_HOME", "fruits"):
        assert words in str(caught.value)
    assert [url.rpartition("/")[2] for url in asked] == [BACKBONES["mobilenet_v2"].imagenet_file]
    assert list(tmp_path.rglob("*.h5")) == []


# ---------------------------------------------------------------- the bundled weights


def test_the_bundled_file_is_small_and_float16(fruits: Weights) -> None:
    kinds: set[np.dtype[Any]] = set()

    def collect(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            kinds.add(item.dtype)

    with h5py.File(io.BytesIO(fruits.data)) as file:
        file.visititems(collect)
    assert len(fruits.data) <= 2e6
    assert kinds == {np.dtype(np.float16)}


@pytest.mark.slow
def test_the_bundled_weights_are_worth_using(shared: Path, fruits: Weights) -> None:
    """A linear probe names the fruit: on Fruits-360 nearly always, on store photos quite often."""
    start = time.monotonic()
    data = shared / "data"
    studio = probe(fruits, data / "fruits360", every_training=3, every_test=1)
    store = probe(fruits, data / "grocery", every_training=1, every_test=1)
    assert studio >= 0.99
    assert store >= 0.30
    assert time.monotonic() - start < PROBE_SECONDS


def probe(weights: Weights, root: Path, *, every_training: int, every_test: int) -> float:
    """Fit a logistic regression on Training, and return its accuracy on Test."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    training, labels = featurize_folder(weights, root / "Training", every=every_training)
    test, truth = featurize_folder(weights, root / "Test", every=every_test)
    assert len(test) >= 190
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    return float(model.fit(training, labels).score(test, truth))


def featurize_folder(weights: Weights, folder: Path, *, every: int) -> tuple[Features, list[str]]:
    spec = installed(weights)
    paths = sorted(folder.rglob("*.jpg"))[::every]
    featurizer = get_featurizer(spec)
    steps = [*range(0, len(paths), 512), len(paths)]
    rows = [
        featurizer(np.stack([decode(p.read_bytes(), image_px=spec.image_px) for p in paths[a:b]]))
        for a, b in pairwise(steps)
    ]
    return np.concatenate(rows), [path.parent.name for path in paths]
