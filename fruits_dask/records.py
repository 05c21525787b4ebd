"""What things are: small frozen records that travel between stages and machines."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLIT_NAMES = ("Training", "Test", "Validation", "train", "test", "val")
TRAINING_SPLITS = ("Training", "train")

STAGES = ("plan", "extract", "reduce", "report")
EXTRACT_OPERATIONS = ("read", "decode", "featurize", "store")
OPERATIONS = (*EXTRACT_OPERATIONS, "fit", "scores", "csv")

Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One listed file or object."""

    path: str
    """Full address: ``s3://bucket/key`` or an absolute local path."""
    etag: str
    """What the store says of the content; for local files modification time and size."""
    size_bytes: int
    """Length of the object in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRange:
    """One partition: rows ``start`` to ``stop`` (exclusive) of the manifest."""

    index: int
    """Number of the partition, from 0, in the order of the manifest."""
    start: int
    """First row."""
    stop: int
    """One past the last row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one listed image has no features."""

    path: str
    """Address of the image, as in the manifest."""
    stage: str
    """``read``, ``decode`` or ``featurize``."""
    error: str
    """Name of the error's class."""
    message: str
    """What was wrong, for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """How to reach a store; holds no secret."""

    endpoint_url: str | None = None
    """Address of an S3-compatible service, or None for AWS."""
    profile: str | None = None
    """Name of a profile in the AWS configuration files."""
    anonymous: bool = False
    """Send unsigned requests (public buckets)."""
    requester_pays: bool = False
    """Agree to pay for the requests and the transfer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturizerSpec:
    """All that decides the features of an image, and how they are computed."""

    backbone: str
    """Name in the table of backbones."""
    engine: str
    """``tensorflow`` or ``openvino``."""
    weights_sha256: str
    """SHA-256 of the weights file, hexadecimal."""
    image_px: int
    """Side of the square input, in pixels."""
    n_features: int
    """Length of a feature vector."""
    preprocessing: str
    """How 8-bit RGB becomes the model's input, in words."""
    precision: str = "float32"
    """Of the arithmetic: ``float32``, or ``bf16`` where the network stands it."""
    n_threads: int = field(default=1, compare=False)
    """Threads of the engine in one worker process; does not change the features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What would work on a run."""

    n_processes: int
    """Worker processes, on one core each."""
    hourly: float | None
    """Price of an hour, where there is one and it is known."""
    is_rented: bool
    """Machines have to come first."""
    description: str
    """For people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCount:
    """How many rows the stored parts of one partition have."""

    index: int
    """Number of the partition."""
    n_features: int
    """Images with features."""
    n_training: int
    """Those of them in a training split."""
    n_failures: int
    """Images without features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSummary:
    """What a worker tells of one finished partition; the data stays in the store."""

    n_images: int
    """Images that were tried."""
    n_failures: int
    """Those of them without features."""
    seconds: dict[str, float]
    """Wall-clock seconds of each operation: read, decode, featurize, store."""
    worker: str
    """Address of the worker."""
    peak_memory_bytes: int
    """Highest resident memory of the worker process so far."""
