"""TensorFlow's greetings, held back."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_GREETING = re.compile(
    rb"WARNING: All log messages before absl|[IWE]\d{4} |To enable the following"
)


@contextmanager
def quiet_import() -> Iterator[None]:
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
