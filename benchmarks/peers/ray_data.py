"""Peer: Ray Data with two actors that each hold the model, scikit-learn's PCA.

python benchmarks/peers/ray_data.py --output OUTPUT
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Ray 2.60 replaces a loopback address given to `ray.init` by the one of the network card, except
# where clusters are not supported; this says so here, and all of Ray stays on 127.0.0.1.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from common import (
    BATCH_SIZE,
    Stopwatch,
    build_model,
    embed,
    features_table,
    limit_tensorflow_threads,
    list_photos,
    parse_arguments,
    print_summary,
    reduce_with_sklearn,
)
from ray.data import ActorPoolStrategy, DataContext

# Two actors of half a CPU each leave one for reading and writing; with more, Ray waits for ever.
N_ACTORS = 2
CPUS_OF_ACTOR = 0.5
# One for each of two cores; two threads in each used more CPU time at 400 photos.
THREADS_OF_ACTOR = 1


class Featurizer:
    """A batch of photos to a batch of features; the model is built once an actor."""

    def __init__(self, weights: Path) -> None:
        limit_tensorflow_threads(THREADS_OF_ACTOR)
        self._model = build_model(weights)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Decode, resize, predict."""
        contents = batch["bytes"].to_pylist()
        return features_table(batch["path"].to_pylist(), embed(self._model, contents))


@contextmanager
def local_ray() -> Iterator[None]:
    """Run Ray on this machine, on the loopback interface, without dashboard or telemetry."""
    with tempfile.TemporaryDirectory(prefix="ray-home-") as home:
        # Ray 2.60 asks the metadata addresses of three clouds where it runs, even with usage stats
        # disabled, unless it finds the file of a cluster in the home folder.
        Path(home, "ray_bootstrap_config.yaml").write_text("{}\n")
        os.environ["HOME"] = home
        ray.init(
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            num_cpus=2,
            log_to_driver=False,
            logging_level="error",
        )
        DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


def write_features(source: str | list[str], weights: Path, output: Path) -> pa.Table:
    """Compute the features, write them as Parquet and read them back."""
    photos = ray.data.read_binary_files(source, include_paths=True, file_extensions=["jpg"])
    features = photos.map_batches(
        Featurizer,
        fn_constructor_args=(weights,),
        batch_size=BATCH_SIZE,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=N_ACTORS),
        num_cpus=CPUS_OF_ACTOR,
    )
    features.write_parquet(str(output / "features"))
    return pq.read_table(output / "features").sort_by("path")


def main() -> None:
    """Do the whole job."""
    arguments = parse_arguments(__doc__)
    watch = Stopwatch()
    with watch.phase("features"), local_ray():
        source = str(arguments.input)
        if arguments.limit is not None:
            source = list_photos(arguments.input, arguments.limit)
        table = write_features(source, arguments.weights, arguments.output)
    n_images, ratio = reduce_with_sklearn(table, arguments.output, watch)
    print_summary(watch, n_images, ratio)


if __name__ == "__main__":
    main()
