"""`errors`: one root, each kind also a builtin, and all of them travel between processes."""

from __future__ import annotations

import pickle

import pytest

from fruits_dask import errors
from fruits_dask.errors import FruitsDaskError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FruitsDaskError) and kind is not FruitsDaskError
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_also_a_builtin(kind: type[FruitsDaskError]) -> None:
    builtin = {base for base in kind.__mro__ if base.__module__ == "builtins"}
    assert builtin - {Exception, BaseException, object}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_says_what_it_is(kind: type[FruitsDaskError]) -> None:
    assert kind.__doc__
    assert kind.__doc__ != FruitsDaskError.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_travels_between_processes(kind: type[FruitsDaskError]) -> None:
    message = "s3://bucket/p\u00eache: [Errno 2] two\nlines"
    copy = pickle.loads(pickle.dumps(kind(message)))  # noqa: S301 - as Dask does
    assert type(copy) is kind
    assert str(copy) == message


def test_there_are_kinds() -> None:
    assert len(KINDS) > 10
