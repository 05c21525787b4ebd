"""A Keras network to OpenVINO's own format, without TensorFlow.

Keras builds the network on its OpenVINO backend: importing that takes a third of the time and of
the memory of TensorFlow. The backend of Keras is fixed once it is imported, so this runs in a
process of its own, and the process that asks is free to use TensorFlow for another job.

Channels come first, because OpenVINO computes in that order: exported with channels last, every
convolution is wrapped in two transpositions, and the network is three times slower.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import EngineError
from .backbones import find_backbone

_FILES = ("model.xml", "model.bin")
_WEIGHTS_FILE = "weights"
_SECONDS = 300


def convert(backbone_name: str, weights: bytes) -> bytes:
    """Build a network from a Keras weights file, in OpenVINO's format.

    Parameters
    ----------
    backbone_name : str
        Name in the table of backbones.
    weights : bytes
        A Keras weights file.

    Returns
    -------
    bytes
        The network, a ZIP archive of its two files: (n, 3, image_px, image_px) float32,
        preprocessed -> (n, n_features) float32.

    Raises
    ------
    EngineError
        If it cannot be converted.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "KERAS_BACKEND": "openvino", "PYTHONPATH": path}
    try:
        with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
            Path(folder, _WEIGHTS_FILE).write_bytes(weights)
            command = [sys.executable, "-m", __name__, backbone_name, folder]
            subprocess.run(command, env=env, check=True, capture_output=True, timeout=_SECONDS)  # noqa: S603 - this very module
            return _pack(Path(folder))
    except subprocess.CalledProcessError as exc:
        reason = exc.stderr.decode(errors="replace").strip().rpartition("\n")[2] or exc
        raise EngineError(f"{backbone_name} could not be converted for OpenVINO: {reason}") from exc
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise EngineError(f"{backbone_name} could not be converted for OpenVINO: {exc}") from exc


def unpack(network: bytes) -> tuple[bytes, bytes]:
    """Take a network apart.

    Parameters
    ----------
    network : bytes
        As `convert` made it.

    Returns
    -------
    model : bytes
        Its layers, XML.
    weights : bytes
        Its numbers.
    """
    with zipfile.ZipFile(io.BytesIO(network)) as archive:
        model, weights = (archive.read(name) for name in _FILES)
    return model, weights


def _pack(folder: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in _FILES:
            archive.write(folder / name, name)
    return stream.getvalue()


def _main(backbone_name: str, folder: Path) -> None:
    from .keras import build_model, without_extras  # noqa: PLC0415 - the network of TensorFlow

    with without_extras():
        import keras  # noqa: PLC0415 - in this process only

    keras.config.set_image_data_format("channels_first")
    model = build_model(find_backbone(backbone_name), Path(folder, _WEIGHTS_FILE).read_bytes())
    model.export(str(folder / _FILES[0]), format="openvino", verbose=False)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
