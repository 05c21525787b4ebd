"""Items to Dask tasks: one task an item, described and not computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import dask.bag as db

_T = TypeVar("_T")


def bag_of(items: Sequence[_T], function: Callable[[_T], object]) -> db.Bag | None:
    """Describe one task for each item as a bag.

    Parameters
    ----------
    items : sequence
        Small records; they travel with the graph.
    function : callable
        What a worker does with one of them.

    Returns
    -------
    dask.bag.Bag or None
        Of what `function` returns, one item in each partition of the bag; None when there is
        nothing to do, because dask.bag knows no empty bag.
    """
    import dask.bag as db  # noqa: PLC0415 - planning needs no Dask

    return db.from_sequence(items, npartitions=len(items)).map(function) if items else None
