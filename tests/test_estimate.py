"""`estimate`: what a run would take, from a try on some of its photos."""

from __future__ import annotations

from pathlib import Path

import pytest

from fruits_dask import estimate as module
from fruits_dask import pipeline
from fruits_dask.config import Settings, resolve
from fruits_dask.errors import ConfigError, InputError
from fruits_dask.estimate import estimate
from fruits_dask.progress import Silent
from fruits_dask.records import Capacity
from jobs import write_photos

HOUR = 3600


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Settings, pipeline.Outcome]:
    write_photos(tmp_path / "in", 12)
    flags = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "weights": "fruits"}
    settings = resolve(flags).settings
    return settings, pipeline.plan(settings)


def test_more_workers_share_the_work(
    planned: tuple[Settings, pipeline.Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 photos of 300 s each; what comes after is seconds."""
    settings, outcome = planned
    monkeypatch.setattr(module, "_try", lambda *_: (12, 300.0))
    hours = {}
    for n_workers in (1, 2):
        found = estimate(
            settings.model_copy(update={"workers": (n_workers, n_workers)}),
            outcome,
            progress=Silent(),
        )
        assert found.capacity.n_processes == n_workers
        assert found.cost is None
        hours[n_workers] = found.hours
    low, high = hours[1]
    assert low < 1.1 < high  # 12 x 300 s and a tenth, on a core like this
    assert hours[2] == pytest.approx((low / 2, high / 2), rel=0.01)


def test_rented_machines_cost_from_their_start_to_their_end(
    planned: tuple[Settings, pipeline.Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, outcome = planned
    rented = Capacity(n_processes=4, hourly=2.0, is_rented=True, description="")
    monkeypatch.setattr(module, "_try", lambda *_: (12, 0.0))
    monkeypatch.setattr(module, "find_capacity", lambda *_: rented)
    found = estimate(settings, outcome, progress=Silent())
    assert found.cost == (2 * found.hours[0], 2 * found.hours[1])
    assert found.hours[0] * HOUR >= 120


def test_workers_of_others_are_not_known(planned: tuple[Settings, pipeline.Outcome]) -> None:
    settings, outcome = planned
    borrowed = settings.model_copy(update={"cluster": "tcp://127.0.0.1:8786"})
    with pytest.raises(ConfigError, match="--cluster local or ec2"):
        estimate(borrowed, outcome, progress=Silent())


@pytest.mark.slow
def test_photos_of_all_places_are_tried(planned: tuple[Settings, pipeline.Outcome]) -> None:
    settings, outcome = planned
    found = estimate(settings, outcome, progress=Silent())
    assert (found.n_images, found.n_tried) == (12, 10)
    assert found.seconds_per_image > 0


@pytest.mark.slow
def test_no_photo_no_estimate(planned: tuple[Settings, pipeline.Outcome], tmp_path: Path) -> None:
    settings, outcome = planned
    for path in (tmp_path / "in").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of 10 photos could be decoded"):
        estimate(settings, outcome, progress=Silent())
