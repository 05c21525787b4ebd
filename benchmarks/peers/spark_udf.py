"""Peer: Spark with an iterator pandas UDF over binaryFile, spark.ml's PCA; one machine, two cores.

The well-known notebooks of the "fruits on EMR" exercise with their time sinks mended: few
partitions, the model built once a Python worker, one TensorFlow thread in each of the two, larger
batches. `spark_notebook.py` beside this file is the same job with those of the notebooks.

python benchmarks/peers/spark_udf.py --output OUTPUT
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from common import (
    BATCH_SIZE,
    N_COMPONENTS,
    Matrix,
    Stopwatch,
    embed,
    list_photos,
    model_of_worker,
    parse_arguments,
    print_summary,
    write_model,
)
from pyspark import Broadcast
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import PCA, StandardScaler
from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as f


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How the work is cut."""

    n_partitions: int
    """Tasks."""
    n_threads: int | None
    """TensorFlow threads in each of two Python workers; None for what TensorFlow takes."""
    keeps_model: bool
    """Build the model once a Python worker; otherwise once a task."""
    udf_rows: int
    """Photos that the pandas UDF gets at a time."""
    batch_size: int
    """Photos that `predict` takes at a time."""


# One task and one TensorFlow thread for each of two cores. Two threads in each, and batches of 128,
# could not be told apart from this at 400 photos.
TUNED = Shape(
    n_partitions=2, n_threads=1, keeps_model=True, udf_rows=BATCH_SIZE, batch_size=BATCH_SIZE
)
# Of a share of the variance; float32 scores give some 1e-8.
TOLERANCE = 1e-5


def start_spark(shape: Shape) -> SparkSession:
    """Start Spark on two cores of this machine, on the loopback interface, without its pages."""
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    os.environ["PYSPARK_PYTHON"] = sys.executable
    settings = {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.memory": "4g",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(shape.udf_rows),
    }
    builder = SparkSession.builder.master("local[2]").appName("fruits")
    for name, value in settings.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    for module in (common.__file__, __file__):  # the Python workers import them
        spark.sparkContext.addPyFile(module)
    return spark


def read_photos(spark: SparkSession, root: Path, limit: int | None) -> DataFrame:
    """Read path, label, split and content of the photos."""
    reader = spark.read.format("binaryFile").option("pathGlobFilter", "*.jpg")
    if limit is None:
        photos = reader.option("recursiveFileLookup", "true").load(str(root))
    else:
        photos = reader.load(list_photos(root, limit))
    folders = f.split("path", "/")
    return photos.select(
        f.regexp_replace("path", "^file:", "").alias("path"),
        f.element_at(folders, -2).alias("label"),
        f.element_at(folders, -3).alias("split"),
        "content",
    )


def features_udf(weights: Broadcast[bytes], shape: Shape) -> Callable[[str], Column]:
    """Make the function of a column of JPEG bytes that computes the features."""

    @f.pandas_udf("array<float>")
    def featurize(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        build: Any = model_of_worker if shape.keeps_model else model_of_worker.__wrapped__
        model = build(weights.value, shape.n_threads)
        for contents in batches:
            yield pd.Series(list(embed(model, contents.tolist(), shape.batch_size)))

    return featurize


def write_features(
    spark: SparkSession, photos: DataFrame, weights: Path, output: Path, shape: Shape
) -> DataFrame:
    """Compute the features, write them as Parquet and read them back."""
    featurize = features_udf(spark.sparkContext.broadcast(weights.read_bytes()), shape)
    features = photos.repartition(shape.n_partitions).select(
        "path", "label", "split", featurize("content").alias("features")
    )
    features.write.parquet(str(output / "features"))
    return spark.read.parquet(str(output / "features"))


def fit_pca(vectors: DataFrame) -> PipelineModel:
    """Fit PCA on the Training rows."""
    # Spark's PCA does not centre what it projects.
    centre = StandardScaler(inputCol="vector", outputCol="centred", withMean=True, withStd=False)
    pca = PCA(k=N_COMPONENTS, inputCol="centred", outputCol="scores")
    return Pipeline(stages=[centre, pca]).fit(vectors.where("split = 'Training'"))


def write_scores(spark: SparkSession, vectors: DataFrame, model: PipelineModel, pca: Path) -> int:
    """Project all rows; write Parquet and, from that, one CSV file; count the rows."""
    scores = vector_to_array("scores", "float32").alias("scores")
    projected = model.transform(vectors).select("path", "label", "split", scores)
    projected.write.parquet(str(pca / "scores"))
    stored = spark.read.parquet(str(pca / "scores"))
    columns = [f.col("scores")[i].alias(f"pc_{i + 1:03d}") for i in range(N_COMPONENTS)]
    table = stored.orderBy("path").select("path", "label", "split", *columns).coalesce(1)
    with tempfile.TemporaryDirectory(dir=pca) as folder:
        table.write.csv(f"{folder}/csv", header=True)
        (part,) = Path(folder, "csv").glob("part-*.csv")
        part.rename(pca / "scores.csv")
    return stored.count()


def check_pca(scores: Path, stds: Matrix, ratio: Matrix) -> None:
    """Hold the variance of the stored Training scores to what the model says of itself.

    Spark 4.3 takes the SVD of the covariance in pure Java where it finds no native LAPACK. With
    fewer Training photos than features its components were then right or wrong, silently, by how
    the rows were cut; with more they were right for every cut that was tried.
    """
    table = pq.read_table(scores, columns=["scores"], filters=[("split", "=", "Training")])
    found = np.array(table["scores"].to_pylist()).var(axis=0, ddof=1)
    error = np.abs(found / np.square(stds).sum() - ratio).max()
    if not error < TOLERANCE:
        raise RuntimeError(
            f"Spark's PCA is wrong: a component explains {error:.1e} more or less of the variance "
            f"than its model says; found {len(table)} Training photos, expected more than "
            "the 1,280 features; give a larger --limit"
        )


def main(shape: Shape = TUNED, description: str | None = __doc__) -> None:
    """Do the whole job."""
    arguments = parse_arguments(description)
    watch = Stopwatch()
    with watch.phase("features"):
        spark = start_spark(shape)
        photos = read_photos(spark, arguments.input, arguments.limit)
        features = write_features(spark, photos, arguments.weights, arguments.output, shape)
    with watch.phase("pca"):
        vectors = features.withColumn("vector", array_to_vector("features")).cache()
        model = fit_pca(vectors)
        centre, pca = model.stages
        ratio, stds = pca.explainedVariance.toArray(), centre.std.toArray()
    with watch.phase("write"):
        write_model(arguments.output, pca.pc.toArray().T, centre.mean.toArray(), ratio)
        n_images = write_scores(spark, vectors, model, arguments.output / "pca")
    spark.stop()
    check_pca(arguments.output / "pca" / "scores", stds, ratio)
    print_summary(watch, n_images, ratio)


if __name__ == "__main__":
    main()
