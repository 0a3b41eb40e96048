"""One self-contained HTML page about a run: plots and tables, nothing fetched from elsewhere."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from ddk_cache.configuration import load
from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.plots import Series, dumbbells, lines

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5b6675; --page: #f5f6f8; --card: #fff;
  --line: #dde1e7; --good: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --dim: #9aa6b5; --page: #12161c;
  --card: #1b2129; --line: #313a46; --good: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
p { margin: .2rem 0 .8rem; color: var(--dim); max-width: 46rem; overflow-wrap: anywhere; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.numbers { grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); margin: 1.2rem 0; }
.numbers div, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.numbers div { padding: .7rem .9rem; color: var(--dim); font-size: .85rem; line-height: 1.35; }
.numbers strong { display: block; color: var(--ink); font-size: 1.35rem; font-variant-numeric: tabular-nums; }
figure { margin: 0; padding: .8rem .9rem; min-width: 0; } h3 { margin: 0; font-size: 1rem; }
figure p { margin: 0 0 .4rem; font-size: .82rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .82rem; }
figcaption i { display: inline-block; width: 1.5rem; margin-right: .35rem; vertical-align: middle; }
figcaption b { margin-right: .3rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead tr:first-child th { border-top: 0; } th { font-size: .82rem; font-weight: 600; color: var(--dim); }
th:first-child, td:first-child { text-align: left; } td:first-child { font-weight: 600; }
meter { width: 4.5rem; margin-left: .5rem; }
pre { overflow-x: auto; margin: 0; padding: .8rem .9rem; font-size: .82rem; }
"""


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    folder: Path
    config: TrainConfig
    text: str
    """config.yaml as it stands there."""
    metrics: list[dict[str, float]]
    intervals: list[dict[str, Any]]

    @property
    def domains(self) -> list[str]:
        return list(self.intervals[0]["factor"]) if self.intervals else []

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return int(max((line["step"] for line in (*self.metrics, *self.intervals)), default=0))

    @property
    def is_finished(self) -> bool:
        """The last line of a whole run measures the student and draws nothing more."""
        return bool(self.intervals) and not any(self.intervals[-1]["rows"].values())

    def ratio(self, interval: int) -> dict[str, float]:
        """Student / teacher perplexity by domain."""
        line = self.intervals[interval]
        return {name: line["student_ppl"][name] / line["teacher_ppl"][name] for name in self.domains}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir``, however far the run has come, and return its path.

    Raises
    ------
    ConfigError
        The folder is missing, holds no run, or one of its files is damaged.
    """
    page = run_dir / "report.html"
    run = read_run(run_dir)
    title = escape(run_dir.resolve().name)
    body = [f"<h1>{title}</h1>", f"<p>{escape(_summary(run))}</p>", _numbers(run), _outcome(run)]
    body += [_over_intervals(run), _over_steps(run)]
    body.append(f'<h2>Configuration</h2><div class="table"><pre>{escape(run.text)}</pre></div>')
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n",
        encoding="utf-8",
    )
    return page


def read_run(run_dir: Path) -> Run:
    """Read what ``ddk-cache train`` wrote; errors are those of ``write_report``."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run_dir}: holds no run of ddk-cache train: config.yaml is missing")
    return Run(
        folder=run_dir,
        config=load(config, [], TrainConfig),
        text=config.read_text(encoding="utf-8"),
        metrics=_json_lines(run_dir / "metrics.jsonl"),
        intervals=_json_lines(run_dir / "discrepancy.jsonl"),
    )


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The file's lines; what follows the last line's end is still being written."""
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: is damaged: not every line is JSON") from error


def _summary(run: Run) -> str:
    config = run.config
    loss = "cross-entropy alone (gamma is 0)"
    if config.gamma:
        loss = f"cross-entropy + {config.gamma:g} · KL to the cached teacher ({config.tail} tail)"
    text = f"{config.student}, trained from {config.cache}. Sampling: {config.strategy}. Loss: {loss}. "
    if not run.is_finished:
        return text + f"Not finished: {run.step:,} of {config.max_steps:,} steps so far."
    if run.step < config.max_steps:
        return text + f"Stopped at step {run.step:,}: every ratio was at or below {config.stop_ratio:g}."
    return text + f"Finished: {run.step:,} steps."


def _numbers(run: Run) -> str:
    """The headline numbers, as many as there are."""
    cards = [(f"{run.step:,}", f"of {run.config.max_steps:,} optimizer steps")]
    if run.metrics:
        last = run.metrics[-1]
        cards += [(f"{last['tokens']:,.0f}", "tokens trained on"), (_short(last["loss"]), "loss at the end")]
        cards.append((f"{_tokens_per_second(run.metrics):,.0f}", "tokens/s in training steps"))
    if len(run.intervals) > 1:
        before, after = fmean(run.ratio(0).values()), fmean(run.ratio(-1).values())
        cards.append((f"{_short(before)} → {_short(after)}", "student / teacher perplexity, mean of domains"))
        shares = [share for name in run.domains if (share := gap_closed(run, name)) is not None]
        if len(shares) == len(run.domains):
            cards.append((f"{fmean(shares):.0%}", "of the gap to the teacher closed, mean of domains"))
    return (
        f'<div class="grid numbers">{"".join(f"<div><strong>{a}</strong>{b}</div>" for a, b in cards)}</div>'
    )


def gap_closed(run: Run, domain: str) -> float | None:
    """Share of the student's distance to the teacher, in nats a token, that training took away.

    None where the student was no worse than the teacher to begin with, or infinitely so.
    """
    before, after = (math.log(run.intervals[number]["student_ppl"][domain]) for number in (0, -1))
    teacher = math.log(run.intervals[0]["teacher_ppl"][domain])
    return (before - after) / (before - teacher) if teacher < before < math.inf else None


def _outcome(run: Run) -> str:
    """The table by domain and the picture of the same."""
    if not run.intervals:
        return "<p>No measurement of the student yet.</p>"
    first, last = run.intervals[0], run.intervals[-1]
    drawn = {name: sum(line["rows"][name] for line in run.intervals) for name in run.domains}
    rows = []
    for name in run.domains:
        share = gap_closed(run, name)
        bar = "–" if share is None else f'{share:.0%}<meter value="{min(max(share, 0), 1):.3f}"></meter>'
        cells = (
            escape(name),
            _short(first["teacher_ppl"][name]),
            _short(first["student_ppl"][name]),
            _short(last["student_ppl"][name]),
            f"{_short(run.ratio(0)[name])} → {_short(run.ratio(-1)[name])}",
            bar,
            f"{first['factor'][name]:.3f} → {last['factor'][name]:.3f}",
            f"{drawn[name]:,} ({drawn[name] / max(sum(drawn.values()), 1):.0%})",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    names = ("domain", "teacher", "student before", "after", "ratio", "gap closed", "factor", "rows drawn")
    head = "".join(f"<th>{name}</th>" for name in names)
    note = (
        "Perplexity (exp of the mean cross-entropy a token) on each domain's validation split. The ratio is "
        "the student's over the teacher's. Gap closed: the part of the distance to the teacher, in nats a "
        "token, that training took away. The factor is the share of draws at the start and for what would "
        "come next."
    )
    return (
        f'<h2>Perplexity by domain</h2><p>{note}</p><div class="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _over_intervals(run: Run) -> str:
    if len(run.intervals) < 2:
        return ""
    measured = run.intervals
    planned = [line for line in measured if any(line["rows"].values())]
    ratios = [run.ratio(number) for number in range(len(measured))]

    def by_domain(values: Sequence[Mapping[str, float]], lines: Sequence[Mapping[str, Any]]) -> list[Series]:
        steps = [line["step"] for line in lines]
        return [Series(name, steps, [value[name] for value in values]) for name in run.domains]

    first, last = measured[0], measured[-1]
    perplexity = (first["student_ppl"], last["student_ppl"], first["teacher_ppl"])
    plots = (
        dumbbells(
            "Perplexity before and after", "A domain in each row; the teacher is the goal.", perplexity
        ),
        lines(
            "Student / teacher perplexity",
            "1 (the thin line) is parity.",
            by_domain(ratios, measured),
            level=1.0,
        ),
        lines(
            "Domain discrepancy factor",
            "The share of draws that each measurement asks for.",
            by_domain([line["factor"] for line in measured], measured),
        ),
        lines(
            "Rows drawn for each interval",
            "DDK's first draw goes by the domains' sizes, the later ones by the factor.",
            by_domain([line["rows"] for line in planned], planned),
        ),
    )
    note = f"An interval is {run.config.distill_interval:,} optimizer steps."
    return f'<h2>Over the intervals</h2><p>{note}</p><div class="grid">{"".join(plots)}</div>'


def _over_steps(run: Run) -> str:
    if not run.metrics:
        return ""
    steps = [line["step"] for line in run.metrics]

    def of(*names: str) -> list[Series]:
        return [Series(name.replace("_", " "), steps, [line[name] for line in run.metrics]) for name in names]

    # Without the KL term the loss is the cross-entropy.
    losses = ("loss", "cross_entropy", "kl") if run.config.gamma else ("cross_entropy",)
    plots = (
        lines("Loss", "Nats a token; loss = cross-entropy + gamma · KL.", of(*losses)),
        lines("Learning rate", "At the logged step.", of("learning_rate")),
        lines(
            "Gradient norm",
            f"Before clipping to {run.config.max_grad_norm:g} (the thin line).",
            of("grad_norm"),
            level=run.config.max_grad_norm,
        ),
        lines("Tokens a second", "In training steps; evaluation is not in it.", of("tokens_per_second")),
        lines("Waiting for data", "Share of the time in training steps.", of("data_wait_fraction")),
    )
    every = run.config.logging_steps
    note = f"As logged, not smoothed: losses and speeds are means over {every:,} step{'s' * (every > 1)}."
    return f'<h2>Over the steps</h2><p>{note}</p><div class="grid">{"".join(plots)}</div>'


def _tokens_per_second(metrics: Sequence[Mapping[str, float]]) -> float:
    """Over the whole run: all tokens by all the time that the lines of metrics cover."""
    tokens = [0.0, *(line["tokens"] for line in metrics)]
    seconds = [
        (b - a) / line["tokens_per_second"] for a, b, line in zip(tokens, tokens[1:], metrics, strict=False)
    ]
    return tokens[-1] / sum(seconds)


def _short(value: float) -> str:
    """Three digits or more, thousands apart: 1.23, 12.3, 12,345."""
    return (
        f"{value:,.{max(0, 2 - int(math.log10(max(abs(value), 1))))}f}"
        if math.isfinite(value)
        else str(value)
    )
