"""One self-contained HTML page about a run: plots and tables, nothing fetched from elsewhere."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddk_cache.errors import ConfigError

Line = dict[str, Any]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .8rem; text-align: right; }
th { border-bottom: 2px solid #888; } td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; background: #fff; }
pre { overflow-x: auto; background: #8881; padding: 1rem; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } }
"""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path.

    Raises
    ------
    ConfigError
        The folder does not hold a run.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run_dir}: holds no run of ddk-cache train (config.yaml is missing)")
    metrics, intervals = (_lines(run_dir / f"{name}.jsonl") for name in ("metrics", "discrepancy"))
    parts = ["<h1>Distillation run</h1>"]
    if intervals:
        parts += ["<h2>Perplexity by domain</h2>", _table(intervals)]
        domains = list(intervals[0]["factor"])
        steps = [line["step"] for line in intervals]
        ratio = {n: [s["student_ppl"][n] / s["teacher_ppl"][n] for s in intervals] for n in domains}
        factor = {name: [line["factor"][name] for line in intervals] for name in domains}
        parts += [
            "<h2>Over the intervals</h2>",
            _plot(steps, ratio, "student / teacher perplexity"),
            _plot(steps, factor, "domain discrepancy factor"),
        ]
    if metrics:
        steps = [line["step"] for line in metrics]
        parts.append("<h2>Over the steps</h2><p>As logged: means over the logging steps, not smoothed.</p>")
        for names in (
            ("loss", "cross_entropy", "kl"),
            ("learning_rate",),
            ("grad_norm",),
            ("tokens_per_second",),
            ("data_wait_fraction",),
        ):
            parts.append(_plot(steps, {n: [line[n] for line in metrics] for n in names}, ", ".join(names)))
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(config.read_text(encoding='utf-8'))}</pre>")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Distillation run</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>{"".join(parts)}</html>'
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def _table(intervals: Sequence[Line]) -> str:
    first, last = intervals[0], intervals[-1]
    names = (
        "domain",
        "teacher",
        "student before",
        "student after",
        "factor at start",
        "at end",
        "rows drawn",
    )
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for name in first["factor"]:
        drawn = sum(line["rows"][name] for line in intervals)
        cells = (
            html.escape(name),
            f"{first['teacher_ppl'][name]:.2f}",
            f"{first['student_ppl'][name]:.2f}",
            f"{last['student_ppl'][name]:.2f}",
            f"{first['factor'][name]:.3f}",
            f"{last['factor'][name]:.3f}",
            f"{drawn:,}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _plot(steps: Sequence[int], series: Mapping[str, Sequence[float]], title: str) -> str:
    """An inline SVG of one or more series over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(series.items(), ["-", "--", "-.", ":"] * len(series), strict=False):
        axes.plot(steps, values, style, marker=".", label=name.replace("$", r"\$"))
    axes.set(xlabel="optimizer step", title=title)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    return picture.getvalue()[picture.getvalue().index("<svg") :]
