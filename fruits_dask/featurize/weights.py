"""Weights files: found once by the driver, checked, and given to the workers as bytes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from urllib.request import urlopen

from ..errors import ConfigError, StorageError, WeightsError
from ..records import FeaturizerSpec, StoreOptions
from ..storage import LocalStore, normalize, open_store
from .backbones import (
    DEFAULT_BACKBONE,
    FRUITS_BACKBONE,
    IMAGENET_URL,
    Backbone,
    find_backbone,
)

logger = logging.getLogger(__name__)

FRUITS_FILE = "fruits.weights.h5"
_DOWNLOAD_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A weights file and the network it belongs to."""

    name: str
    """``imagenet``, ``fruits`` or the address of a file."""
    backbone: Backbone
    """The network."""
    data: bytes
    """Content of the file."""
    sha256: str
    """SHA-256 of the content, hexadecimal."""

    def spec(
        self, *, engine: str, precision: str = "float32", n_threads: int = 1
    ) -> FeaturizerSpec:
        """Describe the featurizer that these weights make."""
        return FeaturizerSpec(
            backbone=self.backbone.name,
            engine=engine,
            precision=precision,
            weights_sha256=self.sha256,
            image_px=self.backbone.image_px,
            n_features=self.backbone.n_features,
            preprocessing=self.backbone.preprocessing,
            n_threads=n_threads,
        )


def load_weights(name: str, backbone_name: str | None, options: StoreOptions) -> Weights:
    """Find weights and check that they fit.

    Parameters
    ----------
    name : str
        ``imagenet``, ``fruits``, or a Keras weights file (local or s3://).
    backbone_name : str or None
        Name in the table of backbones; None for the usual one of these weights.
    options : StoreOptions
        How to reach S3.

    Returns
    -------
    Weights
        The bytes and their network.

    Raises
    ------
    WeightsError
        If there is no such file, or it is not for this backbone.
    ConfigError
        If the backbone is unknown, or another than the one that the named weights are for.
    """
    default = FRUITS_BACKBONE if name == "fruits" else DEFAULT_BACKBONE
    backbone = find_backbone(backbone_name or default)
    if name == "fruits":
        data = _fruits(backbone)
    elif name == "imagenet":
        data = _imagenet(backbone)
    else:
        data = _file(name, options)
    _check_fit(name, data, backbone)
    sha256 = hashlib.sha256(data).hexdigest()
    return Weights(name=normalize_name(name), backbone=backbone, data=data, sha256=sha256)


def normalize_name(name: str) -> str:
    """Return ``imagenet`` and ``fruits`` as they are, anything else as a normalized address."""
    return name if name in ("imagenet", "fruits") else normalize(name)


def imagenet_path(backbone: Backbone) -> Path:
    """Where keras.applications keeps the ImageNet weights of a backbone on this machine."""
    home = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
    return Path(home, "models", str(backbone.imagenet_file))


def _fruits(backbone: Backbone) -> bytes:
    if backbone.name != FRUITS_BACKBONE:
        raise ConfigError(
            f"the fruits weights are for --backbone {FRUITS_BACKBONE}, not {backbone.name}; "
            "leave --backbone out"
        )
    return resources.files("fruits_dask").joinpath("weights", FRUITS_FILE).read_bytes()


def _imagenet(backbone: Backbone) -> bytes:
    if backbone.imagenet_file is None:
        raise ConfigError(
            f"there are no ImageNet weights for --backbone {backbone.name}; give a file with "
            f"--weights, or use --backbone {DEFAULT_BACKBONE}"
        )
    path = imagenet_path(backbone)
    return path.read_bytes() if path.is_file() else _download(backbone, path)


def _download(backbone: Backbone, path: Path) -> bytes:
    """Fetch what keras.applications would, to where it would, without importing TensorFlow here."""
    url = IMAGENET_URL + str(backbone.imagenet_file)
    logger.info("downloading %s to %s", url, path)
    try:
        with urlopen(url, timeout=_DOWNLOAD_SECONDS) as answer:  # noqa: S310 - a constant https URL
            data = bytes(answer.read())
    except OSError as exc:
        raise WeightsError(
            f"the ImageNet weights are neither in {path} nor could they be downloaded ({exc}). "
            "Download them on another machine from keras.applications and give the file with "
            "--weights FILE, set KERAS_HOME to a folder that has models/"
            f"{backbone.imagenet_file}, or use the bundled --weights fruits"
        ) from exc
    _check_fit("imagenet", data, backbone)
    try:
        LocalStore().write(str(path), data)
    except StorageError as exc:
        logger.warning("the ImageNet weights could not be kept for the next run: %s", exc)
    return data


def _file(name: str, options: StoreOptions) -> bytes:
    path = normalize_name(name)
    try:
        return open_store(path, options).read(path)
    except StorageError as exc:
        raise WeightsError(
            f"--weights {name}: {exc}. Expected imagenet, fruits, or a Keras weights file"
        ) from exc


def _check_fit(name: str, data: bytes, backbone: Backbone) -> None:
    found = _n_parameters(name, data)
    if found != backbone.n_parameters:
        raise WeightsError(
            f"--weights {name} holds {found:,} parameters, but {backbone.name} without its "
            f"classification layer (include_top=False) has {backbone.n_parameters:,}; "
            "give weights that were saved for it, or another --backbone"
        )


def _n_parameters(name: str, data: bytes) -> int:
    import h5py  # noqa: PLC0415 - not needed to print help

    sizes: list[int] = []

    def count(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            sizes.append(int(item.size or 0))

    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            file.visititems(count)
    except OSError as exc:
        raise WeightsError(
            f"--weights {name} is not an HDF5 file; expected what Keras save_weights writes"
        ) from exc
    return sum(sizes)
