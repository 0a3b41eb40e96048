"""The pictures of a study: how far variants are from the control, and what each drew by."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ddk_train.report.plots import COLOURS
from tools.studies.tables import MEASURES

LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "study",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(numbers: Mapping[str, Any], folder: Path) -> None:
    """Write ``differences.svg`` and, for the variants that follow the student, ``shares.svg``."""
    with rc_context(LOOK):
        save(differences(numbers), folder / "differences.svg")
        following = [name for name, figures in numbers["variants"].items() if _moves(figures["intervals"])]
        if following:
            save(shares(numbers, following), folder / "shares.svg")


def save(figure: Figure, path: Path) -> None:
    """Save on white, so that it can be read on a dark page too; the same figures give the same file."""
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def differences(numbers: Mapping[str, Any]) -> Figure:
    """Draw each measure's mean difference to the control with its standard error, a row a variant."""
    variants = {
        name: figures["differences"]
        for name, figures in numbers["variants"].items()
        if name != numbers["control"]
    }
    measures = [key for key in MEASURES if all(key in values for values in variants.values())]
    figure = Figure(figsize=(2.4 * len(measures) + 1.2, 0.8 + 0.26 * len(variants)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        values = [values[measure] for values in variants.values()]
        axes.axvline(0, color="black", linewidth=0.8)
        axes.errorbar(
            [value["mean"] for value in values],
            range(len(values)),
            xerr=[value["standard_error"] or 0 for value in values],
            fmt="o",
            color=COLOURS[0],
            capsize=3,
        )
        axes.set_xlabel(f"{measure},\nless {numbers['control']}'s")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(variants)), list(variants))
    panels[0].invert_yaxis()
    return figure


def shares(numbers: Mapping[str, Any], variants: Sequence[str]) -> Figure:
    """Draw the first seed's shares of the rows of each interval, stacked, and the ratios they follow."""
    figure = Figure(figsize=(2.6 * len(variants), 4), layout="constrained")
    panels = figure.subplots(2, len(variants), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(variants):
        lines = numbers["variants"][name]["intervals"]
        steps, (draws, ratios) = [line["step"] for line in lines], panels[:, column]
        for colour, domain in zip(COLOURS, numbers["domains"], strict=False):
            for index, (begin, end) in enumerate(pairwise(steps)):
                rows, drawn = lines[index]["rows"], sum(lines[index]["rows"].values())
                below = sum(list(rows.values())[: numbers["domains"].index(domain)]) / drawn
                draws.bar(begin, rows[domain] / drawn, end - begin, below, align="edge", color=colour)
            ratios.plot(steps, [line["ratio"][domain] for line in lines], color=colour, label=domain)
        draws.set_title(name)
        ratios.axhline(1, color="black", linewidth=0.8)
        ratios.set_xlabel("optimizer step")
    panels[0, 0].set_ylabel("share of rows")
    panels[1, 0].set_ylabel("student / teacher\nperplexity")
    panels[1, 0].legend(frameon=False)
    return figure


def _moves(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any(line["factor"] != lines[0]["factor"] for line in lines)
