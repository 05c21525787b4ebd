"""MobileNetV2 of keras.applications as a frozen TensorFlow function."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError
from ..records import Features, FeaturizerSpec, Pixels
from .backbones import Backbone, find_backbone

logger = logging.getLogger(__name__)

_GREETING = re.compile(
    rb"WARNING: All log messages before absl|[IWE]\d{4} |To enable the following"
)
# Among the best of 2 to 64 for a frozen MobileNetV2 on one to two CPU threads: 4 is as fast on
# processors with small caches, 16 on those with large ones. A row of features does not depend on
# it, to the last bit.
BATCH_SIZE = 8
# What Keras imports only to offer more, where it is installed: a second, most of it on scipy.
_EXTRAS = ("matplotlib", "pandas", "sklearn")


class KerasFeaturizer:
    """A backbone whose variables are constants of one traced function with a fixed signature.

    A frozen function runs about twice as fast as ``model.predict`` and does not leak memory when it
    is called in a loop.

    Parameters
    ----------
    spec : FeaturizerSpec
        Backbone, input size and number of threads.
    weights : bytes
        A Keras weights file for this backbone.

    Raises
    ------
    WeightsError
        If Keras cannot load the weights into the backbone.
    """

    def __init__(self, spec: FeaturizerSpec, weights: bytes) -> None:
        _import_tensorflow(spec.n_threads)
        self._n_features = spec.n_features
        model = build_model(find_backbone(spec.backbone), weights)
        self._function = _freeze(model, (BATCH_SIZE, spec.image_px, spec.image_px, 3))

    def __call__(self, pixels: Pixels) -> Features:
        """Compute features; see `Featurizer`."""
        features = np.empty((len(pixels), self._n_features), np.float32)
        for start in range(0, len(pixels), BATCH_SIZE):
            batch = pixels[start : start + BATCH_SIZE]
            features[start : start + len(batch)] = self._function(pad(batch, BATCH_SIZE))[
                : len(batch)
            ]
        return features


def build_model(backbone: Backbone, weights: bytes) -> Any:  # noqa: ANN401 - Keras is untyped
    """Build the Keras model of a backbone and load its weights.

    Parameters
    ----------
    backbone : Backbone
        The network.
    weights : bytes
        A Keras weights file, of the current or of the legacy HDF5 layout.

    Returns
    -------
    keras.Model
        (n, image_px, image_px, 3) float32, preprocessed -> (n, n_features) float32; with the
        channels first where Keras is set so.

    Raises
    ------
    WeightsError
        If the file does not fit.
    """
    import keras  # noqa: PLC0415

    side = backbone.image_px
    is_last = keras.config.image_data_format() == "channels_last"
    model = keras.applications.MobileNetV2(
        input_shape=(side, side, 3) if is_last else (3, side, side),
        alpha=backbone.alpha,
        include_top=False,
        pooling="avg",
        weights=None,
    )
    # Keras decides by the name of a file how to read it.
    suffix = ".h5" if _is_legacy(weights) else ".weights.h5"
    with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
        path = Path(folder, f"backbone{suffix}")
        path.write_bytes(weights)
        try:
            model.load_weights(path)
        except (ValueError, OSError, KeyError) as exc:
            raise WeightsError(f"the weights do not fit {backbone.name}: {exc}") from exc
    return model


@contextmanager
def without_extras() -> Iterator[None]:
    """Keep Keras from importing packages that it can do without.

    For its import only, but what it did not find then, Keras lacks until the process ends: its
    wrappers for scikit-learn, and data frames as input of `fit`.
    """
    finder = _Absent(_EXTRAS)
    # New lists, because other threads may be going through this one.
    sys.meta_path = [finder, *sys.meta_path]
    try:
        yield
    finally:
        sys.meta_path = [other for other in sys.meta_path if other is not finder]


class _Absent(MetaPathFinder):
    """Says that packages are not installed, to this thread alone: a worker may have other work."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{fullname} is not needed", name=fullname)


def _import_tensorflow(n_threads: int) -> None:
    with _quiet_import(), without_extras():
        import tensorflow as tf  # noqa: PLC0415

        try:
            # OMP_NUM_THREADS does not bound TensorFlow's own pools; this does, before first use.
            tf.config.threading.set_intra_op_parallelism_threads(n_threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        except RuntimeError:
            logger.debug("TensorFlow runs already; its number of threads stays")
        tf.config.list_physical_devices()  # here, because it complains where there is no GPU


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Hold back what C++ writes to standard error, and let through what is no log line.

    TensorFlow 2.21 writes a page to every log before any of its settings takes effect. This can go
    when TF_CPP_MIN_LOG_LEVEL is honoured from the first line on.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not _GREETING.match(line)))


def _freeze(model: Any, shape: tuple[int, ...]) -> Callable[[Pixels], Features]:  # noqa: ANN401
    import tensorflow as tf  # noqa: PLC0415
    from tensorflow.python.framework.convert_to_constants import (  # noqa: PLC0415
        convert_variables_to_constants_v2,
    )

    def forward(pixels: Any) -> Any:  # noqa: ANN401
        # `preprocess_input` of keras.applications.mobilenet_v2, operation by operation.
        return model(tf.cast(pixels, tf.float32) / 127.5 - 1.0, training=False)

    signature = tf.TensorSpec(shape, tf.uint8)
    frozen = convert_variables_to_constants_v2(
        tf.function(forward).get_concrete_function(signature)
    )

    def run(pixels: Pixels) -> Features:
        (output,) = frozen(tf.constant(pixels))
        return np.asarray(output.numpy(), dtype=np.float32)

    return run


def pad(batch: Pixels, size: int) -> Pixels:
    """Fill a batch with black images to `size`, because a compiled network has one shape."""
    missing = size - len(batch)
    return np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else batch


def _is_legacy(weights: bytes) -> bool:
    import h5py  # noqa: PLC0415

    with h5py.File(io.BytesIO(weights), "r") as file:
        return "layer_names" in file.attrs
