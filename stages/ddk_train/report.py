"""One self-contained HTML page about a run: plots and tables, nothing fetched from elsewhere."""

import html
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from ddk_train import charts
from ddk_train.charts import MARKERS, Chart
from ddk_train.outcome import Outcome, Run, read_run

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path. The run may still be going on.

    Raises
    ------
    ConfigError
        The folder does not hold a run, or one of its files cannot be read as what it should be.
    """
    path = run_dir / "report.html"
    path.write_text(page(read_run(run_dir)), encoding="utf-8")
    return path


def page(run: Run) -> str:
    """The whole page."""
    title = f"Distillation of {Path(str(run.config['student'])).name}"
    parts = [_header(run, title)]
    if run.intervals:
        parts += [_tiles(run), _perplexities(run)]
    if len(run.intervals) > 1:
        parts.append(_mixture(run))
    if run.metrics:
        parts.append(_steps(run))
    if not run.intervals:
        parts.append("<p>Nothing has been measured yet.</p>")
    parts.append(_configuration(run))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(run: Run, title: str) -> str:
    config = run.config
    step = run.metrics[-1]["step"] if run.metrics else 0
    state = "finished" if run.is_finished else "not finished"
    about = f"{run.folder} · from the cache {config['cache']} · strategy {config['strategy']}"
    return (
        f"<header><h1>{_text(title)}</h1><p>{_text(about)}<br>{step:,} of {config['max_steps']:,} steps, "
        f'<span class="state">{state}</span></p></header>'
    )


def _tiles(run: Run) -> str:
    """The numbers to take away."""
    outcomes = run.outcomes
    before = fmean(one.before / one.teacher for one in outcomes)
    after = fmean(one.after / one.teacher for one in outcomes)
    shares = [one.gap_closed for one in outcomes if one.gap_closed is not None]
    tiles = {"student / teacher perplexity, mean over domains": f"{before:.2f} → {after:.2f}"}
    if shares and len(run.intervals) > 1:
        tiles["of the gap to the teacher closed, mean over domains"] = f"{fmean(shares):.0%}"
    if run.metrics:
        tiles["tokens trained on"] = f"{run.metrics[-1]['tokens']:,}"
        speed = median(line["tokens_per_second"] for line in run.metrics)
        tiles["tokens a second, median"] = f"{speed:,.0f}"
        waiting = fmean(line["data_wait_fraction"] for line in run.metrics)
        tiles["of a step spent waiting for data"] = f"{waiting:.1%}"
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())
    return f'<dl class="tiles">{cells}</dl>'


def _perplexities(run: Run) -> str:
    outcomes = run.outcomes
    heads = ["domain", "teacher", "student before", "after", "ratio before", "after", "gap closed"]
    heads += ["factor at start", "at end", "rows drawn"]
    rows = [_outcome_cells(one) for one in outcomes]
    chart = charts.spans(
        "Perplexity by domain",
        [one.domain for one in outcomes],
        before=[one.before for one in outcomes],
        after=[one.after for one in outcomes],
        goal=[one.teacher for one in outcomes],
        note="From the hollow dot (before) to the full one (after); the bar is the teacher. Log scale.",
    )
    steps = [line["step"] for line in run.intervals]
    ratios = {
        name: [line["student_ppl"][name] / line["teacher_ppl"][name] for line in run.intervals]
        for name in run.domains
    }
    ratio = charts.lines(
        "Student / teacher perplexity",
        steps,
        ratios,
        level=1.0,
        note="At every measurement. The dashed line is parity with the teacher.",
    )
    return (
        "<h2>How near the student is to the teacher</h2>"
        "<p>Perplexity is exp of the mean cross-entropy a token on each domain's validation split, which is "
        "never trained on. Gap closed counts in nats of cross-entropy.</p>"
        f"{_table(heads, rows)}{_legend(run.domains)}{_figures([chart, ratio])}"
    )


def _outcome_cells(one: Outcome) -> list[str]:
    closed = "–" if one.gap_closed is None else f"{one.gap_closed:.0%}"
    ratios = [f"{one.before / one.teacher:.3f}", f"{one.after / one.teacher:.3f}"]
    perplexities = [f"{value:,.2f}" for value in (one.teacher, one.before, one.after)]
    factors = [f"{one.factor_start:.3f}", f"{one.factor_end:.3f}"]
    return [one.domain, *perplexities, *ratios, closed, *factors, f"{one.rows:,}"]


def _mixture(run: Run) -> str:
    steps = [line["step"] for line in run.intervals]
    factor = charts.lines(
        "Domain discrepancy factor",
        steps,
        {name: [line["factor"][name] for line in run.intervals] for name in run.domains},
        percent=True,
        note="As set at every measurement, for the interval that follows.",
    )
    drawn = [line["rows"] for line in run.intervals if any(line["rows"].values())]
    shares = {name: [rows[name] / sum(rows.values()) for rows in drawn] for name in run.domains}
    rows = charts.bars("Rows drawn", steps[: len(drawn)], shares, note="Share of each interval's rows.")
    first = (
        " The first interval is a plain sample of the corpus, whatever the factor (Algorithm 1)."
        if run.config["strategy"] == "ddk"
        else ""
    )
    return (
        f"<h2>What it trained on</h2><p>Strategy {_text(run.config['strategy'])}.{first}</p>"
        f"{_legend(run.domains)}{_figures([factor, rows])}"
    )


def _steps(run: Run) -> str:
    steps = [line["step"] for line in run.metrics]

    def chart(title: str, *names: str, note: str = "", percent: bool = False) -> Chart:
        series = {name: [line[name] for line in run.metrics] for name in names}
        return charts.lines(title, steps, series, note=note, percent=percent)

    gamma = run.config["gamma"]
    if gamma > 0:
        note = f"nats a token; loss = cross-entropy + {gamma:g} · KL."
        loss = [
            chart("Cross-entropy and loss", "cross_entropy", "loss", note=f"● cross-entropy ■ loss, {note}"),
            chart("KL from teacher to student", "kl", note="nats a token, over the cached targets."),
        ]
    else:
        loss = [chart("Cross-entropy", "cross_entropy", note="nats a token; γ = 0, so there is no KL term.")]
    figures = [
        *loss,
        chart("Learning rate", "learning_rate"),
        chart("Gradient norm", "grad_norm", note=f"Before clipping to {run.config['max_grad_norm']:g}."),
        chart("Tokens a second", "tokens_per_second", note="Text tokens, all processes together."),
        chart("Waiting for data", "data_wait_fraction", percent=True, note="Share of the step's time."),
    ]
    every = run.config["logging_steps"]
    return (
        f"<h2>Step by step</h2><p>A point every {every} steps: losses are means over those steps, learning "
        f"rate and gradient norm are the last step's. Nothing is smoothed.</p>{_figures(figures)}"
    )


def _configuration(run: Run) -> str:
    rows = "".join(
        f"<tr><th>{_text(key)}</th><td>{_text('null' if value is None else value)}</td></tr>"
        for key, value in run.config.items()
    )
    return (
        f"<details><summary>Configuration</summary>"
        f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div></details>'
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><span style="color:{charts.variable(number)}">{MARKERS[number % len(MARKERS)][1]}</span> '
        f"{_text(name)}</li>"
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _figures(found: Sequence[Chart]) -> str:
    figures = "".join(
        f"<figure><h3>{_text(one.title)}</h3>{one.svg}<figcaption>{_text(one.note)}</figcaption></figure>"
        for one in found
    )
    return f'<div class="charts">{figures}</div>'


def _text(value: object) -> str:
    return html.escape(str(value))
