"""Pixels to vectors: the seam behind which TensorFlow lives, and its cache in every process.

The driver prepares a network once, with `prepare_network`, and delivers it; every worker keeps it
with `install_network` and builds its featurizer from it. Importing this package imports no engine.
An engine is imported when its featurizer is first built, which happens on the workers only.
"""

from __future__ import annotations

import hashlib
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from ..errors import EngineError, WeightsError
from ..records import Features, FeaturizerSpec, Pixels

if TYPE_CHECKING:
    from .weights import Weights

_lock = threading.Lock()
_networks: dict[FeaturizerSpec, bytes] = {}
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


def prepare_network(engine: str, weights: Weights) -> bytes:
    """Make what the featurizers of an engine are built from; once, where the run is.

    Parameters
    ----------
    engine : str
        ``tensorflow`` or ``openvino``.
    weights : Weights
        A weights file and its backbone.

    Returns
    -------
    bytes
        For OpenVINO the converted network, after a second or two; for TensorFlow the file as it is.

    Raises
    ------
    EngineError
        If the engine is not installed here, or the network cannot be converted.
    """
    check_engine(engine)
    if engine != "openvino":
        return weights.data
    from .convert import convert  # noqa: PLC0415 - an extra

    return convert(weights.backbone.name, weights.data)


def install_network(spec: FeaturizerSpec, sha256: str, data: bytes) -> None:
    """Keep a prepared network for the featurizer of this process.

    Parameters
    ----------
    spec : FeaturizerSpec
        The featurizer.
    sha256 : str
        Of the network, as the sender computed it, hexadecimal.
    data : bytes
        What `prepare_network` made.

    Raises
    ------
    WeightsError
        If the bytes are not those that were sent.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise WeightsError(f"the network arrived damaged: SHA-256 is {found}, expected {sha256}")
    _networks[spec] = data


def get_featurizer(spec: FeaturizerSpec) -> Featurizer:
    """Return the featurizer of this process, building it at the first call.

    Parameters
    ----------
    spec : FeaturizerSpec
        Which one; its network must have been installed.

    Returns
    -------
    Featurizer
        The same object for the same `spec`.

    Raises
    ------
    WeightsError
        If the network was not installed, or the weights do not fit the backbone.
    EngineError
        If the engine is not installed, or cannot run the network.
    """
    with _lock:  # one build, whoever comes first: the warm-up thread or the first task
        if spec not in _featurizers:
            if spec not in _networks:
                raise WeightsError(
                    f"the network of the weights {spec.weights_sha256[:12]} is not on this "
                    "worker; the driver delivers it when the cluster is opened"
                )
            _featurizers[spec] = build_featurizer(spec, _networks[spec])
        return _featurizers[spec]


def build_featurizer(spec: FeaturizerSpec, network: bytes) -> Featurizer:
    """Build a featurizer.

    Parameters
    ----------
    spec : FeaturizerSpec
        Which one.
    network : bytes
        What `prepare_network` made.

    Returns
    -------
    Featurizer
        A new object.

    Raises
    ------
    WeightsError
        If the weights do not fit the backbone.
    EngineError
        If the engine is not installed, or cannot run the network.
    """
    check_engine(spec.engine)
    if spec.engine == "openvino":
        from .openvino import OpenVinoFeaturizer  # noqa: PLC0415 - an extra

        return OpenVinoFeaturizer(spec, network)
    from .keras import KerasFeaturizer  # noqa: PLC0415 - TensorFlow takes seconds to import

    return KerasFeaturizer(spec, network)
