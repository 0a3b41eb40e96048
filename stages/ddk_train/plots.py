"""The report's plots: inline SVG that takes the page's text colour and needs nothing from elsewhere.

matplotlib draws; the SVG is then read as the XML it is, to give points their hover texts (``<title>``).
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from itertools import cycle, pairwise
from typing import Literal
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's colours, which people with any colour vision tell apart, without the two that vanish on
# white or on black. Line styles change along with them, so that series repeat only after 21.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
STYLES = {"solid": "-", "dashed": "--", "dotted": ":"}  # CSS's name: matplotlib's
HATCHES = ("", "///", "...")
MARKS = {
    "student before": ("o", "#D55E00", "●"),
    "after": ("s", "#0072B2", "■"),
    "teacher": ("|", "#009E73", "┃"),
}
INK = "#010203"  # drawn nowhere else; becomes the colour of the page's text
SPREAD = 20  # largest / smallest value from which an axis is logarithmic
LONGEST = 20  # letters of a domain's name beside its row
HOVERED = 60  # points of a series that can be hovered over, at most
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)


@dataclass(frozen=True)
class Series:
    """A named line of a plot."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def lines(title: str, note: str, unit: str, series: Sequence[Series], *, level: float | None = None) -> str:
    """A ``<figure>``: the series over optimizer steps, in ``unit``.

    The axis begins at 0. With ``level``, a thin line, it shows the range there is, a wide one in logarithms.
    A series without values is left out, and the others look as if it were there.
    """
    looks = [look for look in zip(series, cycle(COLOURS), cycle(STYLES), strict=False) if look[0].steps]
    with _look(title):
        figure, axes = _axes(2.6)
        hover = {}
        for number, (one, colour, style) in enumerate(looks):
            marker = "o" if len(one.steps) <= 30 else ""
            axes.plot(one.steps, one.values, STYLES[style], color=colour, marker=marker, markersize=3.5)
            for place in range(0, len(one.steps), -(-len(one.steps) // HOVERED)):
                name, (x, y) = f"hover-{number}-{place}", (one.steps[place], one.values[place])
                axes.plot([x], [y], "o", color=colour, alpha=0, markersize=9, gid=name)
                hover[name] = f"{one.name}, step {x:,.0f}: {y:.4g} {unit}".strip()
        if level is None:
            axes.set_ylim(bottom=0)
        else:
            axes.axhline(level, color=INK, linewidth=0.8, alpha=0.6)
            if _is_wide([value for one in series for value in one.values]):
                _logarithmic(axes, "y")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        names = [
            f'<span><i style="border-top:3px {style} {colour}"></i>{escape(one.name)}</span>'
            for one, colour, style in looks
        ]
        return _html(figure, title, note, names if len(names) > 1 else [], hover)


def shares(title: str, note: str, bounds: Sequence[int], parts: Mapping[str, Sequence[float]]) -> str:
    """A ``<figure>``: shares by domain that add up to 1, each over its interval.

    ``bounds`` are the n + 1 steps that n intervals lie between; ``parts`` has n shares by domain.
    """
    looks = list(zip(parts, cycle(COLOURS), [hatch for hatch in HATCHES for _ in COLOURS], strict=False))
    with _look(title):
        figure, axes = _axes(2.6)
        hover = {}
        for number, (start, end) in enumerate(pairwise(bounds)):
            below = 0.0
            for place, (domain, colour, hatch) in enumerate(looks):
                name, share = f"hover-{number}-{place}", parts[domain][number]
                bar = axes.bar(
                    start, share, end - start, below, align="edge", color=colour, hatch=hatch, gid=name
                )
                bar.patches[0].set_gid(name)
                below += share
                hover[name] = f"{domain}, steps {start + 1:,} to {end:,}: {share:.1%}"
        axes.set_xlim(bounds[0], max(bounds[-1], bounds[0] + 1))
        axes.set_ylim(0, 1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("share of draws")
        names = [
            f'<span><b style="color:{colour}">■</b>{escape(domain)}</span>' for domain, colour, _ in looks
        ]
        return _html(figure, title, note, names, hover)


def dumbbells(title: str, note: str, perplexity: Sequence[Mapping[str, float]]) -> str:
    """A ``<figure>``: a row a domain with the three perplexities of ``MARKS``, each a map by domain."""
    with _look(title):
        domains = list(perplexity[0])
        figure, axes = _axes(0.8 + 0.32 * len(domains))
        before, after, teacher = ([by_domain[name] for name in domains] for by_domain in perplexity)
        axes.hlines(range(len(domains)), before, after, color=INK, linewidth=1, alpha=0.5)
        hover = {}
        for row, (kind, (marker, colour, _)) in zip((before, after, teacher), MARKS.items(), strict=True):
            for place, value in enumerate(row):
                name = f"hover-{kind.replace(' ', '-')}-{place}"
                axes.plot([value], [place], marker, color=colour, markersize=7, markeredgewidth=2, gid=name)
                hover[name] = f"{domains[place]}, {kind}: {value:.4g}"
        if _is_wide([*before, *after, *teacher]):
            _logarithmic(axes, "x")
        short = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in domains]
        axes.set_yticks(range(len(domains)), short, parse_math=False)  # one may be called "$x$"
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_xlabel("perplexity")
        names = [
            f'<span><b style="color:{colour}">{sign}</b>{name}</span>'
            for name, (_, colour, sign) in MARKS.items()
        ]
        return _html(figure, title, note, names, hover)


def _look(title: str) -> AbstractContextManager[None]:
    """matplotlib's settings: text stays text, and the same plot gives the same SVG."""
    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": title,
            "font.size": 9,
            "axes.formatter.limits": (-3, 6),
            "hatch.linewidth": 0.5,
        }
    )


def _axes(height: float) -> tuple[Figure, Axes]:
    """A figure 4 inches wide: where a phone shows it at full width, 9 points are 11 pixels."""
    figure = Figure(figsize=(4.0, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, which="both")
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Ticks at 1, 2, 5, 10, ... as plain numbers."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > SPREAD * min(values)


def without_controls(text: str) -> str:
    """What neither XML nor a terminal that prints the page should meet in a name becomes a question mark."""
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def _html(figure: Figure, title: str, note: str, names: Sequence[str], hover: Mapping[str, str]) -> str:
    picture = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has the letters that matplotlib's font lacks
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(without_controls(picture.getvalue()))
    for element in root.iter():
        name = element.get("id", "")
        if element.tag == f"{{{SVG}}}g" and name:
            if name in hover:
                text = ElementTree.Element(f"{{{SVG}}}title")
                text.text = hover[name]
                element.insert(0, text)
            del element.attrib["id"]  # several pictures on a page would repeat it
        if INK in element.get("style", ""):
            element.set("style", element.attrib["style"].replace(INK, "currentColor"))
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    del root.attrib["width"], root.attrib["height"]  # the page's to decide
    root.set("role", "img")
    root.set("aria-label", title)
    caption = f"<figcaption>{''.join(names)}</figcaption>" if names else ""
    svg = ElementTree.tostring(root, encoding="unicode")
    return f"<figure><h3>{escape(title)}</h3><p>{escape(note)}</p>{svg}{caption}</figure>"
