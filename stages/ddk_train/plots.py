"""The report's plots: inline SVG that takes the page's text colour and needs nothing from elsewhere."""

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from itertools import cycle

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart, without the two that vanish on
# white or on black. Line styles change along with them, so that series repeat only after 21.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
STYLES = {"solid": "-", "dashed": "--", "dotted": ":"}  # CSS's name: matplotlib's
MARKS = {
    "student before": ("o", "#D55E00", "●"),
    "after": ("s", "#0072B2", "■"),
    "teacher": ("|", "#009E73", "┃"),
}
INK = "#010203"  # drawn nowhere else; becomes the colour of the page's text
SPREAD = 20  # largest / smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Series:
    """A named line of a plot."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def lines(title: str, note: str, series: Sequence[Series], *, level: float | None = None) -> str:
    """A ``<figure>``: the series over optimizer steps.

    The axis begins at 0. With ``level``, a thin line, it shows the range there is, a wide one in logarithms.
    """
    looks = list(zip(series, cycle(COLOURS), cycle(STYLES), strict=False))
    with _look(title):
        figure, axes = _axes(2.6)
        for one, colour, style in looks:
            marker = "o" if len(one.steps) <= 30 else ""
            axes.plot(one.steps, one.values, STYLES[style], color=colour, marker=marker, markersize=3.5)
        if level is None:
            axes.set_ylim(bottom=0)
        else:
            axes.axhline(level, color=INK, linewidth=0.8, alpha=0.6)
            if _is_wide([value for one in series for value in one.values]):
                axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        names = [
            f'<span><i style="border-top:3px {style} {colour}"></i>{escape(one.name)}</span>'
            for one, colour, style in looks
        ]
        return _html(figure, title, note, names if len(names) > 1 else [])


def dumbbells(title: str, note: str, perplexity: Sequence[Mapping[str, float]]) -> str:
    """A ``<figure>``: a row a domain with the three perplexities of ``MARKS``, each a map by domain."""
    with _look(title):
        domains = list(perplexity[0])
        figure, axes = _axes(0.8 + 0.32 * len(domains))
        before, after, teacher = ([by_domain[name] for name in domains] for by_domain in perplexity)
        axes.hlines(range(len(domains)), before, after, color=INK, linewidth=1, alpha=0.5)
        for row, (marker, colour, _) in zip((before, after, teacher), MARKS.values(), strict=True):
            axes.plot(row, range(len(domains)), marker, color=colour, markersize=7, markeredgewidth=2)
        if _is_wide([*before, *after, *teacher]):
            axes.set_xscale("log")
        axes.set_yticks(range(len(domains)), domains)
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_xlabel("perplexity")
        names = [
            f'<span><b style="color:{colour}">{sign}</b>{name}</span>'
            for name, (_, colour, sign) in MARKS.items()
        ]
        return _html(figure, title, note, names)


def _look(title: str) -> AbstractContextManager[None]:
    """matplotlib's settings: text stays text, and the same plot gives the same SVG."""
    return rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "axes.formatter.limits": (-3, 6)}
    )


def _axes(height: float) -> tuple[Figure, Axes]:
    """A figure 4.4 inches wide, so that its text stays readable where a phone shows it at full width."""
    figure = Figure(figsize=(4.4, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.grid(color=INK, alpha=0.12, linewidth=0.7)
    return figure, axes


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > SPREAD * min(values)


def _html(figure: Figure, title: str, note: str, names: Sequence[str]) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Several pictures on a page: names of groups would repeat, and the size is the page's to decide.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(title)}">', svg
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    caption = f"<figcaption>{''.join(names)}</figcaption>" if names else ""
    return f"<figure><h3>{escape(title)}</h3><p>{escape(note)}</p>{svg}{caption}</figure>"
