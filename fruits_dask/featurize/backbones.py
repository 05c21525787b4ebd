"""The table of backbones: what is known of each network without building it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """One network of keras.applications, global average pooling at its end."""

    name: str
    """Name in settings and in the metadata of a result."""
    alpha: float
    """Width multiplier of MobileNetV2."""
    image_px: int
    """Side of the square input, in pixels."""
    n_features: int
    """Length of a feature vector."""
    n_parameters: int
    """Numbers in a weights file without the classification layer."""
    n_float32_layers: int
    """Convolutions at the input that stay in float32 when the rest is bfloat16."""
    preprocessing: str
    """How 8-bit RGB becomes the input of the network."""
    imagenet_file: str | None
    """Name under which keras.applications keeps its ImageNet weights, if there are any."""


# Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
IMAGENET_URL = "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
_SCALE = "RGB scaled to [-1, 1]: x / 127.5 - 1"
BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="mobilenet_v2",
            alpha=1.0,
            image_px=224,
            n_features=1280,
            n_parameters=2_257_984,
            n_float32_layers=6,
            preprocessing=_SCALE,
            imagenet_file="mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
        ),
        Backbone(
            name="mobilenet_v2_035",
            alpha=0.35,
            image_px=128,
            n_features=1280,
            n_parameters=410_208,
            n_float32_layers=6,
            preprocessing=_SCALE,
            imagenet_file=None,
        ),
    )
}
DEFAULT_BACKBONE = "mobilenet_v2"
FRUITS_BACKBONE = "mobilenet_v2_035"


def find_backbone(name: str) -> Backbone:
    """Look up a backbone.

    Parameters
    ----------
    name : str
        Its name.

    Returns
    -------
    Backbone
        Its row of the table.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"there is no backbone {name!r}; {hint}known are {', '.join(sorted(BACKBONES))}"
        )
    return BACKBONES[name]
