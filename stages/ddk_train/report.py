"""One self-contained HTML page about one run, or several side by side: nothing is fetched from elsewhere."""

import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from ddk_cache.errors import counted
from ddk_train import report_plots
from ddk_train.plots import without_controls
from ddk_train.report_tables import (
    compared,
    facts,
    headline,
    outcome,
    outcomes,
    perplexities,
    samples,
    settings,
)
from ddk_train.run_files import Run, read_run


def write_report(
    folders: Sequence[Path], page: Path | None = None, *, reload_seconds: float | None = None
) -> Path:
    """Write the page, however far the runs have come, and return its path.

    Without ``page`` it is ``report.html``: in the folder of a single run, beside the first of several.
    With ``reload_seconds`` browsers read the page anew after so many while a run is not finished.

    Raises
    ------
    ConfigError
        A folder is missing or holds no run, or one of its files is damaged.
    """
    runs = [read_run(folder) for folder in folders]
    if page is None:
        page = (folders[0] if len(runs) == 1 else folders[0].resolve().parent) / "report.html"
    title, body = _alone(runs[0]) if len(runs) == 1 else _together(runs)
    style = (files("ddk_train") / "report.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><link rel="icon" href="data:,">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    if reload_seconds and not all(run.is_finished for run in runs):
        head += f'<meta http-equiv="refresh" content="{reload_seconds:g}">'
    text = (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    page.write_text(without_controls(text), encoding="utf-8")
    return page


def watch(folders: Sequence[Path], page: Path, seconds: float) -> None:
    """Write the page anew every so many seconds until the runs are finished."""
    while not all(read_run(folder).is_finished for folder in folders):
        time.sleep(seconds)
        write_report(folders, page, reload_seconds=seconds)
    write_report(folders, page)


def _alone(run: Run) -> tuple[str, list[str]]:
    return _title(run), [
        f"<h1>{escape(run.name)} <small>{escape(_title(run))}</small></h1>",
        f"<p>{escape(_summary(run))}</p>",
        headline(run),
        outcome(run),
        report_plots.over_intervals(run),
        report_plots.over_steps(run),
        samples(run),
        f"<h2>About this run</h2>{facts(run)}",
        f"<h2>Configuration</h2>{settings(run)}",
    ]


def _together(runs: Sequence[Run]) -> tuple[str, list[str]]:
    names = report_plots.names(runs)
    title = f"{len(runs)} runs: {', '.join(names)}"
    about = "".join(f"<h3>{escape(name)}</h3>{facts(run)}" for name, run in zip(names, runs, strict=True))
    return title, [
        f"<h1>{escape(title)}</h1>",
        outcomes(runs, names),
        perplexities(runs, names),
        compared(runs, names),
        report_plots.laid_over(runs, names),
        f"<h2>About these runs</h2>{about}",
    ]


def _title(run: Run) -> str:
    """What tells runs apart: student, teacher, strategy, folder."""
    teacher = f" from {', '.join(map(_last, run.facts.teachers))}" if run.facts else ""
    return f"{_last(run.config.student)}{teacher}, {run.config.strategy} ({run.name})"


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _summary(run: Run) -> str:
    config = run.config
    text = f"{config.student}, trained from {config.cache}. Sampling: {config.strategy}. Loss: {_loss(run)}. "
    if not run.is_finished:
        return text + f"Not finished: {run.step:,} of {config.max_steps:,} steps so far."
    if run.step == config.max_steps:
        return text + f"Finished: {counted(run.step, 'step')}."
    if config.stop_ratio is not None and max(run.intervals[-1].ratio.values()) <= config.stop_ratio:
        return text + f"Stopped at step {run.step:,}: every ratio was at or below {config.stop_ratio:g}."
    return text + f"Ended at step {run.step:,}: every domain's max_epochs were used up."


def _loss(run: Run) -> str:
    config = run.config
    if not config.uses_teacher:
        return "cross-entropy alone (gamma is 0)"
    weight = f"{config.gamma:g}" if isinstance(config.gamma, int | float) else "gamma (by step)"
    kind = "KL" if config.divergence == "forward" else f"{config.divergence.replace('_', '-')} divergence"
    own = f", other weights in {', '.join(config.domains)}" if config.domains else ""
    text = f"{weight} · {kind} to the cached teacher ({config.tail} tail){own}"
    return f"{config.cross_entropy_weight:g} · cross-entropy + {text}"
