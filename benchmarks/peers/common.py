"""What the peers of the speed benchmark share: arguments, pixels, the model, PCA and tables.

TensorFlow and Pillow are imported where they are used, so that a driver that only hands out work
does not pay for them.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

N_COMPONENTS = 100
IMAGE_PX = 224
BATCH_SIZE = 64
_WEIGHTS = "shared/keras/models/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"

Matrix = NDArray[np.float64]

# Before TensorFlow is imported, here and in every worker that imports this module.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Read the command line; refuse an output that holds something."""
    beside = Path(__file__).resolve().parents[2].parent
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--input", type=Path, default=beside / "shared/data/fruits360")
    parser.add_argument("--output", type=Path, required=True, help="a new or an empty folder")
    parser.add_argument("--weights", type=Path, default=beside / _WEIGHTS)
    parser.add_argument("--limit", type=int, help="take this many photos, evenly spaced")
    arguments = parser.parse_args()
    arguments.input = arguments.input.resolve(strict=True)
    arguments.weights = arguments.weights.resolve(strict=True)
    arguments.output = arguments.output.resolve()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"--output {arguments.output} is not empty; expected a new or an empty folder")
    (arguments.output / "pca").mkdir(parents=True)
    return arguments


def list_photos(root: Path, limit: int | None) -> list[str]:
    """List the photos below a folder, sorted; with a limit, an evenly spaced sample of them."""
    photos = sorted(str(path) for path in root.rglob("*.jpg"))
    if limit is None or limit >= len(photos):
        return photos
    return [photos[i] for i in np.linspace(0, len(photos) - 1, limit).astype(int)]


def label_and_split(path: str) -> tuple[str, str]:
    """Name the parent and the grandparent folder of a photo."""
    parts = path.split("/")
    return parts[-2], parts[-3]


class Stopwatch:
    """Seconds that each phase took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def print_summary(watch: Stopwatch, n_images: int, ratio: Matrix) -> None:
    """Print the one JSON line that the caller reads; the ratio is the sum over the components."""
    summary = {
        "n_images": n_images,
        "seconds": watch.seconds,
        "explained_variance_ratio": round(float(ratio.sum()), 6),
    }
    print(json.dumps(summary), flush=True)


def limit_tensorflow_threads(n_threads: int | None) -> None:
    """Bound TensorFlow's pools, if they shall be; only before its first operation."""
    import tensorflow as tf  # noqa: PLC0415

    if n_threads is None:
        return
    tf.config.threading.set_intra_op_parallelism_threads(n_threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def build_model(weights: Path) -> Any:  # noqa: ANN401 - Keras is untyped
    """Build MobileNetV2 without its head and load the weights."""
    import keras  # noqa: PLC0415

    shape = (IMAGE_PX, IMAGE_PX, 3)
    model = keras.applications.MobileNetV2(
        weights=None, include_top=False, pooling="avg", input_shape=shape
    )
    model.load_weights(weights)
    return model


@lru_cache(maxsize=1)
def model_of_worker(weights: bytes, n_threads: int | None) -> Any:  # noqa: ANN401
    """Build the model from the bytes of a weights file, once in a process."""
    limit_tensorflow_threads(n_threads)
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        Path(file.name).write_bytes(weights)
        return build_model(Path(file.name))


def decode(content: bytes) -> NDArray[np.uint8]:
    """Decode a photo and resize it with Pillow, as `keras.utils.load_img` does."""
    from PIL import Image  # noqa: PLC0415

    with Image.open(BytesIO(content)) as image:
        resized = image.convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BILINEAR)
        return np.asarray(resized)


def embed(
    model: Any,  # noqa: ANN401
    contents: Sequence[bytes],
    batch_size: int = BATCH_SIZE,
) -> NDArray[np.float32]:
    """Turn the bytes of photos into (n, 1280) features."""
    from keras.applications.mobilenet_v2 import preprocess_input  # noqa: PLC0415

    pixels = np.stack([decode(content) for content in contents]).astype(np.float32)
    return model.predict(preprocess_input(pixels), batch_size=batch_size, verbose=0)


def vectors_column(matrix: NDArray[np.float32]) -> pa.Array:
    """Make a list<float32> column of the rows of a matrix, without a copy."""
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(matrix.ravel(), pa.float32()))


def features_table(paths: Iterable[str], features: NDArray[np.float32]) -> pa.Table:
    """Make the features table: path, label, split, features."""
    paths = list(paths)
    labels, splits = zip(*map(label_and_split, paths), strict=True)
    return pa.table(
        {
            "path": pa.array(paths, pa.string()),
            "label": pa.array(labels, pa.string()),
            "split": pa.array(splits, pa.string()),
            "features": vectors_column(features),
        }
    )


def reduce_with_sklearn(table: pa.Table, output: Path, watch: Stopwatch) -> tuple[int, Matrix]:
    """Fit PCA on the Training rows, project all, write model, scores and CSV."""
    from sklearn.decomposition import PCA  # noqa: PLC0415

    with watch.phase("pca"):
        vectors = table["features"].combine_chunks().flatten().to_numpy()
        matrix = vectors.reshape(len(table), -1).astype(np.float64)
        training = np.asarray(table["split"].to_pylist()) == "Training"
        # Exact, and the fastest for thousands of rows of 1,280 numbers.
        pca = PCA(N_COMPONENTS, svd_solver="covariance_eigh").fit(matrix[training])
        scores = pca.transform(matrix).astype(np.float32)
    with watch.phase("write"):
        write_model(output, pca.components_, pca.mean_, pca.explained_variance_ratio_)
        keys = table.select(["path", "label", "split"])
        scored = keys.append_column("scores", vectors_column(scores))
        (output / "pca" / "scores").mkdir()
        pq.write_table(scored, output / "pca" / "scores" / "part-00000.parquet")
        write_scores_csv(keys, scores, output)
    return len(table), pca.explained_variance_ratio_


def write_model(output: Path, components: Matrix, mean: Matrix, ratio: Matrix) -> None:
    """Write pca/model.npz."""
    np.savez(
        output / "pca" / "model.npz",
        components=components,
        mean=mean,
        explained_variance_ratio=ratio,
    )


def write_scores_csv(keys: pa.Table, scores: NDArray[np.float32], output: Path) -> None:
    """Write pca/scores.csv: path, label, split, pc_001 and so on."""
    table = keys
    for number, column in enumerate(scores.T, start=1):
        table = table.append_column(f"pc_{number:03d}", pa.array(column))
    pyarrow.csv.write_csv(table, output / "pca" / "scores.csv")
