"""A Keras network to OpenVINO's own format, without TensorFlow.

Keras builds the network on its OpenVINO backend: importing that takes a third of the time and of
the memory of TensorFlow. The backend of Keras is fixed once it is imported, so this runs in a
process of its own, and the worker that asks is free to use TensorFlow for another job.

Channels come first, because OpenVINO computes in that order: exported with channels last, every
convolution is wrapped in two transpositions, and the network is three times slower.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..errors import EngineError
from .backbones import find_backbone

MODEL_FILE = "model.xml"
_WEIGHTS_FILE = "weights"
_SECONDS = 300


def convert(backbone_name: str, weights: bytes, folder: Path) -> Path:
    """Build a network from a Keras weights file and write it for OpenVINO.

    Parameters
    ----------
    backbone_name : str
        Name in the table of backbones.
    weights : bytes
        A Keras weights file.
    folder : Path
        Where to write; belongs to the caller.

    Returns
    -------
    Path
        The network: (n, 3, image_px, image_px) float32, preprocessed -> (n, n_features) float32.

    Raises
    ------
    EngineError
        If it cannot be converted.
    """
    Path(folder, _WEIGHTS_FILE).write_bytes(weights)
    command = [sys.executable, "-m", __name__, backbone_name, str(folder)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "KERAS_BACKEND": "openvino", "PYTHONPATH": path}
    try:
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=_SECONDS)  # noqa: S603 - this very module
    except subprocess.CalledProcessError as exc:
        reason = exc.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise EngineError(f"{backbone_name} could not be converted for OpenVINO: {reason}") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise EngineError(f"{backbone_name} could not be converted for OpenVINO: {exc}") from exc
    return Path(folder, MODEL_FILE)


def _main(backbone_name: str, folder: Path) -> None:
    import keras  # noqa: PLC0415 - in this process only

    from .keras import build_model  # noqa: PLC0415 - the same network as for TensorFlow

    keras.config.set_image_data_format("channels_first")
    model = build_model(find_backbone(backbone_name), Path(folder, _WEIGHTS_FILE).read_bytes())
    model.export(str(Path(folder, MODEL_FILE)), format="openvino", verbose=False)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
