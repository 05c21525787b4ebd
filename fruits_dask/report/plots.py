"""The pictures of the page: Bokeh plots as JSON, for BokehJS to draw."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from bokeh.embed import json_item
from bokeh.models import (
    BasicTicker,
    BooleanFilter,
    CDSView,
    ColumnDataSource,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from .contents import Point

NO_LABEL = "(no label)"
NO_SPLIT = "(no split)"
# Okabe and Ito, "Color Universal Design", 2008, without black, which a dark page would hide.
_FEW_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")
# Markers that differ in outline, not in detail, each with its SVG path for the legend.
MARKERS = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "triangle": "M0-5.5L5.5 4.5H-5.5z",
    "square": "M-4.5-4.5h9v9h-9z",
    "diamond": "M0-6L4.5 0L0 6L-4.5 0z",
    "inverted_triangle": "M0 5.5L5.5-4.5H-5.5z",
    "hex": "M-5 0L-2.5-4.5H2.5L5 0L2.5 4.5H-2.5z",
    "star": "M0-6L1.6-2L6-2L2.4.8L3.8 5L0 2.4L-3.8 5L-2.4.8L-6-2L-1.6-2z",
}
_GREY = "#7a8089"  # legible on white and on black, until page.js knows which it is
_MAX_LARGE_POINTS = 700
_MAX_GAPPED_BARS = 150
_MAX_DOTS = 40
_SRGB_LINEAR_UP_TO = 0.0031308
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
# Inside each tooltip, because a shadow root knows the variables of the page but not its rules.
_TIP_STYLE = """<style>
:host { --tooltip-border: var(--line) !important; background: var(--card) !important;
  color: var(--ink) !important; opacity: 1 !important; padding: 10px !important;
  border-radius: 10px; box-shadow: 0 8px 28px rgb(0 0 0 / .22); pointer-events: none; }
.tip { display: flex; gap: 12px; align-items: center; max-width: min(320px, 70vw); }
.tip img { width: 72px; height: 72px; object-fit: contain; border-radius: 6px; background: #fff;
  flex: none; }
.tip b, .tip span { display: block; overflow-wrap: anywhere; font: 12px/1.45 system-ui; }
.tip b { font-size: 14px; font-weight: 600; }
.tip span { color: var(--soft); }
</style>"""
_PICTURE = '<img src="@thumbnail" alt="" width="72" height="72">'
_POINT_TIP = (
    f'<div class="tip">{_TIP_STYLE}%s<div><b>@label</b><span>@split</span><span>@path</span></div>'
    "</div>"
)
_SHARE_TIP = (
    f'<div class="tip">{_TIP_STYLE}<div><b>Component @component</b>'
    "<span>@share{0.00 %} of the variance</span>"
    "<span>@cumulative{0.0 %} with those before it</span></div></div>"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of the legend."""

    index: int
    """What page.js calls it."""
    name: str
    """Label or split."""
    sign: str
    """Colour of a label, marker of a split."""
    n_points: int
    """Photos in the plot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """The plot of the first components and its legend."""

    item: dict[str, Any]
    """For `Bokeh.embed.embed_item`."""
    labels: list[Key]
    """One a label; a single one when no photo has a label."""
    splits: list[Key]
    """One a split."""


def scatter(points: Sequence[Point], shares: Sequence[float], root: str) -> Scatter:
    """Plot the first two components, or the only one in the order of the rows.

    Parameters
    ----------
    points : sequence of Point
        At least one.
    shares : sequence of float
        Share of the variance of each component; may be empty.
    root : str
        Address of the input; paths are shown relative to it.

    Returns
    -------
    Scatter
        The plot and its legend.
    """
    names = Counter(point.label or NO_LABEL for point in points)
    labels = _keys(names, palette(len(names)))
    splits = _keys(Counter(point.split or NO_SPLIT for point in points), [*MARKERS])
    columns = _columns(points, labels, splits, root)
    source = ColumnDataSource(columns)  # type: ignore[arg-type]  # its dict type is invariant
    # Fixed, so that hiding a label does not move the others.
    ranges = {f"{axis}_range": _range(columns[axis]) for axis in ("x", "y")}
    plot = _figure(560, name="scatter", **ranges)
    plot.xaxis.axis_label, plot.yaxis.axis_label = _axis_titles(points, shares)
    _draw_points(plot, source, has_pictures=any(point.jpeg for point in points))
    return Scatter(item=_item(plot), labels=labels, splits=splits)


def variance_curve(shares: Sequence[float]) -> dict[str, Any]:
    """Plot the share of the variance of each component, and their running sum.

    Parameters
    ----------
    shares : sequence of float
        Of each component, strongest first; at least one.

    Returns
    -------
    dict
        For `Bokeh.embed.embed_item`.
    """
    n_components = len(shares)
    source = ColumnDataSource(
        {
            "component": list(range(1, n_components + 1)),
            "share": list(shares),
            "cumulative": list(accumulate(shares)),
        }
    )
    plot = _figure(320, name="variance", x_range=(0.3, n_components + 0.7), y_range=(0, 1.03))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "Component", "Share of the variance"
    plot.xaxis.ticker = BasicTicker(min_interval=1)
    plot.yaxis.formatter = NumeralTickFormatter(format="0 %")
    gap = 0.8 if n_components <= _MAX_GAPPED_BARS else 1.0
    bars = plot.vbar("component", gap, "share", source=source, color="#0072b2", line_color=None)
    plot.line("component", "cumulative", source=source, color="#d55e00", line_width=2)
    if n_components <= _MAX_DOTS:  # a single component has no line to see
        plot.scatter("component", "cumulative", source=source, size=6, color="#d55e00")
    plot.add_tools(HoverTool(renderers=[bars], mode="vline", tooltips=_SHARE_TIP, limit=1))
    return _item(plot)


def palette(n_colours: int) -> list[str]:
    """Choose colours that people with any colour vision can tell apart, as far as that goes.

    Up to seven come from a palette made for it. Beyond, hues are spread by the golden angle, and
    neighbours differ in lightness too, which everyone sees.

    Parameters
    ----------
    n_colours : int
        How many.

    Returns
    -------
    list of str
        ``#rrggbb``.
    """
    if n_colours <= len(_FEW_COLOURS):
        return list(_FEW_COLOURS[:n_colours])
    return [
        _oklch(lightness=(0.56, 0.80, 0.68)[i % 3], chroma=0.15, hue_degrees=i * 137.508 + 25)
        for i in range(n_colours)
    ]


def _oklch(*, lightness: float, chroma: float, hue_degrees: float) -> str:
    """Convert OKLCH, in which equal lightness looks equally light, to sRGB.

    References
    ----------
    Björn Ottosson, "A perceptual color space for image processing", 2020.
    """
    a = chroma * math.cos(math.radians(hue_degrees))
    b = chroma * math.sin(math.radians(hue_degrees))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return "#" + "".join(f"{_gamma(value):02x}" for value in linear)


def _gamma(linear: float) -> int:
    value = min(max(linear, 0.0), 1.0)
    encoded = 12.92 * value if value <= _SRGB_LINEAR_UP_TO else 1.055 * value ** (1 / 2.4) - 0.055
    return round(255 * encoded)


def _keys(counts: Mapping[str, int], signs: Sequence[str]) -> list[Key]:
    return [
        Key(index=index, name=name, sign=signs[index % len(signs)], n_points=n_points)
        for index, (name, n_points) in enumerate(sorted(counts.items()))
    ]


def _columns(
    points: Sequence[Point], labels: list[Key], splits: list[Key], root: str
) -> dict[str, Sequence[Any]]:
    label_of = {key.name: key for key in labels}
    split_of = {key.name: key for key in splits}
    label_keys = [label_of[point.label or NO_LABEL] for point in points]
    split_keys = [split_of[point.split or NO_SPLIT] for point in points]
    is_strip = len(points[0].scores) == 1
    return {
        "x": list(range(len(points))) if is_strip else [point.scores[0] for point in points],
        "y": [point.scores[-1] for point in points],
        "label": [key.name for key in label_keys],
        "label_index": [key.index for key in label_keys],
        "colour": [key.sign for key in label_keys],
        "split": [point.split or "" for point in points],
        "split_index": [key.index for key in split_keys],
        "marker": [key.sign for key in split_keys],
        "path": [relative(point.path, root) for point in points],
        "thumbnail": [_data_uri(point.jpeg) for point in points],
    }


def relative(path: str, root: str) -> str:
    """Shorten an address to what is below `root`."""
    return path.removeprefix(root.rstrip("/") + "/") if root else path


def _data_uri(jpeg: bytes | None) -> str:
    # An empty picture rather than an empty address, which would be the page itself.
    encoded = base64.b64encode(jpeg).decode() if jpeg else ""
    return f"data:image/jpeg;base64,{encoded}"


def _range(values: Sequence[float]) -> Range1d:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 1.0
    return Range1d(start=low - margin, end=high + margin)


def _axis_titles(points: Sequence[Point], shares: Sequence[float]) -> tuple[str, str]:
    def title(number: int) -> str:
        share = f" ({100 * shares[number]:.1f} % of the variance)" if number < len(shares) else ""
        return f"Component {number + 1}{share}"

    if len(points[0].scores) == 1:
        return "Photo, in the order of the list", title(0)
    return title(0), title(1)


def _draw_points(plot: figure, source: ColumnDataSource, *, has_pictures: bool) -> None:
    # One renderer for all, so that one tooltip shows at a time; page.js hides points by its filter.
    shown = BooleanFilter(booleans=[True] * len(source.data["x"]))
    points = plot.scatter(
        "x",
        "y",
        source=source,
        view=CDSView(filter=shown),
        marker="marker",
        size=9 if len(source.data["x"]) <= _MAX_LARGE_POINTS else 7,
        fill_color="colour",
        fill_alpha=0.85,
        line_color=_GREY,
        line_width=0.6,
        name="points",
    )
    points.nonselection_glyph = points.muted_glyph = None
    tip = _POINT_TIP % (_PICTURE if has_pictures else "")
    plot.add_tools(HoverTool(renderers=[points], tooltips=tip, limit=1))


def _figure(height: int, **options: Any) -> figure:  # noqa: ANN401 - those of Bokeh
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag="box_zoom",
        active_scroll=None,  # the wheel belongs to the page
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )
    plot.toolbar.logo = None
    for axis in plot.axis:
        axis.update(
            axis_line_color=_GREY,
            major_tick_line_color=_GREY,
            minor_tick_line_color=None,
            major_label_text_color=_GREY,
            axis_label_text_color=_GREY,
            axis_label_text_font=_FONT,
            axis_label_text_font_size="13px",
            axis_label_text_font_style="normal",
            major_label_text_font=_FONT,
            major_label_text_font_size="12px",
        )
    plot.grid.grid_line_color = _GREY
    plot.grid.grid_line_alpha = 0.25
    return plot


def _item(plot: figure) -> dict[str, Any]:
    return dict(json_item(plot))
