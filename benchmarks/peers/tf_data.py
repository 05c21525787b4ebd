"""Peer: one process; tf.data reads, decodes and resizes, model.predict, scikit-learn's PCA.

python benchmarks/peers/tf_data.py --output OUTPUT
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import (
    BATCH_SIZE,
    IMAGE_PX,
    Stopwatch,
    build_model,
    features_table,
    list_photos,
    parse_arguments,
    print_summary,
    reduce_with_sklearn,
)
from numpy.typing import NDArray


def compute_features(paths: list[str], weights: Path) -> NDArray[np.float32]:
    """Run the photos through tf.data and the model."""
    import tensorflow as tf  # noqa: PLC0415
    from keras.applications.mobilenet_v2 import preprocess_input  # noqa: PLC0415

    def load(path: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        return preprocess_input(tf.image.resize(pixels, (IMAGE_PX, IMAGE_PX), method="bilinear"))

    photos = (
        tf.data.Dataset.from_tensor_slices(paths)
        .map(load, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(BATCH_SIZE)
        .prefetch(tf.data.AUTOTUNE)
    )
    return build_model(weights).predict(photos, verbose=0)


def write_features(paths: list[str], weights: Path, output: Path) -> pa.Table:
    """Compute the features and write them as Parquet."""
    table = features_table(paths, compute_features(paths, weights))
    (output / "features").mkdir()
    pq.write_table(table, output / "features" / "part-00000.parquet")
    return table


def main() -> None:
    """Do the whole job."""
    arguments = parse_arguments(__doc__)
    watch = Stopwatch()
    with watch.phase("features"):
        paths = list_photos(arguments.input, arguments.limit)
        table = write_features(paths, arguments.weights, arguments.output)
    n_images, ratio = reduce_with_sklearn(table, arguments.output, watch)
    print_summary(watch, n_images, ratio)


if __name__ == "__main__":
    main()
