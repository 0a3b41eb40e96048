"""Charts of a report as inline SVG. Colours are CSS variables, so they follow the page's light or dark."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# What is drawn with, and what the page's CSS makes of it. The hexadecimal names never reach the reader.
INK, GRID, PANEL = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{number:02x}" for number in range(8))
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", PANEL: "var(--panel)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)
}
# A series is told by its marker too, for those who do not see its colour: matplotlib's name and a character.
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))

SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "ddk",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Chart:
    """An SVG, what stands above it and what below."""

    title: str
    svg: str
    note: str = ""


def variable(number: int) -> str:
    """The CSS colour of the series with that number."""
    return VARIABLES[SERIES[number % len(SERIES)]]


def lines(
    title: str,
    steps: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    note: str = "",
    level: float | None = None,
    percent: bool = False,
) -> Chart:
    """Series over the optimizer steps, as measured. ``level``: a dashed line across, such as parity."""
    with rc_context(SETTINGS):
        figure, axes = _axes()
        for number, values in enumerate(series.values()):
            marker = MARKERS[number % len(MARKERS)][0] if len(steps) <= 40 else ""
            axes.plot(steps, values, color=SERIES[number % len(SERIES)], marker=marker)
        values = [value for one in series.values() for value in one]
        if level is not None:
            axes.axhline(level, color=INK, linestyle="--", linewidth=1)
            values.append(level)
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
            note = f"{note} Logarithmic scale.".strip()
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("optimizer step")
        _numbers(axes, percent=percent)
        return Chart(title, _svg(figure, title), note)


def bars(title: str, steps: Sequence[int], series: Mapping[str, Sequence[float]], *, note: str = "") -> Chart:
    """What each interval, named by its first step, took of every series: stacked shares of 1."""
    with rc_context(SETTINGS):
        figure, axes = _axes()
        below = [0.0] * len(steps)
        for number, values in enumerate(series.values()):
            colour = SERIES[number % len(SERIES)]
            axes.bar(range(len(steps)), values, bottom=below, color=colour, width=0.85)
            below = [low + value for low, value in zip(below, values, strict=True)]
        shown = range(0, len(steps), max(1, -(-len(steps) // 6)))
        axes.set_xticks(list(shown), [f"{steps[place]:,}" for place in shown])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("interval, by its first step")
        _numbers(axes, percent=True)
        return Chart(title, _svg(figure, title), note)


def spans(
    title: str,
    names: Sequence[str],
    *,
    before: Sequence[float],
    after: Sequence[float],
    goal: Sequence[float],
    note: str = "",
) -> Chart:
    """A line for each name, from before (hollow) to after (full), and the goal as a bar; a log scale."""
    with rc_context(SETTINGS):
        figure, axes = _axes(height=max(2.7, 1 + 0.3 * len(names)))
        for number, (start, end, aim) in enumerate(zip(before, after, goal, strict=True)):
            colour = SERIES[number % len(SERIES)]
            axes.plot([start, end], [number, number], color=colour, linewidth=2.5)
            axes.plot(start, number, "o", color=colour, markerfacecolor=PANEL, markersize=7)
            axes.plot(end, number, "o", color=colour, markersize=7.5)
            axes.plot(aim, number, "|", color=INK, markersize=15, markeredgewidth=2.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("perplexity")
        return Chart(title, _svg(figure, title), note)


def _axes(height: float = 2.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, height), layout="constrained")  # inches; the page scales it to its column
    return figure, figure.subplots()


def _numbers(axes: Axes, *, percent: bool) -> None:
    def written(value: float, _: int) -> str:
        if percent:
            return f"{100 * value:g}%"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    axes.yaxis.set_major_formatter(FuncFormatter(written))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
