"""Pixels to vectors: the seam behind which TensorFlow lives, and its cache in every process.

Importing this package imports no engine. An engine is imported when its featurizer is first built,
which happens on the workers only.
"""

from __future__ import annotations

import hashlib
import threading
from importlib.util import find_spec
from typing import Protocol

from ..errors import EngineError, WeightsError
from ..records import Features, FeaturizerSpec, Pixels

_lock = threading.Lock()
_weights: dict[str, bytes] = {}
_featurizers: dict[FeaturizerSpec, Featurizer] = {}


class Featurizer(Protocol):
    """Turns decoded images into feature vectors; not called by two threads at a time."""

    def __call__(self, pixels: Pixels) -> Features:
        """Compute features.

        Parameters
        ----------
        pixels : ndarray, (n_images, image_px, image_px, 3) uint8
            RGB images; any number of them.

        Returns
        -------
        ndarray, (n_images, n_features) float32
            One row an image. A row does not depend on the other images.
        """


def check_engine(engine: str) -> None:
    """Refuse an engine that is not installed, without importing it.

    Raises
    ------
    EngineError
        Saying how to install it.
    """
    if find_spec(engine) is None:
        raise EngineError(
            f"the engine {engine} is not installed here: pip install 'fruits_dask[{engine}]'"
        )


def install_weights(sha256: str, data: bytes) -> None:
    """Keep the bytes of a weights file for the featurizers of this process.

    Parameters
    ----------
    sha256 : str
        What the sender computed, hexadecimal.
    data : bytes
        The file.

    Raises
    ------
    WeightsError
        If the bytes are not those that were sent.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(f"the weights arrived damaged: SHA-256 is {found}, expected {sha256}")
    _weights[sha256] = data


def get_featurizer(spec: FeaturizerSpec) -> Featurizer:
    """Return the featurizer of this process, building it at the first call.

    Parameters
    ----------
    spec : FeaturizerSpec
        Which one; its weights must have been installed.

    Returns
    -------
    Featurizer
        The same object for the same `spec`.

    Raises
    ------
    WeightsError
        If the weights were not installed or do not fit the backbone.
    EngineError
        If the engine is not installed, or cannot run the network.
    """
    with _lock:  # one build, whoever comes first: the warm-up thread or the first task
        if spec not in _featurizers:
            _featurizers[spec] = _build(spec)
        return _featurizers[spec]


def _build(spec: FeaturizerSpec) -> Featurizer:
    data = _weights.get(spec.weights_sha256)
    if data is None:
        raise WeightsError(
            f"weights {spec.weights_sha256[:12]} are not on this worker; the driver delivers them "
            "when the cluster is opened"
        )
    check_engine(spec.engine)
    if spec.engine == "openvino":
        from .openvino import OpenVinoFeaturizer  # noqa: PLC0415 - an extra

        return OpenVinoFeaturizer(spec, data)
    from .keras import KerasFeaturizer  # noqa: PLC0415 - TensorFlow takes seconds to import

    return KerasFeaturizer(spec, data)
