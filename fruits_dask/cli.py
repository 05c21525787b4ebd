"""The command line: parse, resolve, one library call, print."""

from __future__ import annotations

import inspect
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from .config import Resolved, Settings, flag_name, resolve, unknown_environment
from .console import open_progress, set_up_logging
from .errors import ConfigError, FruitsDaskError
from .progress import Progress
from .records import OPERATIONS, STAGES

if TYPE_CHECKING:
    from .cluster.ec2 import Account
    from .estimate import Estimate
    from .pipeline import Outcome

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a bucket of fruit photos into features, a PCA table and a report, on Dask.\n\n"
    "Without --input, [bold]run[/] works on generated sample photos, to show what comes out.",
)
cluster_app = typer.Typer(no_args_is_help=True, help="Machines rented from EC2.")
app.add_typer(cluster_app, name="cluster")


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    MANY_FAILURES = 3
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What the command line says beside the settings."""

    flags: dict[str, object]
    """Settings that were given, by name; None for those that were not."""
    config: Path | None
    """A TOML file."""
    verbose: int
    """How often -v was given."""
    progress: Progress
    """Shows how far the work is."""
    extras: dict[str, Any]
    """Options of one command only."""


_STORE = ("endpoint_url", "profile", "anonymous", "requester_pays", "allowed_regions")
_MACHINES = ("region", "instance_type", "docker_image", "spot", "max_hours", "max_cost")
_CLUSTER = ("cluster", "workers", "memory_limit", "dashboard_address", *_MACHINES)
_RENTED = ("workers", *_MACHINES, "profile", "allowed_regions")
_REDUCTION = ("components", "reducer")
_FEATURES = (
    *("input", "output", "weights", "backbone", "engine", "precision"),
    *("limit", "partition_size", "concurrent_reads", "max_megapixels"),
)


def _extra(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


_OVERWRITE = _extra(
    "overwrite",
    Annotated[bool, typer.Option("--overwrite", help="Replace the result that is there")],
    False,
)
_DRY_RUN = _extra(
    "dry_run",
    Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and their origins, do nothing")
    ],
    False,
)
_ESTIMATE = _extra(
    "estimate",
    Annotated[
        bool, typer.Option("--estimate", help="Try 200 photos, and print what a run would take")
    ],
    False,
)
_DESTINATION = _extra(
    "destination",
    Annotated[str, typer.Argument(help="Folder or s3:// prefix", show_default=False)],
    inspect.Parameter.empty,
)
_PER_LABEL = _extra(
    "per_label", Annotated[int, typer.Option("--per-label", min=1, help="Photos of each fruit")], 40
)
_NAME = _extra(
    "name",
    Annotated[str, typer.Argument(help="What to call the cluster", show_default=False)],
    inspect.Parameter.empty,
)
_NAMES = _extra(
    "names",
    Annotated[list[str] | None, typer.Argument(help="Names of clusters", show_default=False)],
    None,
)
_ALL = _extra("all", Annotated[bool, typer.Option("--all", help="All clusters")], False)
_COMMON = (
    _extra(
        "config",
        Annotated[Path | None, typer.Option("--config", help="TOML file with settings")],
        None,
    ),
    _extra(
        "verbose",
        Annotated[
            int,
            typer.Option(
                "--verbose",
                "-v",
                count=True,
                help="Say more; -vv with tracebacks",
                metavar="",
                show_default=False,
            ),
        ],
        0,
    ),
)


def _command(
    *names: str, extras: tuple[inspect.Parameter, ...] = (), group: typer.Typer = app
) -> Callable[[Callable[[Call], None]], Callable[..., None]]:
    """Register a function as a command whose flags are settings of these names.

    Name, type and help of a flag come from `Settings`, so there is one place where they are kept.
    `extras` are parameters of this command alone; `group` is what it is a command of.
    """

    def register(function: Callable[[Call], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:  # noqa: ANN401
            flags = {name: given.pop(name) for name in names}
            config, verbose = given.pop("config"), given.pop("verbose")
            with _reporting(verbose) as progress:
                function(
                    Call(
                        flags=flags,
                        config=config,
                        verbose=verbose,
                        progress=progress,
                        extras=given,
                    )
                )

        parameters = [*extras, *(_extra(name, _option(name), None) for name in names), *_COMMON]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        name = function.__name__.strip("_").replace("_", "-")
        return group.command(name, help=inspect.getdoc(function))(command)

    return register


def _option(name: str) -> object:
    field = Settings.model_fields[name]
    shown = field.default if field.default not in (None, False) else None
    text = (field.description or "") + (f" (default: {shown})" if shown is not None else "")
    if field.annotation is bool:
        return Annotated[bool | None, typer.Option(flag_name(name), help=text, show_default=False)]
    metavar = "N" if isinstance(shown, int | float) else name.rpartition("_")[2].upper()
    return Annotated[
        str | None,
        typer.Option(flag_name(name), help=text, metavar=metavar, show_default=False),
    ]


@contextmanager
def _reporting(verbose: int) -> Iterator[Progress]:
    """Show progress, and turn what goes wrong into one message and an exit code."""
    console = Console(stderr=True)
    set_up_logging(console, verbose)
    _warn_of_environment(console)
    # Also a terminal that is closed (SIGHUP) must not leave rented machines behind.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        with open_progress(console) as progress:
            yield progress
    except ConfigError as exc:
        _fail(console, exc, verbose, Exit.USAGE)
    except FruitsDaskError as exc:
        _fail(console, exc, verbose, Exit.FAILED)
    except KeyboardInterrupt:
        console.print("stopped; what is stored stays, the same command goes on from there")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as exc:
        if verbose > 1:
            raise
        text = f"unexpected {type(exc).__name__}: {exc}\n-vv shows where; please report it"
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(Exit.FAILED) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(console: Console, exc: FruitsDaskError, verbose: int, code: Exit) -> None:
    if verbose > 1:
        console.print_exception()
    console.print(f"error: {exc}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _warn_of_environment(console: Console) -> None:
    for name, near in unknown_environment().items():
        hint = f"; did you mean {near}?" if near else ""
        console.print(f"warning: {name} is no setting and is ignored{hint}", markup=False)


def _resolve(call: Call, *, stored: bool = False) -> Resolved:
    """Resolve the settings; those of a result that is there come in when `stored`."""
    resolved = resolve(call.flags, config_file=call.config)
    if not stored:
        return resolved
    from .results import read_record  # noqa: PLC0415 - pyarrow is not needed for help
    from .storage import normalize, open_store  # noqa: PLC0415

    settings = resolved.settings
    output = normalize(settings.output)
    record = read_record(open_store(output, settings.store_options), output)
    if record is None:
        raise ConfigError(f"there is no result in {output}; `run` or `plan` makes one")
    return resolve(call.flags, config_file=call.config, stored=record["settings"])


@_command(
    *_FEATURES,
    *_REDUCTION,
    *_CLUSTER,
    "max_failed_share",
    *_STORE,
    extras=(_OVERWRITE, _DRY_RUN),
)
def run(call: Call) -> None:
    """Do the whole job: list, make features, reduce, report; resume what was cut short."""
    resolved = _resolve(call)
    if call.extras["dry_run"]:
        _print_settings(resolved)
        return
    from . import pipeline  # noqa: PLC0415 - dask and pyarrow take a second to import

    outcome = pipeline.run(
        resolved.settings, overwrite=call.extras["overwrite"], progress=call.progress
    )
    _conclude(outcome, resolved.settings)


@_command(*_FEATURES, *_CLUSTER, *_STORE, extras=(_OVERWRITE, _ESTIMATE))
def plan(call: Call) -> None:
    """List the photos and print how the work will be cut; no photo is read."""
    from . import pipeline  # noqa: PLC0415

    settings = _resolve(call).settings
    outcome = pipeline.plan(settings, overwrite=call.extras["overwrite"], progress=call.progress)
    _print_plan(outcome)
    if call.extras["estimate"]:
        from .estimate import estimate  # noqa: PLC0415 - imports no engine, but loads one

        _print_estimate(estimate(settings, outcome, progress=call.progress))


@_command(*_FEATURES, *_CLUSTER, "max_failed_share", *_STORE, extras=(_OVERWRITE,))
def extract(call: Call) -> None:
    """Make the features, after the plan if there is none."""
    from . import pipeline  # noqa: PLC0415

    settings = _resolve(call).settings
    outcome = pipeline.extract(settings, overwrite=call.extras["overwrite"], progress=call.progress)
    _conclude(outcome, settings)


@_command("output", *_REDUCTION, *_CLUSTER, *_STORE)
def reduce(call: Call) -> None:
    """Fit the PCA on the stored features and write the scores, perhaps with other components."""
    from . import pipeline  # noqa: PLC0415

    settings = _resolve(call, stored=True).settings
    _conclude(pipeline.reduce(settings, progress=call.progress), settings)


@_command("output", *_STORE)
def report(call: Call) -> None:
    """Write report.html anew from what is stored."""
    from . import pipeline  # noqa: PLC0415

    settings = _resolve(call, stored=True).settings
    _conclude(pipeline.report(settings, progress=call.progress), settings)


@_command("output", *_CLUSTER, "max_failed_share", *_STORE)
def retry_failed(call: Call) -> None:
    """Try the failed photos again, and do anew what depends on them."""
    from . import pipeline  # noqa: PLC0415

    settings = _resolve(call, stored=True).settings
    _conclude(pipeline.retry_failed(settings, progress=call.progress), settings)


@_command(*_STORE, extras=(_DESTINATION, _PER_LABEL))
def sample(call: Call) -> None:
    """Write generated photos in the shape of Fruits-360, to try things on."""
    from . import demo  # noqa: PLC0415
    from .sample import n_sample_images  # noqa: PLC0415
    from .workspace import check_addresses  # noqa: PLC0415

    settings = _resolve(call).settings
    destination, per_label = call.extras["destination"], call.extras["per_label"]
    check_addresses(settings.model_copy(update={"input": None, "output": destination}))
    progress = call.progress
    progress.start("sample", total=n_sample_images(n_per_label=per_label), unit="photos")
    n_images = demo.write_sample(
        destination, settings.store_options, n_per_label=per_label, on_written=progress.update
    )
    progress.finish()
    typer.echo(f"{n_images:,} photos in {destination}")


@_command(*_FEATURES, *_CLUSTER, *_STORE)
def doctor(call: Call) -> None:
    """Look for what would go wrong in a run, and say what to do about it."""
    from .doctor import examine  # noqa: PLC0415

    findings = list(examine(_resolve(call).settings))
    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        mark = "[green]ok  [/]" if finding.is_good else "[red]FAIL[/]"
        console.print(f"{mark} [bold]{finding.subject:10}[/]", end=" ")
        console.print(finding.message, markup=False)
    n_bad = sum(not finding.is_good for finding in findings)
    typer.echo(f"{n_bad} to mend" if n_bad else "nothing stands in the way of a run")
    if n_bad:
        raise typer.Exit(Exit.FAILED)


@_command(
    *("input", "weights", "backbone", "engine", "precision"),
    *("limit", "partition_size", "concurrent_reads"),
    *_CLUSTER,
    *_STORE,
)
def bench(call: Call) -> None:
    """Measure the speed of this machine against its own ceiling; nothing is kept."""
    from .bench import measure  # noqa: PLC0415

    settings = _resolve(call).settings
    ceiling, speed = measure(settings, progress=call.progress)
    _print_pairs(
        {
            "engine": f"{settings.engine}, {settings.precision}, {speed.n_workers} workers",
            "ceiling": f"{ceiling:,.1f} images/s: the network alone, photos in memory",
            "steady": f"{speed.steady:,.1f} images/s: read, decode, featurize, store",
            "share": f"{speed.steady / ceiling:.1%} of the ceiling",
            "whole": f"{speed.extract:,.1f} images/s over {speed.n_images:,} photos, with the "
            "start of the engine",
            "first part": f"stored after {speed.first_part_seconds:.1f} s",
            "memory": f"{speed.peak_memory_bytes / 2**20:,.0f} MiB at most in a worker",
        }
    )


@_command("region", "profile", group=cluster_app)
def _list(call: Call) -> None:
    """List the machines and firewalls that were rented and not given back, by tag."""
    account = _account(call)
    machines, firewalls = account.machines(), account.groups()
    rows = [
        (m.cluster, m.id, m.kind, m.state, m.started, m.name)
        for m in sorted(machines, key=lambda m: (m.cluster, m.name))
    ]
    rows += [(cluster, group, "security group", "", "", "") for group, cluster in firewalls.items()]
    if not rows:
        typer.echo(f"nothing is rented in {account.region}")
        return
    rows.insert(0, ("cluster", "id", "kind", "state", "since", "name"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


@_command(*_RENTED, extras=(_NAME,), group=cluster_app)
def up(call: Call) -> None:
    """Rent a cluster for several runs; `run --cluster NAME` uses it, `cluster down` ends it."""
    from .cluster.ec2 import keep_ec2  # noqa: PLC0415
    from .residency import check_regions  # noqa: PLC0415

    settings, account = _resolve(call).settings, _account(call)
    check_regions({"the cluster": account.region}, settings.allowed_regions, endpoint_url=None)
    cluster = keep_ec2(settings, account, call.extras["name"], call.progress)
    typer.echo(
        f"{cluster.name} is rented in {cluster.region}: `run --cluster {cluster.name}` uses it; it "
        f"ends after {settings.idle_timeout} without work, after {cluster.max_hours:g} hours, "
        f"or with `cluster down {cluster.name}`"
    )


@_command("region", "profile", extras=(_NAMES, _ALL), group=cluster_app)
def down(call: Call) -> None:
    """Give back the machines and firewalls of clusters, whoever rented them."""
    from .cluster.ec2 import give_back  # noqa: PLC0415

    account = _account(call)
    known = sorted({m.cluster for m in account.machines()} | set(account.groups().values()))
    names = known if call.extras["all"] else call.extras["names"] or []
    for name in names:
        if name not in known:
            raise ConfigError(
                f"nothing in {account.region} belongs to a cluster {name!r}; "
                f"there are: {', '.join(known) or 'none'}"
            )
    if call.extras["all"] and not names:
        typer.echo(f"nothing is rented in {account.region}")
    elif not names:
        raise ConfigError(f"say which, or --all; there are: {', '.join(known) or 'none'}")
    for name in names:
        call.progress.say(f"giving back {name}")
        give_back(account, name)
        typer.echo(f"{name} is given back")


@_command(group=cluster_app)
def tag(_call: Call) -> None:
    """Print the tag of a container image that has the versions of this machine."""
    from .cluster.versions import environment_tag  # noqa: PLC0415

    typer.echo(environment_tag())


def _account(call: Call) -> Account:
    from .cluster.ec2 import Account  # noqa: PLC0415 - botocore is slow to import

    settings = _resolve(call).settings
    return Account(settings.region, settings.profile)


def _version(shown: bool) -> None:  # noqa: FBT001 - typer calls it this way
    if shown:
        typer.echo(f"fruits_dask {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    pass


def _print_settings(resolved: Resolved) -> None:
    for name, value in resolved.settings.model_dump().items():
        typer.echo(f"{name} = {json.dumps(value)}  # {resolved.origins[name]}")


def _print_plan(outcome: Outcome) -> None:
    facts = outcome.record["stages"]["plan"]
    splits = ", ".join(f"{name} {count:,}" for name, count in facts["splits"].items())
    _print_pairs(
        {
            "manifest": f"{outcome.output}/manifest.parquet"
            + (" (was there before)" if outcome.did_nothing else ""),
            "images": f"{facts['n_images']:,}, {facts['n_bytes'] / 1e6:,.1f} MB",
            "labels": f"{len(facts['labels']):,}",
            "splits": splits or "none",
            "partitions": f"{facts['n_partitions']:,} of {facts['partition_size']:,} images",
        }
    )


def _print_estimate(found: Estimate) -> None:
    pairs = {
        "tried": f"{found.n_tried} photos, {found.seconds_per_image * 1000:.1f} ms each on a core "
        "of this machine",
        "workers": found.capacity.description,
        "hours": "{:.2f} to {:.2f}".format(*found.hours),
    }
    if found.cost:
        pairs["cost"] = "{:,.2f} to {:,.2f}, without disks and traffic".format(*found.cost)
    _print_pairs(pairs)


def _conclude(outcome: Outcome, settings: Settings) -> None:
    """Print what came out, and choose the exit code."""
    _print_pairs(_summary(outcome))
    if not outcome.did_nothing:
        _print_durations(outcome)
    if outcome.failed_share > settings.max_failed_share:
        typer.echo(
            f"{outcome.failed_share:.1%} of the photos failed, more than --max-failed-share "
            f"{settings.max_failed_share:.1%}; see the report, then `retry-failed`",
            err=True,
        )
        raise typer.Exit(Exit.MANY_FAILURES)


def _summary(outcome: Outcome) -> dict[str, str]:
    stages = outcome.record["stages"]
    pairs = {"result": outcome.output}
    if outcome.did_nothing:
        pairs["status"] = "nothing to do; photos that came later need --overwrite"
    pairs["images"] = f"{outcome.n_features:,} with features, {outcome.n_failures:,} failures"
    if "extract" in stages:
        if speed := stages["extract"]["images_per_second"]:
            pairs["speed"] = f"{speed:,} images/s"
        if peaks := stages["extract"]["peak_memory_bytes"].values():
            pairs["memory"] = f"{max(peaks) / 2**20:,.0f} MiB at most in a worker"
    if "reduce" in stages:
        facts = stages["reduce"]
        kept = facts["explained_variance_ratio"]
        pairs["pca"] = f"{facts['n_components']} components keep {kept:.2%} of the variance"
        if (exact := facts.get("exact_share")) is not None:
            pairs["pca"] += f", {exact:.3%} of what is reachable"
    if "report" in stages:
        pairs["report"] = f"{outcome.output}/report.html"
    else:
        following = next(name for name in STAGES if name not in stages)
        pairs["next"] = f"`{following} --output {outcome.output}`, or `run` for all that is left"
    return pairs


def _print_pairs(pairs: dict[str, str]) -> None:
    for name, value in pairs.items():
        typer.echo(f"{name:10} {value}")


def _print_durations(outcome: Outcome) -> None:
    table = Table("operation", box=None, title="duration", title_justify="left")
    table.add_column("seconds", justify="right")
    stages = outcome.record["stages"]
    if "workers" in outcome.record:
        table.add_row("workers", f"{outcome.record['workers']['seconds']:.1f}")
    for stage in (name for name in STAGES if name in stages):
        facts = stages[stage]
        table.add_row(stage, f"{facts['seconds']:.1f}")
        for name in (name for name in OPERATIONS if name in facts.get("operations", {})):
            seconds = facts["operations"][name]
            summed = " (over all workers)" if stage == "extract" else ""
            table.add_row(f"  {name}{summed}", f"{seconds:.1f}")
    Console().print(table)


def main() -> None:
    """Run the command line."""
    app(prog_name="fruits_dask", windows_expand_args=False)
