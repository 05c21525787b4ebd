"""The networks of keras.applications on OpenVINO: the same features, in less time."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import EngineError
from ..records import Features, FeaturizerSpec, Pixels
from .backbones import find_backbone
from .convert import unpack
from .keras import pad

# The best of 1 to 16 for MobileNetV2 where a core has 1 MiB of second-level cache: what most layers
# take and give must fit in there. A row of features does not depend on it, to the last bit.
BATCH_SIZE = 2
_CONVOLUTIONS = ("Convolution", "GroupConvolution")


class OpenVinoFeaturizer:
    """A backbone compiled by OpenVINO, with one stream for each thread.

    In float32 it is one network, with the scaling of the pixels inside. In bfloat16 the first
    layers stay in float32, because they alone lose what bfloat16 cannot hold
    (docs/decisions/0008): two networks, one after the other.

    Parameters
    ----------
    spec : FeaturizerSpec
        Backbone, input size, precision and number of threads.
    network : bytes
        As `convert` made it.

    Raises
    ------
    EngineError
        If this processor has no bfloat16.
    """

    def __init__(self, spec: FeaturizerSpec, network: bytes) -> None:
        import openvino  # noqa: PLC0415 - an extra

        core = openvino.Core()
        self._n_features = spec.n_features
        model = _with_scaling(core.read_model(*unpack(network)))
        model.reshape([BATCH_SIZE, spec.image_px, spec.image_px, 3])
        networks = [
            _compiled(core, part, precision, spec.n_threads)
            for part, precision in _parts(model, spec)
        ]
        self._lanes = [_Lane(networks) for _ in range(spec.n_threads)]

    def __call__(self, pixels: Pixels) -> Features:
        """Compute features; see `Featurizer`."""
        features = np.empty((len(pixels), self._n_features), np.float32)
        starts, n_lanes = range(0, len(pixels), BATCH_SIZE), len(self._lanes)
        if n_lanes == 1:
            self._lanes[0].run(pixels, starts, features)
            return features
        with ThreadPoolExecutor(n_lanes) as pool:
            turns = [starts[i::n_lanes] for i in range(n_lanes)]
            list(pool.map(lambda lane, mine: lane.run(pixels, mine, features), self._lanes, turns))
        return features


class _Lane:
    """One stream: the networks of a featurizer, each reading what the one before it wrote."""

    def __init__(self, networks: list[Any]) -> None:
        self._requests = [network.create_infer_request() for network in networks]
        for before, after in pairwise(self._requests):
            after.set_input_tensor(before.get_output_tensor())

    def run(self, pixels: Pixels, starts: Iterable[int], features: Features) -> None:
        """Fill the rows of `features` for the batches that begin at `starts`."""
        first, *others = self._requests
        for start in starts:
            batch = pixels[start : start + BATCH_SIZE]
            first.infer([pad(batch, BATCH_SIZE)], share_inputs=True)
            for request in others:
                request.infer()
            found = self._requests[-1].get_output_tensor().data
            features[start : start + len(batch)] = found[: len(batch)]


def _with_scaling(model: Any) -> Any:  # noqa: ANN401
    """Let a network take 8-bit RGB, channels last: `preprocess_input`, operation by operation."""
    from openvino import Layout, Type  # noqa: PLC0415
    from openvino.preprocess import PrePostProcessor  # noqa: PLC0415

    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(Type.u8).set_layout(Layout("NHWC"))
    steps.input().model().set_layout(Layout("NCHW"))
    steps.input().preprocess().convert_element_type(Type.f32).scale(127.5).mean(1.0)
    return steps.build()


def _parts(model: Any, spec: FeaturizerSpec) -> list[tuple[Any, str]]:  # noqa: ANN401
    """Return the networks to compile, each with its precision."""
    if spec.precision == "float32":
        return [(model, "f32")]
    head, tail = _split(model, find_backbone(spec.backbone).n_float32_layers)
    return [(head, "f32"), (tail, "bf16")]


def _split(model: Any, n_layers: int) -> tuple[Any, Any]:  # noqa: ANN401
    """Cut a network before its convolution number `n_layers`, from 0."""
    from openvino import Model, opset13  # noqa: PLC0415

    layers = [op for op in model.get_ordered_ops() if op.get_type_name() in _CONVOLUTIONS]
    cut = layers[n_layers].input_value(0)
    consumers = list(cut.get_target_inputs())
    head = Model([opset13.result(cut)], model.get_parameters(), "head").clone()
    between = opset13.parameter(cut.get_partial_shape(), cut.get_element_type())
    for consumer in consumers:
        consumer.replace_source_output(between.output(0))
    return head, Model(model.get_results(), [between], "tail")


def _compiled(core: Any, model: Any, precision: str, n_threads: int) -> Any:  # noqa: ANN401
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": str(n_threads),
        "INFERENCE_NUM_THREADS": str(n_threads),
        # Two processes that pin their threads take the same core, and half the speed is gone.
        "ENABLE_CPU_PINNING": "NO",
    }
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise EngineError("this processor has no bfloat16; leave --precision bf16 out")
    return core.compile_model(model, "CPU", options)
