"""Leave a spot machine before it is taken back.

EC2 announces it two minutes ahead in the metadata of the instance
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html).
"""

from __future__ import annotations

import logging
import os
import threading
import urllib.request
from typing import Any

from distributed import WorkerPlugin

logger = logging.getLogger(__name__)

_METADATA_URL = "http://169.254.169.254"
_METADATA_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # that of botocore
_NOTICE = "/latest/meta-data/spot/instance-action"
_TOKEN = "/latest/api/token"  # noqa: S105 - a path
_TOKEN_SECONDS = 21_600
_ANSWER_SECONDS = 2.0
_POLL_SECONDS = 5.0


class SpotWatch(WorkerPlugin):  # type: ignore[misc]
    """Retire a worker when its machine is about to be taken back.

    Its unfinished tasks go to the other workers; what it stored stays. When all workers of a
    machine have ended, so does its container, and the machine shuts down.

    Parameters
    ----------
    poll_seconds : float
        Time between two looks.
    """

    name = "fruits_dask-spot-watch"

    def __init__(self, poll_seconds: float = _POLL_SECONDS) -> None:
        self._poll_seconds = poll_seconds
        self._ended: threading.Event | None = None

    def setup(self, worker: Any) -> None:  # noqa: ANN401 - distributed is untyped
        """Start to look."""
        self._ended = threading.Event()
        threading.Thread(
            target=self._watch, args=(worker, self._ended), name="spot-watch", daemon=True
        ).start()

    def teardown(self, worker: Any) -> None:  # noqa: ANN401
        """Stop to look."""
        if self._ended is not None:
            self._ended.set()

    def _watch(self, worker: Any, ended: threading.Event) -> None:  # noqa: ANN401
        while not ended.wait(self._poll_seconds):
            if interruption_is_announced():
                logger.warning("this machine is about to be taken back; retiring %s", worker.name)
                worker.loop.add_callback(worker.close_gracefully, reason="spot-interruption")
                return


def interruption_is_announced() -> bool:
    """Ask the metadata service of this machine; one that does not answer announces nothing."""
    root = os.environ.get(_METADATA_VARIABLE, _METADATA_URL).rstrip("/")
    try:
        token = _ask(
            root + _TOKEN, "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
        )
        return bool(_ask(root + _NOTICE, "GET", {"X-aws-ec2-metadata-token": token}))
    except (OSError, ValueError):  # 404 as long as there is no notice
        return False


def _ask(url: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 - http only
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:  # noqa: S310
        return str(answer.read().decode())
