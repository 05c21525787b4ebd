"""Work for others: items as Dask tasks, described and not computed; calls in the background."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
    from dask.highlevelgraph import HighLevelGraph  # noqa: PLC0415
    from dask.utils import funcname  # noqa: PLC0415

    if not items:
        return None
    # Not from_sequence().map(): dask 2026.8 adds an alias to every task, which the scheduler sends
    # to a worker as a task of its own, where it waits until a thread is free again.
    # The name is new each time: these tasks are done for their effects.
    name = f"{funcname(function)}-{uuid.uuid4().hex}"
    graph = {(name, i): (list, [(function, item)]) for i, item in enumerate(items)}
    return db.Bag(HighLevelGraph.from_collections(name, graph), name, len(items))


def in_background(function: Callable[..., _T], *arguments: object) -> Future[_T]:
    """Call a function in a thread of its own, which holds up neither Ctrl-C nor the end.

    Parameters
    ----------
    function : callable
        What to call.
    *arguments : object
        What to call it with.

    Returns
    -------
    concurrent.futures.Future
        Of what it returns or raises.
    """
    future: Future[_T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as exc:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(exc)

    threading.Thread(target=call, daemon=True).start()
    return future
