"""A connection to workers: deliver weights, run bags, watch."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client, WorkerPlugin, as_completed, performance_report
from distributed.scheduler import KilledWorker

from ..errors import ClusterError, FruitsDaskError
from ..featurize import get_featurizer, install_weights
from ..records import FeaturizerSpec

if TYPE_CHECKING:
    import dask.bag as db

logger = logging.getLogger(__name__)


class WeightsPlugin(WorkerPlugin):  # type: ignore[misc]
    """Bring weights to every worker, also to those that join or come back later.

    Parameters
    ----------
    spec : FeaturizerSpec
        The featurizer that will be needed; its build starts at once, beside other work.
    weights : bytes
        The weights file.
    """

    name = "fruits_dask-weights"

    def __init__(self, spec: FeaturizerSpec, weights: bytes) -> None:
        self._spec = spec
        self._weights = weights

    def setup(self, worker: object) -> None:
        """Check and keep the weights, and start to build."""
        install_weights(self._spec.weights_sha256, self._weights)
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def _warm_up(self) -> None:
        # A failure shows again, with its message, in the first task.
        with suppress(FruitsDaskError):
            get_featurizer(self._spec)


class Workers:
    """The workers of a run.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    n_threads : int
        Threads that the engine of each worker process may use.
    """

    def __init__(self, client: Client, *, n_threads: int) -> None:
        self._client = client
        self.n_threads = n_threads

    @property
    def dashboard_url(self) -> str:
        """Address of the Dask dashboard, or an empty string when there is none."""
        return str(self._client.dashboard_link or "")

    @property
    def n_workers(self) -> int:
        """Worker processes connected now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def deliver(self, spec: FeaturizerSpec, weights: bytes) -> None:
        """Give the weights to every worker; each checks their SHA-256."""
        self._client.register_plugin(WeightsPlugin(spec, weights))

    def run(self, bag: db.Bag | None) -> Iterator[Any]:
        """Compute a bag and yield its items as they come, in no particular order.

        Parameters
        ----------
        bag : dask.bag.Bag or None
            Of small items; None for no work.

        Yields
        ------
        object
            Items of the bag.

        Raises
        ------
        ClusterError
            If a task ended several workers.
        """
        futures = self._client.compute(bag.to_delayed()) if bag is not None else []
        try:
            for future in as_completed(futures):
                yield from future.result()
                future.release()
        except KilledWorker as exc:
            raise ClusterError(
                f"a task ended its worker {exc.allowed_failures + 1} times, most likely for lack "
                "of memory; give fewer --workers or a larger --memory-limit, then run again to "
                "resume"
            ) from exc
        finally:
            self._client.cancel(futures)

    @contextmanager
    def performance_report(self, keep: Callable[[Path], None]) -> Iterator[None]:
        """Record what the scheduler sees during the block, and hand the HTML file to `keep`."""
        with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
            target = Path(folder, "dask-performance.html")
            with performance_report(str(target), mode="inline"):
                yield
            keep(target)
