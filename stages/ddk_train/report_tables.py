"""The report's numbers: headline, tables by domain and by run, facts."""

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from html import escape
from statistics import fmean

import yaml

from ddk_cache.configuration import flat
from ddk_train.run_files import Interval, Run


def headline(run: Run) -> str:
    """The headline numbers, as many as there are."""
    cards = [(f"{run.step:,}", f"of {run.config.max_steps:,} optimizer steps")]
    if run.metrics:
        cards += [
            (f"{run.tokens:,.0f}", "tokens trained on"),
            (short(run.metrics[-1].loss), "loss at the end"),
        ]
        cards.append((f"{_speed(run):,.0f}", "tokens/s in training steps"))
    if len(run.intervals) > 1:
        before, after = (fmean(run.intervals[number].ratio.values()) for number in (0, -1))
        cards.append((f"{short(before)} → {short(after)}", "student / teacher perplexity, mean of domains"))
        shares = [share for name in run.domains if (share := run.gap_closed(name)) is not None]
        if len(shares) == len(run.domains):
            cards.append((f"{fmean(shares):.0%}", "of the gap to the teacher closed, mean of domains"))
    boxes = (f"<div><strong>{number}</strong>{label}</div>" for number, label in cards)
    return f'<div class="grid numbers">{"".join(boxes)}</div>'


def outcome(run: Run) -> str:
    """The table by domain."""
    if not run.intervals:
        return "<p>No measurement of the student yet.</p>"
    first, last = run.intervals[0], run.intervals[-1]
    drawn = {name: sum(line.rows[name] for line in run.intervals) for name in run.domains}
    rows = []
    for name in run.domains:
        share = run.gap_closed(name)
        bar = "–" if share is None else f'{share:.0%}<meter value="{min(max(share, 0), 1):.3f}"></meter>'
        rows.append(
            (
                escape(name),
                short(first.teacher_ppl[name]),
                _perplexity(first, name),
                _perplexity(last, name),
                f"{short(first.ratio[name])} → {short(last.ratio[name])}",
                bar,
                f"{first.factor[name]:.3f} → {last.factor[name]:.3f}",
                f"{drawn[name]:,} ({drawn[name] / max(sum(drawn.values()), 1):.0%})",
            )
        )
    head = ("domain", "teacher", "student before", "after", "ratio", "gap closed", "factor", "rows drawn")
    note = (
        "Perplexity (exp of the mean cross-entropy a token, in nats) on each domain's validation split. The "
        "ratio is the student's over the teacher's; behind ± stands the standard error over the rows. Gap "
        "closed: the part of the distance to the teacher, in nats a token, that training took away. The "
        "factor is what the first and the last measurement ask "
        "for."
    )
    return f"<h2>Perplexity by domain</h2><p>{note}{_first_interval(run)}</p>{_table(head, rows)}"


def _perplexity(measured: Interval, domain: str) -> str:
    value = measured.student_ppl[domain]
    if measured.standard_error is None or not math.isfinite(value):
        return short(value)
    return f"{short(value)} <small>± {short(value * measured.standard_error[domain])}</small>"


def samples(run: Run) -> str:
    """What the student wrote before and after training."""
    if not run.samples:
        return ""
    boxes = []
    for domain in dict.fromkeys(sample.domain for sample in run.samples):
        own = [sample for sample in run.samples if sample.domain == domain]
        said = [(f"student, step {sample.step:,}", sample.sample) for sample in own]
        parts = [("held-out text", own[0].prompt), ("goes on", own[0].text), *said]
        lines = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in parts)
        boxes.append(f"<figure><h3>{escape(domain)}</h3><dl>{''.join(lines)}</dl></figure>")
    note = (
        "How the student goes on from the beginning of a held-out document: its tokens are drawn at "
        "temperature 1, by the same random numbers each time."
    )
    return f'<h2>Samples</h2><p>{note}</p><div class="grid samples">{"".join(boxes)}</div>'


def _first_interval(run: Run) -> str:
    by_size = run.config.strategy == "ddk"
    return " The first interval draws by the domains' sizes, not by the factor." if by_size else ""


def outcomes(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A row a run: how far it came, and what it cost."""
    measures = [_measures(run) for run in runs]
    lowest = {
        key: min((found[key] for found in measures if key in found), default=math.nan)
        for key in ("mean ratio", "worst ratio", "cross-entropy", "KL")
    }
    rows = []
    for run, name, found in zip(runs, names, measures, strict=True):
        cells = [escape(name), f"{run.step:,}" + ("" if run.is_finished else " (not finished)")]
        cells.append(f"{run.tokens:,.0f}")
        for key, best in lowest.items():
            text = short(found[key]) if key in found else "–"
            cells.append(f"<b>{text}</b>" if found.get(key) == best else text)
        cells.append(_in_steps(run))
        rows.append(cells)
    head = ("run", "steps", "tokens", *lowest, "time in steps")
    note = (
        "After the last measurement: student / teacher perplexity over the domains; cross-entropy and KL in "
        "nats a token over the last logged steps, which depend on what each run drew. The lowest is bold; "
        "one run each says nothing of the spread between seeds."
    )
    return f"<h2>Outcome</h2><p>{note}</p>{_table(head, rows)}"


def _measures(run: Run) -> dict[str, float]:
    found: dict[str, float] = {}
    if run.intervals:
        ratios = run.intervals[-1].ratio.values()
        found |= {"mean ratio": fmean(ratios), "worst ratio": max(ratios)}
    if run.metrics:
        found["cross-entropy"] = run.metrics[-1].cross_entropy
        if run.config.uses_teacher:
            found["KL"] = run.metrics[-1].kl
    return found


def compared(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A row for each key of the configurations, but the folder, that is not the same in all runs."""
    configs = [flat(run.settings | {"output_dir": ""}) for run in runs]
    keys = dict.fromkeys(key for found in configs for key in found)
    rows = [
        [escape(key), *(escape(str(found.get(key, "–"))) for found in configs)]
        for key in keys
        if len({str(found.get(key, "–")) for found in configs}) > 1
    ]
    if not rows:
        return "<h2>Differences in configuration</h2><p>None.</p>"
    return f"<h2>Differences in configuration</h2>{_table(['key', *map(escape, names)], rows)}"


def perplexities(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A row a domain: the teacher's perplexity, and each run's after its last measurement."""
    measured = [run for run in runs if run.intervals]
    rows = []
    for domain in dict.fromkeys(name for run in measured for name in run.domains):
        of = [run.intervals[-1] if domain in run.domains else None for run in runs]
        teachers = dict.fromkeys(short(one.teacher_ppl[domain]) for one in of if one)
        found = (
            "–" if one is None else f"{_perplexity(one, domain)} · {short(one.ratio[domain])}" for one in of
        )
        rows.append([escape(domain), " / ".join(teachers), *found])
    if not rows:
        return ""
    note = (
        "On the validation splits: the student's perplexity, with its standard error over the rows, and its "
        "ratio to the teacher's."
    )
    head = ["domain", "teacher", *map(escape, names)]
    return f"<h2>Perplexity by domain</h2><p>{note}</p>{_table(head, rows)}"


def facts(run: Run) -> str:
    """Teacher, cache, versions, machine and times."""
    found = {"folder": str(run.folder), "student": run.config.student, "cache": run.config.cache}
    if run.facts:
        tokens = ", ".join(f"{name} {count:,}" for name, count in run.facts.train_tokens.items())
        found |= {
            "teacher": ", ".join(run.facts.teachers),
            "target": f"{run.facts.target}, rows of {run.facts.seq_length:,} tokens",
            "tokens in the cache": tokens,
            "size of the cache": "–"
            if (size := run.facts.cache_bytes) is None
            else f"{size / 2**20:,.1f} MiB",
            "machine": f"{run.facts.machine}, {run.facts.processes} process(es)",
            "versions": ", ".join(f"{name} {number}" for name, number in run.facts.versions.items()),
            "began": f"{run.facts.began:%Y-%m-%d %H:%M} UTC",
        }
        if run.facts.ended:
            found["took"] = f"{run.facts.ended - run.facts.began}, interruptions and evaluation included"
    found["time in training steps"] = _in_steps(run)
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in found.items())
    return f"<dl>{''.join(lines)}</dl>"


def _in_steps(run: Run) -> str:
    """The time in training steps; as much as a ``timedelta`` takes, whatever the files say."""
    return str(timedelta(seconds=round(min(run.training_seconds, 1e9))))


def settings(run: Run) -> str:
    """The resolved configuration as it stands in the run's folder."""
    text = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True)
    return f'<div class="table"><pre>{escape(text)}</pre></div>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML."""
    names = "".join(f"<th>{name}</th>" for name in head)
    body = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _speed(run: Run) -> float:
    return run.tokens / run.training_seconds if run.training_seconds else 0.0


def short(value: float) -> str:
    """Three digits or more, thousands apart: 1.23, 12.3, 12,345."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{max(0, 2 - int(math.log10(max(abs(value), 1))))}f}"
