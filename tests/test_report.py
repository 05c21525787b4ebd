"""The page of a result: `_write_result` makes small ones by hand; the browser tests look at them.

`Recipe`s differ in what a result has or lacks; `Page` parses what was written; `driver` is a
headless Chromium that all browser tests share.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

import browser
from browser import console_problems, open_browser, prefer, requested_urls, resize, wait_for
from fruits_dask import layout
from fruits_dask.errors import ResultError
from fruits_dask.features import vector_table, write_failures, write_table, write_thumbnails
from fruits_dask.records import Failure
from fruits_dask.reduce import PcaModel, read_model, write_model
from fruits_dask.report import tables, write_report
from fruits_dask.report.contents import MAX_EXAMPLES, read_failures, read_sample
from fruits_dask.report.plots import palette
from fruits_dask.results import Identity, new_record, write_record
from fruits_dask.source import MANIFEST_SCHEMA
from fruits_dask.storage import LocalStore, StoredObject

INPUT = "/photos"
HOSTILE_LABEL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=2>$$x$$ @path"
HOSTILE_FILE = "\"><img src=x onerror=window.hacked=3>'{{7*7}} $index @{label} </script>.jpg"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a handmade result is like."""

    n_photos: int = 24
    n_partitions: int = 2
    labels: tuple[str | None, ...] = ("Apple", "Banana", "Kiwi")
    splits: tuple[str | None, ...] = ("Training", "Test")
    n_components: int | None = 3
    failures: tuple[Failure, ...] = ()
    thumbnails: str = "all"
    stages: tuple[str, ...] = ("plan", "extract", "reduce")
    file: str = "{}.jpg"
    extra: dict[str, Any] = field(default_factory=dict)


class CountingStore(LocalStore):
    """Remembers which objects were read."""

    def __init__(self) -> None:
        self.reads: list[str] = []

    def read(self, path: str) -> bytes:
        self.reads.append(path)
        return super().read(path)


class Page(HTMLParser):
    """What a reader of the HTML finds in it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.plots: dict[str, Any] = {}
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            plot = self.tags[-1][1].get("data-plot")
            if plot is None:
                self.scripts.append(data)
            else:
                self.plots[plot] = json.loads(data)
        elif self._open and self._open[-1] != "style":
            self.words.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def column(self, plot: str, name: str) -> list[Any]:
        """Return a column of the data of a plot."""
        return next(_find_columns(self.plots[plot], name))


def _find_columns(item: Any, name: str) -> Iterator[list[Any]]:
    if isinstance(item, dict):
        if item.get("name") == "ColumnDataSource":
            yield dict(item["attributes"]["data"]["entries"])[name]
        item = list(item.values())
    if isinstance(item, list):
        for value in item:
            yield from _find_columns(value, name)


def _jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), (40 + 5 * number % 200, 120, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


def _write_result(output: Path, recipe: Recipe) -> str:
    """Store what a run would have stored, and return its address."""
    store, root = LocalStore(), str(output)
    rows = [
        {
            "path": "/".join(
                [
                    INPUT,
                    str(recipe.splits[i % len(recipe.splits)]),
                    f"{recipe.labels[i % len(recipe.labels)]}",
                    recipe.file.format(i),
                ]
            ),
            "etag": "0",
            "size_bytes": 1000,
            "label": recipe.labels[i % len(recipe.labels)],
            "split": recipe.splits[i % len(recipe.splits)],
        }
        for i in range(recipe.n_photos)
    ]
    manifest = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    write_table(store, layout.join(root, layout.MANIFEST), manifest)
    for index, numbers in enumerate(np.array_split(np.arange(len(rows)), recipe.n_partitions)):
        _write_parts(store, root, index, recipe, manifest, numbers)
    write_record(store, root, _record(recipe, manifest))
    return root


def _write_parts(  # noqa: PLR0917
    store: LocalStore,
    root: str,
    index: int,
    recipe: Recipe,
    manifest: pa.Table,
    numbers: np.ndarray[Any, Any],
) -> None:
    write_failures(store, root, index, recipe.failures if index == 0 else ())
    keys = manifest.take(pa.array(numbers, pa.int64()))
    if recipe.thumbnails == "all" or recipe.thumbnails == str(index):
        # In another order than the scores: rows belong together by their path.
        jpegs = {
            path: _jpeg(i)
            for path, i in reversed(list(zip(keys["path"].to_pylist(), numbers, strict=True)))
        }
        write_thumbnails(store, root, index, jpegs)
    if recipe.n_components is not None:
        scores = np.random.default_rng(index).normal(size=(len(numbers), recipe.n_components))
        scores[:, 0] = numbers
        table = vector_table(keys, scores.astype(np.float32), "scores", {})
        write_table(store, layout.part_path(root, layout.SCORES, index), table)
        write_model(store, root, _model(recipe.n_components))


def _model(k: int) -> PcaModel:
    variance = np.asarray(0.5 ** np.arange(1, k + 1), np.float64)
    return PcaModel(
        components=np.eye(k, k + 5),
        mean=np.zeros(k + 5),
        explained_variance=variance,
        explained_variance_ratio=variance,
        singular_values=np.sqrt(variance),
        n_samples=20,
    )


def _record(recipe: Recipe, manifest: pa.Table) -> dict[str, Any]:
    identity = {"input": INPUT, "weights": "fruits", "weights_sha256": "ab" * 32, "image_px": 96}
    record = new_record(Identity(values=identity))
    k = recipe.n_components or 0
    counts = {
        name: {
            row["values"]: row["counts"]
            for row in manifest[name].value_counts().to_pylist()
            if row["values"] is not None
        }
        for name in ("label", "split")
    }
    stages: dict[str, Any] = {
        "plan": {
            "seconds": 1.5,
            "n_images": recipe.n_photos + len(recipe.failures),
            "n_bytes": 12_300_000,
            "labels": counts["label"],
            "splits": counts["split"],
        },
        "extract": {
            "seconds": 60.5,
            "n_features": recipe.n_photos,
            "n_failures": len(recipe.failures),
            "images_per_second": 1234.5,
            "n_workers": 2,
            "operations": {"read": 1.25, "decode": 2.5, "featurize": 100.0, "store": 0.5},
            "peak_memory_bytes": {"4711": 812_000_000, "4712": 406_000_000},
        },
        "reduce": {
            "seconds": 3.0,
            "n_components": k,
            "reducer": "incremental",
            "explained_variance_ratio": 1 - 0.5**k,
            "operations": {"fit": 2.0, "scores": 0.75, "csv": 0.25},
        },
    }
    record["stages"] = {name: stages[name] for name in recipe.stages}
    record["workers"] = {"n_workers": 2, "seconds": 1.5}
    record["regions"] = {"s3://fruits-eu/photos": "eu-west-1"}
    record["settings"] = {"input": INPUT, "components": k}
    return record | recipe.extra


def _write_page(output: Path, recipe: Recipe) -> Page:
    root = _write_result(output, recipe)
    write_report(LocalStore(), root)
    return Page(Path(root, layout.REPORT).read_text("utf-8"))


def _failure(number: int, error: str = "NotAnImageError", message: str = "no image") -> Failure:
    return Failure(
        path=f"{INPUT}/bad/{number:04d}.jpg", stage="decode", error=error, message=message
    )


# --- what it tells ------------------------------------------------------------------------------


def test_headline_and_tables_hold_the_numbers(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe(failures=(_failure(1),)))
    assert "24 photos, 3 components" in page.text
    for words in (
        "Photos listed 25 12.3 MB",
        "Featurized 24",
        "Failed 1 4.0 % of all",
        "Labels 3",
        "Components 3 of 8 features",
        "Variance kept 87.5 % fitted on 20 photos",
        "Photos per second 1,234 2 workers",
        "1 component keeps 50 % of the variance, 3 keep 80 %",
        "featurize pixels to vectors – 1 min 40 s",  # noqa: RUF001
        "fit find the components 2.00 s –",  # noqa: RUF001
        "4711 812 MB",
        "Apple 4 4 8",
        "All 12 12 24",
        "SHA-256 of the weights abababababab…",
        "s3://fruits-eu/photos eu-west-1",
        f"retry-failed --output {tmp_path}",
        "bad/0001.jpg decode NotAnImageError no image",
    ):
        assert words in page.text, words
    # The time of the report itself comes on top of the 65 s in run.json.
    assert re.search(r"Whole job 1 min ([5-9]|\d\d) s", page.text)
    assert re.search(r"report this page, up to its writing \d+\.\d\d s", page.text)


@pytest.mark.parametrize(
    ("exact_share", "percent"),
    [(0.99981234, "99.9812 %"), (1 - 1e-12, "100 %"), (0.9999999, "99.9999 %")],
)
def test_the_reducer_is_measured_against_what_is_reachable(
    exact_share: float, percent: str, tmp_path: Path
) -> None:
    root = _write_result(tmp_path, Recipe())
    store = LocalStore()
    write_model(store, root, replace(read_model(store, root), exact_share=exact_share))
    write_report(store, root)
    text = Page(Path(root, layout.REPORT).read_text("utf-8")).text
    assert f"of dask-ml's IncrementalPCA keep {percent} of the variance that any" in text


def test_a_reducer_that_was_not_measured_is_not_praised(tmp_path: Path) -> None:
    assert "keep at best" not in _write_page(tmp_path, Recipe()).text


def test_bars_are_relative_to_the_longest_of_their_kind(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe())
    assert "width: 100.0%" in page.html
    durations = page.html[page.html.index('<table class="durations">') :]
    found = [float(w) for w in re.findall(r"width: ([\d.]+)%", durations)[:10]]
    assert found == [2.5, 2.5, 100.0, 1.2, 2.5, 100.0, 0.5, 5.0, 3.3, 1.2]  # workers, plan .. csv


def test_points_carry_their_own_picture(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe())
    numbers = [round(x) for x in page.column("scatter", "x")]
    assert numbers == list(range(24))
    pictures = page.column("scatter", "thumbnail")
    prefix = "data:image/jpeg;base64,"
    assert [base64.b64decode(p.removeprefix(prefix)) for p in pictures] == [
        _jpeg(i) for i in numbers
    ]
    assert page.column("scatter", "path")[:2] == ["Training/Apple/0.jpg", "Test/Banana/1.jpg"]
    assert page.column("scatter", "label")[:2] == ["Apple", "Banana"]
    assert len(set(page.column("scatter", "colour"))) == 3
    assert set(page.column("scatter", "marker")) == {"circle", "triangle"}


def test_axes_name_the_share_of_the_variance(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe())
    item = json.dumps(page.plots["scatter"])
    assert "Component 1 (50.0 % of the variance)" in item
    assert "Component 2 (25.0 % of the variance)" in item
    assert page.column("variance", "cumulative") == [0.5, 0.75, 0.875]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(), "No failures: every listed photo has features."),
        (Recipe(labels=(None,)), "(no label) 12 12 24"),
        (Recipe(splits=(None,)), "Label Photos Apple 8"),
        (Recipe(labels=(None,), splits=(None,)), "All 24"),
        (Recipe(n_components=1), "The photos along the first component"),
        (Recipe(n_components=300), "24 photos, 300 components"),
        (Recipe(n_components=None, stages=("plan", "extract")), "not been reduced yet"),
        (Recipe(thumbnails="none"), "24 of 24 photos shown"),
        (Recipe(n_photos=0), "There are no scores to plot."),
        (Recipe(n_photos=0, n_components=None, stages=()), "No photo has been worked on yet."),
        (Recipe(stages=()), "Apple 4 4 8"),
        (Recipe(labels=tuple(f"L{i:03d}" for i in range(131)), n_photos=262), "All 131 labels"),
        (Recipe(extra={"identity": {}, "regions": None, "versions": {}}), "24 photos"),
    ],
    ids=lambda value: None if isinstance(value, Recipe) else value,
)
def test_any_shape_of_result_has_a_page(tmp_path: Path, recipe: Recipe, words: str) -> None:
    assert words in _write_page(tmp_path, recipe).text


def test_one_component_is_plotted_over_the_rows(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe(n_components=1))
    assert page.column("scatter", "x") == list(range(24))
    assert [round(y) for y in page.column("scatter", "y")] == list(range(24))
    assert "Photo, in the order of the list" in json.dumps(page.plots["scatter"])


def test_a_legend_of_one_entry_is_left_out(tmp_path: Path) -> None:
    page = _write_page(tmp_path / "one", Recipe(labels=(None,), splits=(None,)))
    assert page.all("button") == []
    assert _write_page(tmp_path / "two", Recipe(labels=(None,))).all("button") != []


def test_long_tables_are_folded(tmp_path: Path) -> None:
    n_short = len(_write_page(tmp_path / "short", Recipe()).all("details"))
    many = Recipe(labels=tuple(f"L{i}" for i in range(21)), n_photos=42)
    assert len(_write_page(tmp_path / "long", many).all("details")) == n_short + 1


def test_the_dask_report_is_linked_when_it_is_there(tmp_path: Path) -> None:
    assert _write_page(tmp_path, Recipe()).all("a") == []
    LocalStore().write(layout.join(str(tmp_path), layout.DASK_REPORT), b"x")
    assert _write_page(tmp_path, Recipe()).all("a") == [{"href": "report/dask-performance.html"}]


# --- what it reads ------------------------------------------------------------------------------


def test_only_parts_with_thumbnails_are_read(tmp_path: Path) -> None:
    root = _write_result(tmp_path, Recipe(n_partitions=8, thumbnails="5"))
    store = CountingStore()
    points = read_sample(store, root)
    assert sorted(Path(path).relative_to(root).as_posix() for path in store.reads) == [
        "pca/scores/part-00005.parquet",
        "report/thumbnails/part-00005.parquet",
    ]
    assert [point.path for point in points] == [
        f"{INPUT}/Test/Apple/15.jpg",
        f"{INPUT}/Training/Banana/16.jpg",
        f"{INPUT}/Test/Kiwi/17.jpg",
    ]


def test_without_thumbnails_few_parts_are_read(tmp_path: Path) -> None:
    root = _write_result(tmp_path, Recipe(n_photos=100, n_partitions=50, thumbnails="none"))
    store = CountingStore()
    points = read_sample(store, root)
    assert len(store.reads) == 16
    assert len(points) == 32
    assert {points[0].path, points[-1].path} == {
        f"{INPUT}/Training/Apple/0.jpg",
        f"{INPUT}/Test/Apple/99.jpg",
    }


@pytest.mark.parametrize("limit", [1, 7, 50, 99, 100, 1000])
def test_samples_are_bounded_and_even(tmp_path: Path, limit: int) -> None:
    root = _write_result(tmp_path, Recipe(n_photos=100))
    rows = [point.scores[0] for point in read_sample(LocalStore(), root, limit)]
    assert len(rows) == min(limit, 100)
    assert rows == sorted(set(rows))
    steps = np.diff(rows)
    assert len(steps) == 0 or steps.max() <= 2 * steps.min() + 1


def test_failures_are_all_counted_and_every_kind_is_shown() -> None:
    rare = [_failure(9000 + i, error=f"Rare{i}Error") for i in range(5)]
    store = _FailureStore({0: [_failure(i) for i in range(200)], 1: [], 2: rare})
    digest = read_failures(store, "/out", None)
    assert digest.n_failures == 205
    assert next(iter(digest.counts.items())) == (("decode", "NotAnImageError"), 200)
    assert len(digest.examples) == MAX_EXAMPLES
    assert {f.error for f in rare} <= {f.error for f in digest.examples}
    assert digest.examples == sorted(digest.examples, key=lambda failure: failure.path)


def test_no_part_is_read_for_no_failures_or_after_the_last() -> None:
    store = _FailureStore({i: [_failure(i)] if i < 2 else [] for i in range(500)})
    assert read_failures(store, "/out", 0).n_failures == 0
    assert store.n_reads == 0
    assert read_failures(store, "/out", 2).n_failures == 2
    assert store.n_reads < 50


class _FailureStore(LocalStore):
    """Parts of failures in memory."""

    def __init__(self, parts: dict[int, list[Failure]]) -> None:
        self.n_reads = 0
        self._written: dict[str, bytes] = {}
        for index, failures in parts.items():
            write_failures(self, "/out", index, failures)

    def list_folder(self, folder: str) -> list[StoredObject]:
        names = [path.removeprefix(f"{folder}/") for path in self._written]
        return [StoredObject(name=name, size_bytes=1, modified_seconds=0.0) for name in names]

    def read(self, path: str) -> bytes:
        self.n_reads += 1
        return self._written[path]

    def write(self, path: str, data: bytes) -> None:
        self._written[path] = data


def test_no_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"run\.json"):
        write_report(LocalStore(), str(tmp_path))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    root = _write_result(tmp_path, Recipe())
    part = Path(layout.part_path(root, layout.SCORES, 1))
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ResultError, match=r"scores/part-00001\.parquet is damaged"):
        write_report(LocalStore(), root)
    assert not Path(root, layout.REPORT).exists()


# --- how it is made -----------------------------------------------------------------------------


def test_structure_is_semantic(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe(failures=(_failure(1),)))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    named = {attributes.get("aria-labelledby") for attributes in page.all("section")}
    assert named <= set(identifiers)


def test_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe())
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            address = attributes.get(name)
            assert address is None or address.startswith("data:"), address
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "sourceMappingURL" not in page.html


def test_policy_allows_its_own_scripts_and_no_other(tmp_path: Path) -> None:
    page = _write_page(tmp_path, Recipe())
    policies = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    rules = dict(rule.strip().partition(" ")[::2] for rule in str(policies[0]).split(";"))
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()) for s in page.scripts]
    assert len(digests) == 2
    assert rules["script-src"] == " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    failure = _failure(1, error="<b>bold</b>", message="</script><script>window.hacked=4</script>")
    plain = _write_page(tmp_path / "plain", Recipe(failures=(_failure(1),)))
    recipe = Recipe(
        labels=(HOSTILE_LABEL,),
        splits=("<i>", "</textarea>"),
        file=HOSTILE_FILE.replace("{", "{{").replace("}", "}}") + "{}",
        failures=(failure,),
        extra={"settings": {"<u>": "<s>"}, "versions": {"<q>": "<q>"}},
    )
    page = _write_page(tmp_path / "hostile", recipe)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert len(page.all("script")) == len(plain.all("script"))
    assert page.all("img") == []
    assert HOSTILE_LABEL in page.text
    assert "<b>bold</b>" in page.text
    assert "</script><script>window.hacked=4" in page.text
    assert "<u> <s>" in page.text
    assert page.column("scatter", "label") == [HOSTILE_LABEL] * 24


def test_size_stays_below_8_mb(tmp_path: Path) -> None:
    root = _write_result(tmp_path, Recipe(n_photos=1500, thumbnails="none", n_components=100))
    store, noise = LocalStore(), np.random.default_rng(0)
    for index in range(2):
        keys = pq.read_table(layout.part_path(root, layout.SCORES, index))["path"].to_pylist()
        write_thumbnails(store, root, index, {path: noise.bytes(2000) for path in keys})
    write_report(store, root)
    assert 4e6 < Path(root, layout.REPORT).stat().st_size < 8e6


def test_label_colours_can_be_told_apart() -> None:
    for n_labels in (1, 7, 8, 30, 131):
        colours = palette(n_labels)
        assert len(set(colours)) == n_labels
        assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    # Neighbours in the legend differ in lightness, so also for eyes that see no hue.
    many = [_luminance(colour) for colour in palette(131)]
    assert min(abs(a - b) for a, b in itertools.pairwise(many)) > 0.04


def _luminance(colour: str) -> float:
    """Relative luminance of WCAG 2, of ``#rrggbb`` or ``rgb(r, g, b)``."""
    if colour.startswith("#"):
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    else:
        values = [float(v) / 255 for v in re.findall(r"[\d.]+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.004, "0.00 s"),
        (9.876, "9.88 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (7322, "2 h 2 min"),
        (None, tables.UNKNOWN),
    ],
)
def test_seconds(value: float | None, words: str) -> None:
    assert tables.seconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (2_830_000, "2.83 MB"),
        (5e15, "5,000 TB"),
    ],
)
def test_size(value: float, words: str) -> None:
    assert tables.size(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.12345, "12.3 %"), (0.99949, "99.9 %"), (0.99999, "> 99.9 %"), (1.0, "100.0 %")],
)
def test_share(value: float, words: str) -> None:
    assert tables.share(value) == words


# --- in a browser -------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(bool(browser.MISSING), reason=browser.MISSING)
# Plots live in shadow roots, where a selector does not look.
_FIND = """((selector) => {
  const found = [];
  const walk = (root) => { for (const element of root.querySelectorAll("*")) {
    if (element.matches(selector)) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  } };
  walk(document);
  return found;
})"""
_PLACE = """
const view = [...Bokeh.index.roots].find((view) => view.model.name === arguments[0]);
const { x, y } = view.model.renderers[0].data_source.data;
const box = view.el.getBoundingClientRect();
return [box.left + view.frame.x_scale.compute(x[arguments[1]]),
        box.top + view.frame.y_scale.compute(y[arguments[1]])];
"""
_INKED = """
return arguments[0].map((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let inked = 0;
  for (let i = 3; i < data.length; i += 4) inked += data[i] > 0;
  return inked;
});
"""

_COUNT_PRINT_INK = """
return canvases.map((canvas) => {
  const pixels = new Uint32Array(
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return pixels.reduce((sum, pixel) => sum + (pixel === 0xff58504a), 0);  // opaque #4a5058
});
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ordinary")
    _write_page(folder, Recipe(n_photos=60, n_components=20, failures=(_failure(1),)))
    return f"file://{folder}/report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    recipe = Recipe(
        labels=(HOSTILE_LABEL, "W" * 90),
        file=HOSTILE_FILE.replace("{", "{{").replace("}", "}}") + "{}" + "x" * 120,
        failures=(_failure(1, error="E" * 80, message="m" * 300),),
        extra={"settings": {"s" * 60: "v" * 200}, "regions": {f"s3://{'b' * 150}": "eu-west-1"}},
    )
    _write_page(folder, recipe)
    return f"file://{folder}/report.html"


def _open(driver: Chrome, url: str, *, width_px: int = 1280, scheme: str = "light") -> None:
    resize(driver, width_px)
    prefer(driver, scheme)
    console_problems(driver)
    requested_urls(driver)
    driver.get(url)
    wait_for(driver, "document.documentElement.dataset.drawn === '2'")


def _hover(driver: Chrome, index: int) -> WebElement:
    """Point at a photo and return its tooltip."""
    driver.execute_script("document.getElementById('scatter').scrollIntoView({block: 'center'})")
    x, y = driver.execute_script(_PLACE, "scatter", index)
    for step in (-2, 0):
        event = {"type": "mouseMoved", "x": x + step, "y": y}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    tip: WebElement = wait_for(driver, f"{_FIND}('.tip').find((tip) => tip.offsetWidth)")
    return tip


def _n_shown(driver: Chrome) -> int:
    return int(
        driver.execute_script(
            "const view = [...Bokeh.index.roots].find((view) => view.model.name === 'scatter');"
            "return view.model.renderers[0].view.indices.count"
        )
    )


@pytest.mark.browser
@in_browser
def test_plots_are_drawn_without_problem_or_request(driver: Chrome, ordinary: str) -> None:
    _open(driver, ordinary)
    canvases = driver.execute_script(f"return {_FIND}('canvas')")
    inked = sorted(driver.execute_script(_INKED, canvases))
    assert sum(n > 3000 for n in inked) >= 2, inked
    assert console_problems(driver) == []
    assert requested_urls(driver) == [ordinary]


@pytest.mark.browser
@in_browser
def test_policy_stops_what_a_page_could_be_tricked_into(driver: Chrome, ordinary: str) -> None:
    _open(driver, ordinary)
    driver.execute_script(
        "window.stopped = [];"
        "addEventListener('securitypolicyviolation', (e) => stopped.push(e.effectiveDirective));"
        "const script = document.createElement('script'); script.textContent = 'window.hacked = 1';"
        "document.body.append(script);"
        "document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.hacked = 2\">b</b>');"
        "document.body.lastChild.click();"
        "new Image().src = 'http://127.0.0.1:9/stolen.png';"
        "fetch('http://127.0.0.1:9/stolen').catch(() => null);"
    )
    stopped = wait_for(driver, "stopped.length >= 4 && stopped")
    assert {"script-src-elem", "script-src-attr", "img-src", "connect-src"} == set(stopped)
    assert driver.execute_script("return window.hacked") is None
    console_problems(driver)


@pytest.mark.browser
@in_browser
@pytest.mark.parametrize("width_px", [1280, 390])
def test_pointing_at_a_photo_shows_it(driver: Chrome, ordinary: str, width_px: int) -> None:
    _open(driver, ordinary, width_px=width_px)
    tip = _hover(driver, 31)  # in the middle, where a tooltip has least room
    picture = tip.find_element(By.CSS_SELECTOR, "img")
    expected = base64.b64encode(_jpeg(31)).decode()
    assert picture.get_attribute("src") == f"data:image/jpeg;base64,{expected}"
    assert driver.execute_script("return arguments[0].naturalWidth", picture) == 48
    assert tip.text.split("\n") == ["Banana", "Test", "Test/Banana/31.jpg"]
    box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", tip)
    assert box["left"] >= 0
    assert box["right"] <= width_px
    assert console_problems(driver) == []


@pytest.mark.browser
@in_browser
@pytest.mark.parametrize("page", ["ordinary", "hostile"])
def test_nothing_overflows_on_a_phone(
    driver: Chrome, page: str, request: pytest.FixtureRequest
) -> None:
    _open(driver, request.getfixturevalue(page), width_px=390)
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    wide = driver.execute_script(
        "return [...document.querySelectorAll('main *')].filter((e) => !e.closest('.wide, .unseen')"
        " && e.getBoundingClientRect().right > 391).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


@pytest.mark.browser
@in_browser
def test_hostile_names_do_not_run(driver: Chrome, hostile: str) -> None:
    _open(driver, hostile)
    tip = _hover(driver, 10)
    assert tip.text.split("\n")[0] == HOSTILE_LABEL
    assert HOSTILE_FILE in tip.text
    assert len(tip.find_elements(By.CSS_SELECTOR, "img")) == 1
    assert tip.find_elements(By.CSS_SELECTOR, "script") == []
    assert driver.execute_script("return window.hacked") is None
    # The policy would also stop them, and say so here.
    assert console_problems(driver) == []
    assert requested_urls(driver) == [hostile]


@pytest.mark.browser
@in_browser
def test_colour_schemes_are_legible_and_switch_live(driver: Chrome, ordinary: str) -> None:
    _open(driver, ordinary, scheme="light")
    light = _scheme_colours(driver)
    prefer(driver, "dark")
    wait_for(
        driver, f"Bokeh.documents[0].roots()[0].below[0].axis_label_text_color !== '{light[2]}'"
    )
    dark = _scheme_colours(driver)
    assert _luminance(light[0]) > 0.8
    assert _luminance(dark[0]) < 0.05
    for background, text, axis in (light, dark):
        assert _contrast(background, text) > 10
        assert _contrast(background, axis) > 4.5
    tip = _hover(driver, 5)
    colours = driver.execute_script(
        "const host = arguments[0].getRootNode().host;"
        "const name = arguments[0].querySelector('b');"
        "return [getComputedStyle(host).backgroundColor, getComputedStyle(name).color]",
        tip,
    )
    assert _luminance(colours[0]) < 0.05
    assert _contrast(*colours) > 10
    prefer(driver, "light")
    assert console_problems(driver) == []


def _scheme_colours(driver: Chrome) -> tuple[str, str, str]:
    """Background and text of a section, and text of an axis."""
    found = driver.execute_script(
        "const style = getComputedStyle(document.querySelector('#map').closest('section'));"
        "return [style.backgroundColor, style.color,"
        "        Bokeh.documents[0].roots()[0].below[0].axis_label_text_color]"
    )
    return found[0], found[1], found[2]


@pytest.mark.browser
@in_browser
def test_legend_hides_shows_and_isolates(driver: Chrome, ordinary: str) -> None:
    _open(driver, ordinary)
    assert _n_shown(driver) == 60
    apple, banana, kiwi = driver.find_elements(By.CSS_SELECTOR, "[data-kind=label]")
    apple.click()
    assert _n_shown(driver) == 40
    assert [b.get_attribute("aria-pressed") for b in (apple, banana, kiwi)] == [
        "false",
        "true",
        "true",
    ]
    driver.find_element(By.CSS_SELECTOR, "[data-kind=split]").click()
    assert _n_shown(driver) == 20
    driver.find_element(By.CSS_SELECTOR, "[data-all=hide]").click()
    assert _n_shown(driver) == 0
    driver.find_element(By.CSS_SELECTOR, "[data-all=show]").click()
    assert _n_shown(driver) == 60
    ActionChains(driver).double_click(kiwi).perform()
    assert _n_shown(driver) == 20
    status = driver.find_element(By.ID, "shown").text
    assert status == "20 of 60 points shown."
    assert console_problems(driver) == []


@pytest.mark.browser
@in_browser
def test_many_labels_can_be_searched(driver: Chrome, tmp_path: Path) -> None:
    labels = tuple(f"Fruit {i:03d}" for i in range(131))
    _write_page(tmp_path, Recipe(labels=labels, n_photos=262))
    _open(driver, f"file://{tmp_path}/report.html")
    buttons = driver.find_elements(By.CSS_SELECTOR, "[data-kind=label]")
    assert len(buttons) == 131
    legend = driver.find_element(By.ID, "legend")
    assert legend.size["height"] <= 560
    driver.find_element(By.ID, "find-label").send_keys("FRUIT 12")
    assert sum(button.is_displayed() for button in buttons) == 10


@pytest.mark.browser
@in_browser
def test_print_is_dark_on_white_and_unfolded(driver: Chrome, ordinary: str) -> None:
    _open(driver, ordinary, scheme="dark")
    # In one script, because the print does not wait for another frame either.
    n_pixels = driver.execute_script(
        f"dispatchEvent(new Event('beforeprint')); const canvases = {_FIND}('canvas');"
        + _COUNT_PRINT_INK
    )
    assert sorted(n_pixels)[-2] > 50, n_pixels
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    background, text, axis = _scheme_colours(driver)
    assert _contrast(background, "#ffffff") == 1
    assert _contrast(text, "#ffffff") > 10
    assert _contrast(axis, "#ffffff") > 4.5
    assert driver.find_elements(By.CSS_SELECTOR, "details:not([open])") == []
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert driver.find_elements(By.CSS_SELECTOR, "details[open]") == []
