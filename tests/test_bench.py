"""The command that measures: that it measures what it says, not how fast this machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fruits_dask import bench
from fruits_dask.config import resolve
from fruits_dask.errors import InputError
from fruits_dask.progress import Silent
from jobs import write_photos

ANYWHERE = "127.0.0.1:0"


class Listener(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def start(self, stage: str, *, total: int | None, unit: str, done: int = 0) -> None:
        self.heard.append(stage)


def marked(*marks: tuple[float, int]) -> bench._Stopwatch:
    return bench._Stopwatch(listener=Silent(), stage="extract", marks=list(marks))


def test_the_steady_state_begins_when_all_are_warm_and_ends_before_the_first_is_idle() -> None:
    """Two workers: four slow parts to warm up, four at 100 images/s, four at the end."""
    warm = [(10.0 * n, n * 50) for n in range(1, 5)]
    steady = [(40.0 + n, 200 + n * 100) for n in range(1, 5)]
    end = [(44.0 + 10 * n, 600 + n * 50) for n in range(1, 5)]
    assert marked(*warm, *steady, *end).steady(n_workers=2) == pytest.approx(100)


def test_too_few_photos_have_no_speed() -> None:
    with pytest.raises(InputError, match="too few"):
        marked(*((float(n), n * 64) for n in range(1, 9))).steady(n_workers=2)


@pytest.mark.slow
def test_what_is_measured_is_consistent(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 120)
    chosen = {
        "input": str(tmp_path / "photos"),
        "weights": "fruits",
        "engine": "openvino",
        "workers": 2,
        "partition_size": 8,
        "memory_limit": "2GiB",
        "dashboard_address": ANYWHERE,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_CEILING_SECONDS", 0.5)
        patch.chdir(tmp_path)
        listener = Listener()
        ceiling, speed = bench.measure(resolve(chosen).settings, progress=listener)
    assert speed.n_images == 120
    assert speed.n_workers == 2
    assert 0 < speed.extract < ceiling
    assert speed.steady > 0
    assert speed.first_part_seconds < 120 / speed.extract + 60
    assert speed.peak_memory_bytes > 50e6
    assert listener.heard == ["ceiling", "plan", "extract"]
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
