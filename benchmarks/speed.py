"""The whole job against its peers, and extraction against the ceiling of the machine.

    make bench

Each round runs everything once, one after the other, so that the ratios of a round compare what ran
within the same minutes; the table holds medians over the rounds. A job is a command in a process
of its own, measured from its start to its end: photos on a local disk to features, PCA and CSV.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
from common import (
    PHOTOS,
    SHARED,
    JsonFile,
    Row,
    machine,
    mib,
    print_machine,
    print_table,
    write_json,
)

from fruits_dask.bench import measure_ceiling
from fruits_dask.config import Settings
from fruits_dask.featurize.backbones import find_backbone
from fruits_dask.featurize.weights import imagenet_path, load_weights
from fruits_dask.progress import Silent
from fruits_dask.records import StoreOptions

PEERS = Path(__file__).parent / "peers"
PEER_PYTHON = PEERS / ".venv" / "bin" / "python"
KERAS_HOME = SHARED / "keras"
ENGINES = ("tensorflow", "openvino", "openvino bf16")
TARGETS = {  # of issue and README: the least ratio of wall times, for each engine
    ("spark notebook", "tensorflow"): 4.0,
    ("spark notebook", "openvino"): 6.0,
    ("spark", "tensorflow"): 4.0,
    ("spark", "openvino"): 6.0,
    ("ray", "tensorflow"): 2.5,
    ("ray", "openvino"): 4.0,
    ("tf.data", "tensorflow"): 1.5,
    ("tf.data", "openvino"): 2.3,
}
SHARES = {"tensorflow": 0.90, "openvino": 0.85}
SCALING = 1.85
PEER_NAMES = ("spark notebook", "spark", "ray", "tf.data")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Something that does the whole job."""

    name: str
    """In the tables."""
    command: tuple[str, ...]
    """Without input and output."""
    cores: str | None = None
    """Cores that it may use, as `taskset` takes them; None for all."""

    @property
    def is_ours(self) -> bool:
        return self.command[0] == sys.executable


def ours(engine: str, *, command: str = "run", precision: str = "float32") -> tuple[str, ...]:
    """Command line of this package."""
    options = ("--weights", "imagenet", "--engine", engine, "--precision", precision)
    return (sys.executable, "-m", "fruits_dask", command, *options)


def peer(script: str) -> tuple[str, ...]:
    """Command line of a peer."""
    weights = imagenet_path(find_backbone("mobilenet_v2"))
    return (str(PEER_PYTHON), str(PEERS / script), "--weights", str(weights))


def contenders() -> list[Contender]:
    """Everything that is measured in a round, in this order."""
    one_core = {"cores": "0"}
    return [
        Contender(name="tensorflow", command=ours("tensorflow")),
        Contender(name="openvino", command=ours("openvino")),
        Contender(name="openvino bf16", command=ours("openvino", precision="bf16")),
        Contender(name="tf.data", command=peer("tf_data.py")),
        Contender(name="ray", command=peer("ray_data.py")),
        Contender(name="spark", command=peer("spark_udf.py")),
        Contender(name="spark notebook", command=peer("spark_notebook.py")),
        Contender(
            name="tensorflow, 1 worker", command=ours("tensorflow", command="extract"), **one_core
        ),
        Contender(
            name="openvino, 1 worker", command=ours("openvino", command="extract"), **one_core
        ),
    ]


def run(contender: Contender, photos: Path) -> Row:
    """Run a job once and return its figures."""
    with tempfile.TemporaryDirectory(prefix="fruits-bench-") as folder:
        output = Path(folder, "result")
        command = [*contender.command, "--input", str(photos), "--output", str(output)]
        if contender.cores is not None:
            command = ["taskset", "--cpu-list", contender.cores, *command]
        log = Path(folder, "log")
        started, start = time.time(), time.perf_counter()
        with log.open("w") as stream:
            done = subprocess.run(  # noqa: S603 - our own command lines
                command, stdout=stream, stderr=stream, check=False
            )
        row: Row = {"name": contender.name, "wall_seconds": time.perf_counter() - start}
        if done.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{log.read_text()[-4000:]}")
        return row | (_facts(output, started) if contender.is_ours else {})


def _facts(output: Path, started: float) -> Row:
    """Read what a result of ours tells of its making."""
    record = json.loads((output / "run.json").read_text("utf-8"))
    stages = record["stages"]
    extract = stages["extract"]
    parts = sorted(
        (path.stat().st_mtime, pq.read_metadata(path).num_rows)
        for path in (output / "features").iterdir()
    )
    return {
        "n_images": extract["n_features"],
        "first_part_seconds": parts[0][0] - started,
        "steady": _steady(parts, 2 * extract["n_workers"]),
        "stages": {"workers": record["workers"]["seconds"]}
        | {name: facts["seconds"] for name, facts in stages.items()},
        "operations": {
            name: seconds
            for facts in stages.values()
            for name, seconds in facts.get("operations", {}).items()
        },
        "peak_memory_bytes": max(extract["peak_memory_bytes"].values()),
        "exact_share": stages.get("reduce", {}).get("exact_share"),
    }


def _steady(parts: list[tuple[float, int]], n_edge: int) -> float:
    """Images/s without the first and the last parts, two a worker: all are warm and have work."""
    inner = parts[n_edge:-n_edge]
    return sum(n_rows for _, n_rows in inner) / (inner[-1][0] - parts[n_edge - 1][0])


def ceiling(engine: str, precision: str, photos: Path) -> float:
    """Images/s of the network alone, on the workers of a run."""
    settings = Settings(input=str(photos), weights="imagenet", engine=engine, precision=precision)
    weights = load_weights("imagenet", None, StoreOptions())
    return measure_ceiling(settings, weights, progress=Silent())


def measure_round(number: int, photos: Path, wanted: list[Contender]) -> list[Row]:
    """Measure everything once."""
    rows = []
    for name in ENGINES:
        engine, _, precision = name.partition(" ")
        speed = ceiling(engine, precision or "float32", photos)
        rows.append({"name": f"ceiling {name}", "images_per_second": speed})
        _say(number, rows[-1])
    for contender in wanted:
        rows.append(run(contender, photos))
        _say(number, rows[-1])
    return rows


def _say(number: int, row: Row) -> None:
    figures = {k: round(v, 1) for k, v in row.items() if isinstance(v, float)}
    print(f"round {number}: {row['name']}: {figures}", file=sys.stderr, flush=True)


class Medians:
    """Medians over the rounds, and medians of ratios within rounds."""

    def __init__(self, rounds: list[list[Row]]) -> None:
        self._rounds = [{row["name"]: row for row in rows} for rows in rounds]

    def __contains__(self, name: str) -> bool:
        return name in self._rounds[0]

    @property
    def engines(self) -> list[str]:
        """Those of our own that were measured."""
        return [engine for engine in ENGINES if engine in self]

    def of(self, name: str, figure: str) -> float:
        """Median of a figure."""
        return statistics.median(rows[name][figure] for rows in self._rounds)

    def nested(self, name: str, group: str) -> dict[str, float]:
        """Medians of a group of figures, such as the seconds of the stages."""
        return {
            key: statistics.median(rows[name][group][key] for rows in self._rounds)
            for key in self._rounds[0][name][group]
        }

    def ratio(self, above: tuple[str, str], below: tuple[str, str]) -> float:
        """Median of the ratios of two figures, each of the same round."""
        return statistics.median(
            rows[above[0]][above[1]] / rows[below[0]][below[1]] for rows in self._rounds
        )

    def bound(self, peer: str, engine: str) -> float:
        """Ratio that would be reached if nothing but the network took time, at its ceiling."""
        return statistics.median(
            rows[peer]["wall_seconds"]
            * rows[f"ceiling {engine}"]["images_per_second"]
            / rows[engine]["n_images"]
            for rows in self._rounds
        )


def report(found: Medians) -> list[Row]:
    """Print the tables, and return what they say of the targets."""
    verdicts = [*_against_peers(found), *_against_ceilings(found)]
    _shares(found)
    return verdicts


def _verdict(what: str, value: float, least: float) -> Row:
    return {"what": what, "value": round(value, 3), "target": least, "reached": value >= least}


def _against_peers(found: Medians) -> list[Row]:
    verdicts, rows = [], []
    for name in PEER_NAMES:
        if name not in found:
            continue
        cells = []
        for engine in SHARES:
            if engine not in found:
                cells += ["", ""]
                continue
            ratio = found.ratio((name, "wall_seconds"), (engine, "wall_seconds"))
            least = TARGETS[name, engine]
            verdicts.append(_verdict(f"{name} / {engine}", ratio, least))
            cells += [f"{ratio:.2f}x (>= {least:g}x)", f"{found.bound(name, engine):.2f}x"]
        rows.append((name, f"{found.of(name, 'wall_seconds'):.1f}", *cells))
    rows += [
        (f"fruits_dask {engine}", f"{found.of(engine, 'wall_seconds'):.1f}", "", "", "", "")
        for engine in found.engines
    ]
    print_table(
        "Whole job: photos to features, PCA, CSV (at most: the network alone, at its ceiling)",
        ("", "seconds", "against tensorflow", "at most", "against openvino", "at most"),
        rows,
    )
    return verdicts


def _against_ceilings(found: Medians) -> list[Row]:
    verdicts, rows = [], []
    for engine in found.engines:
        top = (f"ceiling {engine}", "images_per_second")
        share = found.ratio((engine, "steady"), top)
        cells = [engine, f"{found.of(*top):.0f}", f"{found.of(engine, 'steady'):.0f}"]
        if engine in SHARES:
            verdicts.append(_verdict(f"{engine} / its ceiling", share, SHARES[engine]))
            cells.append(f"{share:.2f} (>= {SHARES[engine]:g})")
            if (single := f"{engine}, 1 worker") in found:
                scaling = found.ratio((engine, "steady"), (single, "steady"))
                verdicts.append(_verdict(f"{engine}, 2 workers / 1", scaling, SCALING))
                cells += [f"{found.of(single, 'steady'):.0f}", f"{scaling:.2f}x (>= {SCALING:g}x)"]
            else:
                cells += ["", ""]
        else:
            cells += [f"{share:.2f}", "", ""]
        cells += [
            f"{found.of(engine, 'first_part_seconds'):.1f}",
            mib(found.of(engine, "peak_memory_bytes")),
        ]
        rows.append(cells)
    print_table(
        "Extraction, 2 workers: images/s, in the steady state",
        (
            *("engine", "ceiling", "steady", "share", "1 worker", "2 / 1"),
            *("first part (s)", "MiB"),
        ),
        rows,
    )
    return verdicts


def _shares(found: Medians) -> None:
    """Print where the time of a whole job goes."""
    rows, names = [], []
    for engine in found.engines:
        wall = found.of(engine, "wall_seconds")
        stages = found.nested(engine, "stages")
        stages["rest"] = wall - sum(stages.values())
        rows.append((engine, *(f"{s:.1f} ({s / wall:.0%})" for s in stages.values())))
        names = list(stages)
        operations = found.nested(engine, "operations")
        cells = ", ".join(f"{name} {seconds:.1f}" for name, seconds in operations.items())
        print(f"{engine}: {cells} (read to store: summed over the workers)")
    print_table("Where a whole job spends its seconds", ("engine", *names), rows)


def plot(found: Medians, target: Path, subtitle: str) -> None:
    """Draw the whole jobs as bars."""
    import matplotlib as mpl  # noqa: PLC0415 - only for the picture

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = [name for name in (*PEER_NAMES, *ENGINES) if name in found]
    seconds = [found.of(name, "wall_seconds") for name in names]
    colours = ["#2f7d4f" if LABELS[name].startswith("fruits") else "#b9b4aa" for name in names]
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(names) + 1.4), layout="constrained")
    bars = axes.barh([LABELS[name] for name in names], seconds, color=colours, height=0.7)
    axes.bar_label(bars, [f"{s:.0f} s" for s in seconds], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, max(seconds) * 1.12)
    axes.set_xlabel(f"seconds, from photos to features, PCA and CSV\n{subtitle}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)


LABELS = {
    "spark notebook": "Spark, as in the notebooks",
    "spark": "Spark, tuned",
    "ray": "Ray Data",
    "tf.data": "tf.data + predict",
    "tensorflow": "fruits_dask, tensorflow",
    "openvino": "fruits_dask, openvino",
    "openvino bf16": "fruits_dask, openvino bf16",
}


def main(
    photos: Annotated[Path, typer.Option(help="Folder of photos")] = PHOTOS,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is measured")] = 3,
    only: Annotated[str, typer.Option(help="Names with ; between them, for a part of it")] = "",
    picture: Annotated[Path | None, typer.Option(help="Draw the bars there")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure, print the tables, draw the picture."""
    os.environ["KERAS_HOME"] = str(KERAS_HOME)
    names = {name.strip() for name in only.split(";")} if only else None
    wanted = [c for c in contenders() if names is None or c.name in names]
    measured: list[list[Row]] = []
    for number in range(1, rounds + 1):
        measured.append(measure_round(number, photos, wanted))
        # What was measured stays, also when a later round fails.
        write_json(json_file, [row for rows in measured for row in rows], {"rounds": number})
    found = Medians(measured)
    verdicts = report(found)
    for verdict in verdicts:
        mark = "reached" if verdict["reached"] else "MISSED "
        print(f"{mark}  {verdict['what']}: {verdict['value']:.2f}, target {verdict['target']:g}")
    if picture is not None and found.engines:
        described = machine()
        n_images = found.of(found.engines[0], "n_images")
        cores = f"{described['cpu']}, {described['cores']} cores"
        plot(found, picture, f"{n_images:,.0f} photos, {cores}, {described['date']}")
    print_machine()


if __name__ == "__main__":
    typer.run(main)
