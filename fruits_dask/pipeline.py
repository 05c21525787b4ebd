"""The wiring of a run: stage after stage over one output. No logic of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from . import layout
from .cluster import check_cluster, open_cluster
from .config import Settings
from .errors import ConfigError, InputError, ResultError
from .extract import ExtractJob, Tally, counts_bag, extraction_bag, retry_bag
from .features import part_indices, read_table
from .featurize import check_engine, prepare_network
from .featurize.weights import load_weights
from .partition import partition_rows, partition_size
from .progress import Progress, Silent
from .records import PartCount, RowRange
from .sample import n_sample_images
from .source import write_manifest
from .storage import is_s3, open_store
from .tasks import in_background
from .workspace import (
    SAMPLE_ADDRESS,
    Workspace,
    check_addresses,
    find_finished,
    open_result,
    open_workspace,
    weights_name,
)

if TYPE_CHECKING:
    import dask.bag as db

    from .cluster.workers import Workers
    from .records import FeaturizerSpec
    from .reduce import PcaModel

logger = logging.getLogger(__name__)

# Photos in the report: enough for a picture of the whole, few enough for a page of some megabytes.
_REPORT_IMAGES = 1500
_WORKERS = "the workers"  # among the addresses whose regions are recorded
_SILENT = Silent()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command came to."""

    output: str
    """Address of the result."""
    record: dict[str, Any]
    """Content of run.json."""
    did_nothing: bool = False
    """Everything was there before."""

    @property
    def n_features(self) -> int:
        """Images with features."""
        return int(self.record["stages"].get("extract", {}).get("n_features", 0))

    @property
    def n_failures(self) -> int:
        """Images without features."""
        return int(self.record["stages"].get("extract", {}).get("n_failures", 0))

    @property
    def failed_share(self) -> float:
        """Share of the images that have no features."""
        return self.n_failures / max(self.n_features + self.n_failures, 1)


def run(settings: Settings, *, overwrite: bool = False, progress: Progress = _SILENT) -> Outcome:
    """Do the whole job, or what is left of it.

    Parameters
    ----------
    settings : Settings
        As resolved.
    overwrite : bool
        Replace the result that is there.
    progress : Progress
        Who listens.

    Returns
    -------
    Outcome
        Counts, and the content of run.json.

    Raises
    ------
    FruitsDaskError
        With a message that says what to do. What was stored stays; the next run resumes it.
    """
    check_cluster(settings)
    if not overwrite and (finished := find_finished(settings, progress)):
        return Outcome(output=finished.output, record=finished.record, did_nothing=True)
    with _opened(settings, progress, overwrite=overwrite) as space:
        if "reduce" not in space.stages:
            with _workers(space, featurize="extract" not in space.stages) as workers:
                _plan(space)  # the workers start the engine meanwhile
                _prepare_reduction(space)
                counts = _extract(space, workers)
                _reduce(space, workers, counts)
        _report(space)
        return Outcome(output=space.output, record=space.record)


def plan(settings: Settings, *, overwrite: bool = False, progress: Progress = _SILENT) -> Outcome:
    """List the input and store the manifest; read no image. See `run` for the parameters."""
    with _opened(settings, progress, overwrite=overwrite, keep_reduction=True) as space:
        done = _plan(space)
        return Outcome(output=space.output, record=space.record, did_nothing=not done)


def extract(
    settings: Settings, *, overwrite: bool = False, progress: Progress = _SILENT
) -> Outcome:
    """Make the features, after the plan if there is none. See `run` for the parameters."""
    check_cluster(settings)
    with _opened(settings, progress, overwrite=overwrite, keep_reduction=True) as space:
        if "extract" in space.stages:
            return Outcome(output=space.output, record=space.record, did_nothing=True)
        with _workers(space, featurize=True, reduce=False) as workers:
            _plan(space)
            _extract(space, workers)
        return Outcome(output=space.output, record=space.record)


def reduce(settings: Settings, *, progress: Progress = _SILENT) -> Outcome:
    """Fit the PCA on stored features and project them; `components` may be new.

    See `run` for the parameters.

    Raises
    ------
    ResultError
        If the features are not complete.
    """
    check_cluster(settings)
    with open_result(settings, progress) as space:
        space.require("extract")
        is_new = not space.record["identity"].items() >= space.reduction.items()
        if "reduce" in space.stages and not is_new:
            return Outcome(output=space.output, record=space.record, did_nothing=True)
        with _workers(space, featurize=False) as workers:
            if is_new:
                space.change_reduction()
            _reduce(space, workers, None)
        return Outcome(output=space.output, record=space.record)


def report(settings: Settings, *, progress: Progress = _SILENT) -> Outcome:
    """Write report.html anew from what is stored. See `run` for the parameters.

    Raises
    ------
    ResultError
        If there are no scores.
    """
    with open_result(settings, progress) as space:
        space.require("reduce")
        space.stages.pop("report", None)
        _report(space)
        return Outcome(output=space.output, record=space.record)


def retry_failed(settings: Settings, *, progress: Progress = _SILENT) -> Outcome:
    """Try the images in failures/ again, then do anew what depends on them.

    See `run` for the parameters.

    Raises
    ------
    ResultError
        If the features are not complete.
    """
    check_cluster(settings)
    with _opened(settings, progress) as space:
        space.require("extract")
        if space.stages["extract"]["n_failures"] == 0:
            return Outcome(output=space.output, record=space.record, did_nothing=True)
        with _workers(space, featurize=True) as workers:
            counts = _retry(space, workers)
            _reduce(space, workers, counts)
        _report(space)
        return Outcome(output=space.output, record=space.record)


@contextmanager
def _opened(
    settings: Settings,
    progress: Progress,
    *,
    overwrite: bool = False,
    keep_reduction: bool = False,
) -> Iterator[Workspace]:
    """Open the workspace of a command that reads photos."""
    with (
        _photos(settings, progress) as ready,
        open_workspace(
            ready, progress, overwrite=overwrite, keep_reduction=keep_reduction
        ) as space,
    ):
        yield space


@contextmanager
def _photos(settings: Settings, progress: Progress) -> Iterator[Settings]:
    """Yield settings whose photos can be read: without `input`, those of the embedded server."""
    if settings.input is not None:
        yield settings
        return
    if is_s3(settings.output) or settings.cluster != "local":
        raise ConfigError(
            "the sample photos are on this machine only: give --input, or leave out --cluster and "
            "an --output on s3://. `sample s3://BUCKET/PREFIX` stores them where a cluster reads "
            "them"
        )
    from . import demo  # noqa: PLC0415 - moto is an extra

    check_addresses(settings)  # before ten seconds are spent on the sample
    load_weights(weights_name(settings), settings.backbone, settings.store_options)
    with demo.embedded_server() as endpoint_url:
        progress.start("sample", total=n_sample_images(), unit="photos")
        options = demo.public_options(endpoint_url)
        demo.write_sample(SAMPLE_ADDRESS, options, on_written=progress.update)
        progress.finish(f"generated into {SAMPLE_ADDRESS}, an S3 server inside this process")
        yield settings.model_copy(update={"endpoint_url": endpoint_url, "anonymous": True})


@contextmanager
def _workers(space: Workspace, *, featurize: bool, reduce: bool = True) -> Iterator[Workers]:
    """Open the cluster, let it prepare for what there is to do, and keep what Dask saw."""
    engine = space.settings.engine
    if featurize:
        check_engine(engine)  # before anything is started
    space.progress.say("starting workers")
    start = time.perf_counter()
    network = in_background(prepare_network, engine, space.weights) if featurize else None
    regions: dict[str, str] = space.record["regions"]
    regions.pop(_WORKERS, None)
    with open_cluster(space.settings, regions=regions, progress=space.progress) as workers:
        regions[_WORKERS] = workers.region
        if network:
            afterwards = _worker_preparation(space) if reduce else None
            workers.deliver(_spec(space, workers), network.result, afterwards)
        space.record["workers"] = {
            "n_workers": workers.n_workers,
            "seconds": round(time.perf_counter() - start, 3),
        }
        space.progress.say(f"{workers.n_workers} workers, Dask dashboard: {workers.dashboard_url}")
        workers.check_reach(space.path(layout.RUN_JSON), space.settings.worker_store_options)
        target = space.path(layout.DASK_REPORT)
        with workers.performance_report(lambda html: space.store.upload(html, target)):
            yield workers
    space.save()


def _plan(space: Workspace) -> bool:
    if "plan" in space.stages and space.has(layout.MANIFEST):
        size = space.stages["plan"]["partition_size"]
        if space.settings.partition_size not in (None, size):
            logger.warning("this result is cut into partitions of %d images, and stays so", size)
        return False
    with space.stage("plan") as facts:
        space.progress.start("plan", total=None, unit="images")
        info = write_manifest(
            open_store(space.input, space.settings.store_options),
            space.input,
            space.store,
            space.path(layout.MANIFEST),
            limit=space.settings.limit,
            on_listed=space.progress.update,
        )
        facts.update(asdict(info))
        facts["partition_size"] = space.settings.partition_size or partition_size(info.n_images)
        facts["n_partitions"] = -(-info.n_images // facts["partition_size"])
        space.progress.finish(f"{info.n_images:,} images, {len(info.labels)} labels")
    return True


def _partitions(space: Workspace) -> list[RowRange]:
    planned = space.stages["plan"]
    return partition_rows(planned["n_images"], planned["partition_size"])


def _spec(space: Workspace, workers: Workers) -> FeaturizerSpec:
    settings = space.settings
    return space.weights.spec(
        engine=settings.engine, precision=settings.precision, n_threads=workers.n_threads
    )


def _extract_job(space: Workspace, workers: Workers) -> ExtractJob:
    return ExtractJob(
        output=space.output,
        options=space.settings.worker_store_options,
        spec=_spec(space, workers),
        max_megapixels=space.settings.max_megapixels,
        concurrent_reads=space.settings.concurrent_reads,
        thumbnail_step=-(-space.stages["plan"]["n_images"] // _REPORT_IMAGES),
    )


def _extract(space: Workspace, workers: Workers) -> list[PartCount] | None:
    """Make the features that are missing; return the row counts of all parts, if they are known."""
    counts = None
    if "extract" not in space.stages:
        counts = _extract_missing(space, workers)
    _check_usable(space)
    return counts


def _extract_missing(space: Workspace, workers: Workers) -> list[PartCount]:
    partitions = _partitions(space)
    stored = set(part_indices(space.store, space.output, layout.FEATURES))
    todo = [rows for rows in partitions if rows.index not in stored]
    with space.stage("extract") as facts:
        tally = Tally()
        n_images = space.stages["plan"]["n_images"]
        done = n_images - sum(rows.stop - rows.start for rows in todo)
        space.progress.start("extract", total=n_images, unit="images", done=done)
        counts = _extract_partitions(space, workers, todo, tally, done=done)
        # What a killed run left between two writes; after that nothing can be incomplete.
        if broken := _incomplete(partitions, counts):
            counts = _extract_partitions(space, workers, broken, tally)
        if _incomplete(partitions, counts):
            raise ResultError(f"the parts of {space.output} change while they are written")
        facts.update(tally.facts(counts, n_workers=workers.n_workers))
        space.progress.finish(_found(facts))
    return counts


def _extract_partitions(
    space: Workspace, workers: Workers, todo: list[RowRange], tally: Tally, *, done: int = 0
) -> list[PartCount]:
    if todo:
        bag = extraction_bag(_extract_job(space, workers), todo)
        _follow(space, workers, bag, tally, done=done)
    return _count(space, workers)


def _retry(space: Workspace, workers: Workers) -> list[PartCount]:
    counts = {count.index: count for count in _count(space, workers)}
    todo = [rows for rows in _partitions(space) if counts[rows.index].n_failures]
    space.forget_reduction()
    earlier = space.stages.pop("extract")  # if this is cut short, `run` looks at the parts again
    space.save()
    with space.stage("extract", spent_seconds=earlier["seconds"]) as facts:
        tally = Tally(earlier)
        n_failed = sum(count.n_failures for count in counts.values())
        space.progress.start("retry", total=n_failed, unit="images")
        _follow(space, workers, retry_bag(_extract_job(space, workers), todo), tally)
        now = _count(space, workers)
        facts.update(tally.facts(now, n_workers=workers.n_workers))
        space.progress.finish(_found(facts))
    return now


def _follow(
    space: Workspace, workers: Workers, bag: db.Bag | None, tally: Tally, *, done: int = 0
) -> None:
    """Run the tasks of a bag and tell how far they are."""
    for summary in workers.run(bag):
        space.lock.check()
        tally.add(summary)
        space.progress.update(done + tally.n_images, n_failures=tally.n_failures)


def _count(space: Workspace, workers: Workers) -> list[PartCount]:
    """Count the rows of all stored parts."""
    indices = part_indices(space.store, space.output, layout.FEATURES)
    found: Iterator[PartCount] = workers.run(
        counts_bag(space.output, space.settings.worker_store_options, indices)
    )
    return sorted(found, key=lambda count: count.index)


def _incomplete(partitions: list[RowRange], counts: list[PartCount]) -> list[RowRange]:
    """Find partitions whose stored rows do not add up: a kill came between their two parts."""
    stored = {count.index: count.n_features + count.n_failures for count in counts}
    return [rows for rows in partitions if stored.get(rows.index) != rows.stop - rows.start]


def _found(facts: dict[str, Any]) -> str:
    return f"{facts['n_features']:,} images with features, {facts['n_failures']:,} failures"


def _check_usable(space: Workspace) -> None:
    """Stop when there is not one feature, and say why the first image has none."""
    if space.stages["extract"]["n_features"]:
        return
    index = part_indices(space.store, space.output, layout.FAILURES)[0]
    path = layout.part_path(space.output, layout.FAILURES, index)
    first = read_table(space.store, path).to_pylist()[0]
    raise InputError(
        f"none of the {space.stages['extract']['n_failures']:,} images could be used. The first, "
        f"at stage {first['stage']}: {first['error']}: {first['message']}. All are in "
        f"{space.path(layout.FAILURES)}; mend the cause and use `retry-failed`"
    )


def _worker_preparation(space: Workspace) -> Callable[[], None]:
    """Return what imports the needs of the reduction on a worker."""
    from .reduce import prepare_worker  # noqa: PLC0415 - planning needs no Dask

    return partial(prepare_worker, space.settings.reducer)


def _prepare_reduction(space: Workspace) -> None:
    """Import what the reduction needs here while the workers make features."""
    from .reduce import prepare  # noqa: PLC0415 - planning needs no Dask

    in_background(prepare, space.settings.reducer)


def _reduce(space: Workspace, workers: Workers, counts: list[PartCount] | None) -> None:
    if "reduce" in space.stages:
        return
    from .reduce import write_scores_csv  # noqa: PLC0415 - planning needs no Dask

    # Recorded when the workers are done, or a kill now would lose their performance report.
    with space.stage("reduce", is_saved=False) as facts:
        start = time.perf_counter()
        model = _fit(space, counts or _count(space, workers))
        fitted = time.perf_counter()
        _write_scores(space, workers)
        scored = time.perf_counter()
        indices = part_indices(space.store, space.output, layout.SCORES)
        write_scores_csv(space.store, space.output, indices)
        facts["operations"] = {
            "fit": round(fitted - start, 3),
            "scores": round(scored - fitted, 3),
            "csv": round(time.perf_counter() - scored, 3),
        }
        facts["reducer"] = space.settings.reducer
        facts["n_components"] = len(model.components)
        facts["n_samples"] = model.n_samples
        facts["explained_variance_ratio"] = float(model.explained_variance_ratio.sum())
        facts["exact_share"] = model.exact_share
        space.progress.finish(
            f"{facts['n_components']} components keep {facts['explained_variance_ratio']:.2%} of "
            f"the variance of {model.n_samples:,} images"
        )


def _fit(space: Workspace, counts: list[PartCount]) -> PcaModel:
    from .reduce import fit_pca, read_model, write_model  # noqa: PLC0415 - planning needs no Dask

    if space.has(layout.PCA_MODEL):
        return read_model(space.store, space.output)
    space.progress.start("reduce", total=None, unit="batches")
    model = fit_pca(
        space.output,
        space.settings.worker_store_options,
        counts,
        components=space.settings.components,
        reducer=space.settings.reducer,
        on_batch=space.progress.update,
    )
    write_model(space.store, space.output, model)
    space.progress.finish()
    return model


def _write_scores(space: Workspace, workers: Workers) -> None:
    from .reduce import scores_bag  # noqa: PLC0415 - planning needs no Dask

    stored = set(part_indices(space.store, space.output, layout.SCORES))
    indices = part_indices(space.store, space.output, layout.FEATURES)
    todo = [index for index in indices if index not in stored]
    space.progress.start("scores", total=len(indices), unit="parts", done=len(stored))
    bag = scores_bag(space.output, space.settings.worker_store_options, todo)
    for done, _ in enumerate(workers.run(bag), start=len(stored) + 1):
        space.progress.update(done)


def _report(space: Workspace) -> None:
    from .report import write_report  # noqa: PLC0415 - bokeh is not needed to plan

    if "report" not in space.stages:
        with space.stage("report"):
            space.progress.start("report", total=None, unit="")
            write_report(space.store, space.output)
            space.progress.finish(space.path(layout.REPORT))
    space.complete()
