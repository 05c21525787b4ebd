"""A bucket of fruit photos to MobileNetV2 features, a PCA table and a report, on Dask."""

__version__ = "0.1.0"
