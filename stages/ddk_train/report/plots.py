"""Draw the report's plots with matplotlib as SVGs, with hover texts and legends for the page."""

import base64
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray

# Okabe and Ito's colours, distinct for any colour vision, without the two that vanish on white or on black.
# Line styles change with them, so that series repeat only after 21.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
STYLES = {"solid": "-", "dashed": "--", "dotted": ":"}  # CSS's name: matplotlib's
HATCHES = [hatch for hatch in ("", "///", "...") for _ in COLOURS]
INK = "#1c2430"  # as in plots.mplstyle
LOGARITHMIC_FROM = 20  # largest / smallest value of an axis
DECADES_FROM = 200  # the same; from here on only powers of ten have ticks
LONGEST_NAME = 20  # characters of a domain's name beside its row
MOST_HOVERS = 60  # points of a series
SMOOTH_FROM = 100  # points of a series
SMOOTH_PART = 50
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")

Percentages = tuple[float, float, float, float]


class Series(NamedTuple):
    """A named line of a plot; ``steps`` are in the unit of ``axis``."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str | None = None  # None: the next one of COLOURS
    axis: str = "optimizer step"


class LegendEntry(NamedTuple):
    """A name, its colour, and either a line style of CSS or a symbol."""

    name: str
    colour: str
    line: str = ""
    symbol: str = ""


class Hover(NamedTuple):
    """A text over a box of the plot, in the axes' units; a point has no width and no height."""

    text: str
    left: float
    right: float
    bottom: float
    top: float


class Plot(NamedTuple):
    """A plot as an SVG in a ``data:`` URI, with a title, a note and a legend.

    ``hovers`` are texts with their box's centre x and y, width and height, in percent of the picture from its
    top left corner.
    """

    title: str
    note: str
    image: str
    legend: Sequence[LegendEntry]
    hovers: list[tuple[str, Percentages]]


def line_plot(title: str, note: str, unit: str, series: Sequence[Series], level: float | None = None) -> Plot:
    """Draw series over their axis, in ``unit``; an empty series is left out but keeps its colour.

    A long series is pale, with its running mean over it.

    The axis begins at 0. With ``level``, drawn as a thin line, it begins at the smallest value and is
    logarithmic if the range is wide.
    """
    looks = zip(series, cycle(COLOURS), cycle(STYLES), strict=False)
    drawn = [(line, line.colour or colour, style) for line, colour, style in looks if line.steps]
    with _style():
        figure, axes = _axes(2.6)
        hovers = []
        for line, colour, style in drawn:
            draw = partial(axes.plot, line.steps, color=colour, linestyle=STYLES[style])
            if len(line.steps) < SMOOTH_FROM:
                draw(line.values, marker="o" if len(line.steps) <= 30 else "", markersize=3.5)
            else:
                draw(line.values, alpha=0.3, linewidth=0.8)
                draw(running_mean(line.values))
            every = math.ceil(len(line.steps) / MOST_HOVERS)
            for x, y in zip(line.steps[::every], line.values[::every], strict=True):
                hovers.append(Hover(f"{line.name}, {line.axis} {x:,.7g}: {y:.4g} {unit}".strip(), x, x, y, y))
        if level is None:
            axes.set_ylim(bottom=0)
        else:
            axes.axhline(level, color=INK, linewidth=0.8, alpha=0.6)
            _scale(axes, "y", [value for line in series for value in line.values])
        axes.set(xlabel=series[0].axis, ylabel=unit)
        legend = [LegendEntry(line.name, colour, line=style) for line, colour, style in drawn]
        return Plot(
            title, note, _image(figure), legend if len(legend) > 1 else [], _percent(figure, axes, hovers)
        )


def share_plot(title: str, note: str, bounds: Sequence[int], parts: Mapping[str, Sequence[float]]) -> Plot:
    """Draw shares by domain that sum to 1; ``bounds`` are n + 1 steps, ``parts`` has n shares a domain."""
    with _style():
        figure, axes = _axes(2.6)
        hovers, legend = [], []
        below = np.zeros(len(bounds) - 1)
        for (domain, part), colour, hatch in zip(parts.items(), cycle(COLOURS), cycle(HATCHES), strict=False):
            above = below + part
            low, high = (np.append(edge, edge[-1]) for edge in (below, above))
            axes.fill_between(bounds, low, high, step="post", facecolor=colour, hatch=hatch, linewidth=0)
            for (start, end), share, *height in zip(pairwise(bounds), part, below, above, strict=True):
                text = f"{domain}, steps {start + 1:,} to {end:,}: {share:.1%}"
                hovers.append(Hover(text, start, end, *height))
            legend.append(LegendEntry(domain, colour, symbol="■"))
            below = above
        axes.set(xlabel="optimizer step", ylabel="share of draws", ylim=(0, 1))
        axes.set_xlim(bounds[0], max(bounds[-1], bounds[0] + 1))
        return Plot(title, note, _image(figure), legend, _percent(figure, axes, hovers))


def dumbbell_plot(title: str, note: str, perplexity: Sequence[Mapping[str, float]]) -> Plot:
    """Draw a row a domain; ``perplexity`` is the student's before and after, and the teacher's."""
    legend = (
        LegendEntry("student before", INK, symbol="○"),
        LegendEntry("after", INK, symbol="■"),
        LegendEntry("teacher", INK, symbol="┃"),
    )
    domains = list(perplexity[0])
    rows = range(len(domains))
    columns = [[by_domain[name] for name in domains] for by_domain in perplexity]
    with _style():
        figure, axes = _axes(0.8 + 0.32 * len(domains))
        axes.hlines(rows, columns[0], columns[1], color=INK, linewidth=1, alpha=0.5)
        hovers = []
        for entry, marker, values in zip(legend, "os|", columns, strict=True):
            fill = "none" if entry.symbol == "○" else "full"
            axes.plot(values, rows, marker, color=INK, markersize=7, markeredgewidth=2, fillstyle=fill)
            for row, x in enumerate(values):
                hovers.append(Hover(f"{domains[row]}, {entry.name}: {x:.4g}", x, x, row, row))
        _scale(axes, "x", [value for values in columns for value in values])
        short = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in domains]
        axes.set_yticks(rows, short, parse_math=False)  # a domain may be called "$x$"
        axes.set(xlabel="perplexity", ylim=(len(domains) - 0.5, -0.5))
        return Plot(title, note, _image(figure), legend, _percent(figure, axes, hovers))


def running_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Return the mean of the finite values around each, over a ``SMOOTH_PART``-th of all; NaN without any."""
    values = np.asarray(values, np.float64)
    window = np.ones(len(values) // SMOOTH_PART * 2 + 1)
    finite = np.isfinite(values)
    sums, counts = (np.convolve(part, window, "same") for part in (np.where(finite, values, 0.0), finite))
    means = np.full(len(values), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0.5)
    return means


def replace_controls(text: str) -> str:
    """Replace characters that XML does not allow or that control a terminal by U+FFFD."""
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def _style() -> AbstractContextManager[None]:
    return rc_context(fname=Path(__file__).with_name("plots.mplstyle"))


def _axes(height: float) -> tuple[Figure, Axes]:
    """Return a figure 4 inches wide: where a phone shows it at full width, 9 points are 11 pixels."""
    figure = Figure(figsize=(4.0, height), layout="constrained")
    return figure, figure.subplots()


def _scale(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis of widely spread values logarithmic, with ticks as plain numbers."""
    smallest, largest = min(values), max(values)
    if not 0 < LOGARITHMIC_FROM * smallest < largest:
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < DECADES_FROM * smallest else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _image(figure: Figure) -> str:
    picture = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the letters that matplotlib's font lacks
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(picture, format="svg", transparent=True, metadata=metadata)
    svg = replace_controls(picture.getvalue()).encode()
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _percent(figure: Figure, axes: Axes, hovers: Sequence[Hover]) -> list[tuple[str, Percentages]]:
    """Return the boxes for ``Plot.hovers``, without infinite ones. The picture must have been drawn."""
    to_figure = axes.transData - figure.transFigure
    boxes = []
    for text, left, right, bottom, top in hovers:
        if all(map(math.isfinite, (left, right, bottom, top))):
            (x1, y1), (x2, y2) = 100 * to_figure.transform([(left, bottom), (right, top)])
            boxes.append((text, ((x1 + x2) / 2, 100 - (y1 + y2) / 2, abs(x2 - x1), abs(y2 - y1))))
    return boxes
