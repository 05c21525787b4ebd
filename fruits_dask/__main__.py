"""``python -m fruits_dask``."""

from .cli import main

if __name__ == "__main__":  # workers import this module again when they are spawned
    main()
