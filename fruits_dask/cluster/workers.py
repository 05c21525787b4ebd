"""A connection to workers: deliver a network, run bags, watch."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distributed import Client, WorkerPlugin, as_completed, performance_report
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker, NoWorkerError

from ..errors import ClusterError, FruitsDaskError
from ..featurize import get_featurizer, install_network
from ..records import FeaturizerSpec, StoreOptions
from ..residency import UNSTATED
from ..storage import open_store
from ..tasks import in_background

if TYPE_CHECKING:
    import dask.bag as db

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# TensorFlow with MobileNetV2 and a chunk of images takes about 1 GB.
WORKER_BYTES = 1.5 * 2**30
_POOL_BYTES = 64 * 2**20
# Configuration of Dask under which the workers start.
WORKER_SETTINGS = {
    # How often Dask looks at itself. By default that is every 10 to 20 ms, which takes 2 to 3 % of
    # the core of every worker from the network.
    "distributed.admin.tick.interval": "200ms",
    "distributed.worker.profile.interval": "200ms",
    # Every photo takes and gives back memory that glibc and Pillow would fetch from the system each
    # time, page by page: some 5 % of the time. So they keep what a chunk of photos needs.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(_POOL_BYTES),
    "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": str(_POOL_BYTES),
    # But not once for each of some thirty threads: that is 100 MB of a worker.
    "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": "2",
    "distributed.nanny.pre-spawn-environ.PILLOW_BLOCKS_MAX": "8",
}

_BUILD_SECONDS = 30
# What distributed raises when its scheduler is gone.
_LOST = (CommClosedError, OSError, TimeoutError, CancelledError)


class NetworkPlugin(WorkerPlugin):  # type: ignore[misc]
    """Bring a network to every worker, also to those that join or come back later.

    Parameters
    ----------
    spec : FeaturizerSpec
        The featurizer that will be needed; its build starts at once, beside other work.
    network : bytes
        As `prepare_network` made it.
    afterwards : callable, optional
        What to do when it is built, beside other work.
    """

    def __init__(
        self, spec: FeaturizerSpec, network: bytes, afterwards: Callable[[], None] | None
    ) -> None:
        # Of this run alone: another one on the same workers may need the same network for longer.
        self.name = f"fruits_dask-network-{uuid.uuid4().hex}"
        self._spec = spec
        self._network = network
        self._sha256 = hashlib.sha256(network).hexdigest()
        self._afterwards = afterwards
        self._thread: threading.Thread | None = None

    def setup(self, worker: object) -> None:
        """Check and keep the network, and start to build."""
        install_network(self._spec, self._sha256, self._network)
        self._thread = threading.Thread(target=self._warm_up, name="warm-up", daemon=True)
        self._thread.start()

    def teardown(self, worker: object) -> None:
        """Let the build end: TensorFlow aborts a process that ends in the middle of it."""
        if self._thread is not None:
            self._thread.join(_BUILD_SECONDS)

    def _warm_up(self) -> None:
        # A failure shows again, with its message, where what was to be made ready is needed.
        with suppress(Exception):
            get_featurizer(self._spec)
            if self._afterwards is not None:
                self._afterwards()


class Workers:
    """The workers of a run.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    n_threads : int
        Threads that the engine of each worker process may use.
    dashboard_url : str, optional
        Where the dashboard is seen, if not where the scheduler says.
    region : str, optional
        Where the workers are.
    check : callable, optional
        Called whenever something is done; raises when the workers must not be used any longer.
    """

    def __init__(
        self,
        client: Client,
        *,
        n_threads: int,
        dashboard_url: str | None = None,
        region: str = UNSTATED,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._dashboard_url = dashboard_url
        self._check = check
        self.region = region
        self._delivery: Future[None] | None = None
        self._registering = threading.Lock()
        self._plugins: list[str] = []
        self._is_withdrawn = False
        self.n_threads = n_threads

    @property
    def dashboard_url(self) -> str:
        """Address of the Dask dashboard, or an empty string when there is none."""
        return self._dashboard_url or str(self._client.dashboard_link or "")

    @property
    def n_workers(self) -> int:
        """Worker processes connected now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def deliver(
        self,
        spec: FeaturizerSpec,
        network: Callable[[], bytes],
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        """Give a network to every worker; each checks its SHA-256 and starts to build.

        Returns at once: what is asked of the workers later waits for the network.

        Parameters
        ----------
        spec : FeaturizerSpec
            The featurizer that will be needed.
        network : callable
            Returns what `prepare_network` made; it may take its time.
        afterwards : callable, optional
            What every worker does when its featurizer is built, beside other work.
        """
        self._delivery = in_background(self._deliver, spec, network, afterwards)

    def _deliver(
        self,
        spec: FeaturizerSpec,
        network: Callable[[], bytes],
        afterwards: Callable[[], None] | None,
    ) -> None:
        plugin = NetworkPlugin(spec, network(), afterwards)
        with self._registering:
            if not self._is_withdrawn:
                self._client.register_plugin(plugin)
                self._plugins.append(plugin.name)

    def withdraw(self) -> None:
        """Take back what was given, because borrowed workers live on."""
        with self._registering:
            self._is_withdrawn = True
        for name in self._plugins:
            with suppress(*_LOST):
                self._client.unregister_worker_plugin(name)

    def check_reach(self, path: str, options: StoreOptions) -> None:
        """Refuse workers that do not see an object of the output.

        Parameters
        ----------
        path : str
            Address of an object that is there.
        options : StoreOptions
            How to reach it.

        Raises
        ------
        ClusterError
            Naming a worker that does not see it.
        """
        for worker, is_there in self._client.run(_sees, path, options).items():
            if not is_there:
                raise ClusterError(
                    f"the worker {worker} does not see {path}; use an s3:// output, or a folder "
                    "that all workers mount at the same place"
                )

    def each(self, function: Callable[..., _T], *arguments: object) -> list[_T]:
        """Call a function once on every worker, on all at the same time.

        Parameters
        ----------
        function : callable
            What to call; it may take its time.
        *arguments : object
            What to call it with.

        Returns
        -------
        list
            What it returned, one item a worker.
        """
        self._wait_for_delivery()
        addresses = self._client.scheduler_info(n_workers=-1)["workers"]
        shared = [self._client.scatter([item], broadcast=True)[0] for item in arguments]
        futures = [
            self._client.submit(function, *shared, workers=[address], pure=False)
            for address in addresses
        ]
        found: list[_T] = self._client.gather(futures)
        return found

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
        self._wait_for_delivery()
        futures = self._client.compute(bag.to_delayed()) if bag is not None else []
        try:
            for future, items in as_completed(futures, with_results=True):
                yield from items
                self._check()
                future.release()
        except KilledWorker as exc:
            raise ClusterError(
                f"a task ended its worker {exc.allowed_failures + 1} times, most likely for lack "
                "of memory; give fewer --workers or a larger --memory-limit, then run again to "
                "resume"
            ) from exc
        except FruitsDaskError:
            raise
        except NoWorkerError as exc:
            raise ClusterError(
                "all workers are gone, and none came back in time; run again to resume"
            ) from exc
        except _LOST as exc:
            raise _lost(exc) from exc
        finally:
            with suppress(*_LOST):
                self._client.cancel(futures)

    def _wait_for_delivery(self) -> None:
        try:
            if self._delivery is not None:
                self._delivery.result()
        except _LOST as exc:
            raise _lost(exc) from exc

    @contextmanager
    def performance_report(self, keep: Callable[[Path], None]) -> Iterator[None]:
        """Record what the scheduler sees during the block, and hand the HTML file to `keep`."""
        with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
            target = Path(folder, "dask-performance.html")
            recorder = performance_report(str(target), mode="inline")
            recorder.__enter__()
            yield  # when the block fails, there is nothing to keep
            try:
                recorder.__exit__(None, None, None)
            except _LOST as exc:
                logger.warning("the Dask performance report could not be made: %s", exc)
            else:
                keep(target)


def _lost(exc: BaseException) -> ClusterError:
    return ClusterError(f"the connection to the scheduler was lost ({exc}); run again to resume")


def _sees(path: str, options: StoreOptions) -> bool:
    return open_store(path, options).exists(path)
