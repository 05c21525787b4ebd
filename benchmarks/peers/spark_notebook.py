"""Peer: Spark as the notebooks of the "fruits on EMR" exercise use it; see `spark_udf.py`.

What they share: 24 partitions, the model built anew in each of them, 1,024 photos at a time to the
pandas UDF, `predict` with its own batch size, TensorFlow with its own number of threads.

python benchmarks/peers/spark_notebook.py --output OUTPUT
"""

from spark_udf import Shape, main

NOTEBOOK = Shape(n_partitions=24, n_threads=None, keeps_model=False, udf_rows=1024, batch_size=32)

if __name__ == "__main__":
    main(NOTEBOOK, __doc__)
