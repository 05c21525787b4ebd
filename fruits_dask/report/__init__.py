"""A result as a page: ``report.html``, one file that opens offline, anywhere."""

from __future__ import annotations

import base64
import hashlib
import shlex
import time
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__, layout
from ..storage import Store
from . import tables
from .contents import MAX_EXAMPLES, Contents, read_contents
from .plots import MARKERS, relative, scatter, variance_curve

# Longer tables of labels are folded.
_MAX_OPEN_ROWS = 20
_RETRY = "python -m fruits_dask retry-failed"


def write_report(store: Store, output: str) -> None:
    """Write ``report.html`` from what is stored in a result.

    Parameters
    ----------
    store : Store
        Where the result is.
    output : str
        Its address.

    Raises
    ------
    ResultError
        If there is no result, or a part of it is damaged.
    """
    start = time.perf_counter()
    contents = read_contents(store, output)
    plots = _plots(contents)
    # run.json does not know yet how long this stage takes; what is left of it is the writing.
    report = {"seconds": time.perf_counter() - start}
    stages = {**contents.run.get("stages", {}), "report": report}
    page = _render(replace(contents, run={**contents.run, "stages": stages}), plots)
    store.write(layout.join(output, layout.REPORT), page.encode())


def _render(contents: Contents, plots: dict[str, Any]) -> str:
    """Make the page.

    Parameters
    ----------
    contents : Contents
        What it tells.
    plots : dict
        What `_plots` made of it.

    Returns
    -------
    str
        HTML with its styles, scripts and pictures inside.
    """
    scripts = [_bokeh_js(), _resource("page.js")]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            policy=_policy(scripts),
            style=Markup(_resource("page.css")),  # noqa: S704 - a file of this package
            scripts=[Markup(script) for script in scripts],  # noqa: S704 - the same
            version=__version__,
            contents=contents,
            **plots,
            **_words(contents),
        )
    )


def _plots(contents: Contents) -> dict[str, Any]:
    shares = [] if contents.model is None else contents.model.explained_variance_ratio.tolist()
    sample = contents.sample
    return {
        "scatter": scatter(sample, shares, _root(contents)) if sample else None,
        "variance": variance_curve(shares) if shares else None,
        "reached": tables.reached(shares),
        "quality": tables.quality(contents),
        "marker_paths": MARKERS,
        "n_scores": len(sample[0].scores) if sample else 0,
    }


def _words(contents: Contents) -> dict[str, Any]:
    root = _root(contents)
    return {
        "headline": tables.headline(contents),
        "durations": tables.durations(contents),
        "memory": tables.memory(contents),
        "counts": tables.counts(contents),
        "split_sums": tables.split_sums(contents),
        "max_open_rows": _MAX_OPEN_ROWS,
        "max_examples": MAX_EXAMPLES,
        "facts": tables.facts(contents),
        "regions": tables.pairs(contents.run.get("regions")),
        "versions": tables.pairs(contents.run.get("versions")),
        "settings": tables.pairs(contents.run.get("settings")),
        "input": root,
        "relative": lambda path: relative(path, root),
        "retry_command": f"{_RETRY} --output {shlex.quote(contents.output)}",
        "dask_report": layout.DASK_REPORT,
        "number": tables.number,
    }


def _root(contents: Contents) -> str:
    return str(contents.run.get("identity", {}).get("input") or "")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fruits_dask.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Bokeh defines an object where it first occurs and refers to it after that.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment


@cache
def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


@cache
def _bokeh_js() -> str:
    scripts = Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw
    return "\n".join(script.partition("//# sourceMappingURL")[0] for script in scripts)


def _policy(scripts: list[str]) -> str:
    """Allow these very scripts, pictures from within the page, and nothing else.

    Styles are not limited, because BokehJS makes them as it draws; none can fetch anything.
    """
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
