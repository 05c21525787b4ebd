"""What can go wrong, one class a kind.

Every error of this package derives from `FruitsDaskError` and also from the builtin that a caller
would expect, so that ``except FileNotFoundError`` works as well as ``except FruitsDaskError``.
A message says what was wrong, what was found, what was expected, and what to do.
"""


class FruitsDaskError(Exception):
    """The root of all errors that this package raises on purpose."""


class ConfigError(FruitsDaskError, ValueError):
    """A setting is missing, unknown or of the wrong kind."""


class StorageError(FruitsDaskError, OSError):
    """A store could not be read or written."""


class NotFoundError(StorageError, FileNotFoundError):
    """The file or object is not there (any more)."""


class AccessDeniedError(StorageError, PermissionError):
    """The store refused the request."""


class DecodeError(FruitsDaskError, ValueError):
    """Bytes that are not a usable image."""


class EmptyObjectError(DecodeError):
    """The object has no bytes."""


class NotAnImageError(DecodeError):
    """The bytes are of no image format that is read here."""


class TruncatedImageError(DecodeError):
    """The image starts well and ends too early, or is damaged inside."""


class PixelBombError(DecodeError):
    """The image has more pixels than `max_megapixels` allows."""


class WeightsError(FruitsDaskError, ValueError):
    """Weights cannot be found, or do not fit the backbone."""


class EngineError(FruitsDaskError, RuntimeError):
    """What runs the network is not installed, or cannot do it on this machine."""


class InputError(FruitsDaskError, ValueError):
    """The input holds nothing to work on, or overlaps the output."""


class ResultError(FruitsDaskError, ValueError):
    """A stored result is incomplete or not of this format."""


class OutputExistsError(FruitsDaskError, FileExistsError):
    """The output holds something that this run must not replace."""


class OutputLockedError(FruitsDaskError, BlockingIOError):
    """Another run is writing into the same output."""


class ReduceError(FruitsDaskError, ValueError):
    """The features do not allow a principal component analysis."""


class ClusterError(FruitsDaskError, RuntimeError):
    """The Dask cluster cannot be reached, or is not fit for the job."""
