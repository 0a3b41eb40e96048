"""Choose the report's plots: of one run, and of several runs side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ddk_train.report.plots import INK, Plot, Series, dumbbell_plot, line_plot, share_plot
from ddk_train.report.run_files import Interval, RunLog

NATS = "nats a token"
PARITY = "1 (the thin line) is parity."
AGREEMENT = "Share of the validation labels for which both have the same likeliest token."

LinePlot = tuple[str, str, str, list[Series]] | tuple[str, str, str, list[Series], float]
"""The arguments of ``line_plot``."""


def interval_plots(run: RunLog) -> list[Plot]:
    """Plot a run's measurements and draws by interval; empty before the second measurement."""
    if len(run.intervals) < 2:
        return []

    def measured(values: Callable[[Interval], Mapping[str, float] | None]) -> list[Series]:
        return _by_domain(run, [(line.step, values(line) or {}) for line in run.intervals])

    first, last = run.intervals[0], run.kept
    perplexity = (first.student_ppl, last.student_ppl, first.teacher_ppl)
    ratio, kl = measured(lambda line: line.ratio), measured(lambda line: line.validation_kl)
    agreement = measured(lambda line: line.validation_agreement)
    return [
        dumbbell_plot("Perplexity before and after", "A row a domain; the teacher is the goal.", perplexity),
        line_plot("Student / teacher perplexity", PARITY, "ratio", ratio, 1.0),
        *_draw_plots(run),
        *_line_plots(
            ("KL to the teacher", "On the validation split.", NATS, kl),
            ("Top-1 agreement", AGREEMENT, "share", agreement),
        ),
    ]


def _draw_plots(run: RunLog) -> list[Plot]:
    """Plot the requested shares and the drawn ones; a run draws nothing after its last measurement."""
    intervals = [line for line in run.intervals if any(line.rows.values())]
    if not intervals:
        return []
    last = run.intervals[-1].step
    end = last if run.is_finished else min(last + run.config.distill_interval, run.config.max_steps)
    bounds = [*(line.step for line in intervals), end]
    factor = {name: [line.factor[name] for line in intervals] for name in run.domains}
    drawn = {name: [line.rows[name] / sum(line.rows.values()) for line in intervals] for name in run.domains}
    note = "The share of draws that the measurement at the start of an interval asks for."
    if run.config.by_ddk:
        note += " The first interval draws by the domains' sizes instead."
    return [
        share_plot("Domain discrepancy factor", note, bounds, factor),
        share_plot("Rows drawn", "Shares of the rows drawn in each interval.", bounds, drawn),
    ]


def step_plots(run: RunLog) -> list[Plot]:
    """Plot a run's metrics by step; colours are the domains', and measures of the whole run are in ink."""

    def logged(*measures: str) -> list[Series]:
        return [_logged(name.replace("_", " "), run, name)._replace(colour=INK) for name in measures]

    def by_domain(measure: str) -> list[Series]:
        return _by_domain(run, [(line.step, line.by_domain(measure)) for line in run.metrics])

    losses = ["cross_entropy"]
    if run.uses_teacher:
        losses.append("kl")
    if run.uses_teacher or run.uses_policy:  # else the loss is the cross-entropy
        losses.insert(0, "loss")
    written = "On the tokens that the student wrote:"
    drawn, limit = "Of the rows drawn, if the domain was drawn.", run.config.max_grad_norm
    clipped = f"Before clipping to {limit:g} (the thin line)."
    speed, wait = logged("tokens_per_second"), logged("data_wait_fraction")
    return _line_plots(
        ("Loss", "The weighted sum, and each of its divergences.", NATS, logged(*losses)),
        ("Cross-entropy by domain", drawn, NATS, by_domain("cross_entropy")),
        ("KL by domain", drawn, NATS, by_domain("kl")),
        ("Reverse KL by domain", f"{written} log q - log p, estimated.", NATS, by_domain("reverse_kl")),
        ("Advantage by domain", f"{written} log p - log q, clipped.", NATS, by_domain("advantage")),
        ("Importance by domain", f"{written} its standard deviation.", "", by_domain("importance_spread")),
        ("Left out by domain", f"{written} beyond importance_clip.", "share", by_domain("left_out")),
        ("Learning rate", "At the logged step.", "", logged("learning_rate")),
        ("Gradient norm", clipped, "norm", logged("grad_norm"), limit),
        ("Tokens a second", "In training steps, without evaluation.", "tokens/s", speed),
        ("Waiting for data", "Share of the time in training steps.", "share", wait),
    )


AXES = ("optimizer step", "million tokens", "hours in training steps")


def _on_axis(run: RunLog, axis: str, series: Series) -> Series:
    """Return a series of optimizer steps on another of ``AXES``."""
    if axis == AXES[0]:
        return series
    steps = [0, *(line.step for line in run.metrics)]
    millions = [0.0, *(line.tokens / 1e6 for line in run.metrics)]
    values = millions if axis == AXES[1] else [0.0, *(seconds / 3600 for seconds in run.seconds)]
    return series._replace(steps=np.interp(series.steps, steps, values).round(4).tolist(), axis=axis)


def comparison_plots(runs: Mapping[str, RunLog], axis: str) -> list[Plot]:
    """Plot each measure over one of ``AXES``, with a line for each run, of the same colour in all plots."""

    def measured(value: Callable[[Interval], float | None]) -> list[Series]:
        return [
            _on_axis(run, axis, _series(name, ((line.step, value(line)) for line in run.intervals)))
            for name, run in runs.items()
        ]

    def logged(measure: str) -> list[Series]:
        return [_on_axis(run, axis, _logged(name, run, measure)) for name, run in runs.items()]

    def by_domain(domain: str) -> list[LinePlot]:
        ratio = measured(lambda line: line.ratio.get(domain))
        factor = measured(lambda line: line.factor.get(domain))
        return [
            (f"{domain}: ratio", PARITY, "ratio", ratio, 1.0),
            (f"{domain}: factor", "Share of draws asked for.", "share", factor),
        ]

    kl = [
        line if run.uses_teacher else line._replace(steps=[], values=[])
        for line, run in zip(logged("kl"), runs.values(), strict=True)
    ]
    mean, worst = measured(lambda line: line.mean_ratio), measured(lambda line: line.worst_ratio)
    validation_kl = measured(lambda line: line.mean_validation_kl)
    bits = measured(lambda line: line.mean_bits_per_byte)
    domains = dict.fromkeys(domain for run in runs.values() for domain in run.domains)
    return _line_plots(
        ("Mean ratio", PARITY, "ratio", mean, 1.0),
        ("Worst ratio", "Of the domain with the highest.", "ratio", worst, 1.0),
        ("KL on validation rows", "To the teacher, mean of the domains.", NATS, validation_kl),
        ("Bits per byte", "On validation rows, mean of the domains.", "bits", bits),
        ("Cross-entropy", "On the rows drawn.", NATS, logged("cross_entropy")),
        ("KL", "To the cached teacher, on the rows drawn.", NATS, kl),
        ("Tokens a second", "In training steps.", "tokens/s", logged("tokens_per_second")),
        *(plot for domain in domains for plot in by_domain(domain)),
    )


def _line_plots(*plots: LinePlot) -> list[Plot]:
    """Draw the plots that have a value."""
    return [line_plot(*plot) for plot in plots if any(line.steps for line in plot[3])]


def _logged(name: str, run: RunLog, measure: str) -> Series:
    return _series(name, ((line.step, getattr(line, measure)) for line in run.metrics))


def _by_domain(run: RunLog, lines: Sequence[tuple[float, Mapping[str, float]]]) -> list[Series]:
    """Return a series for each domain from pairs of a step and values by domain."""
    domains = dict.fromkeys([*run.domains, *(domain for _, values in lines for domain in values)])
    return [_series(domain, ((step, values.get(domain)) for step, values in lines)) for domain in domains]


def _series(name: str, points: Iterable[tuple[float, float | None]]) -> Series:
    """Return a series of the points that have a value."""
    present = [(step, value) for step, value in points if value is not None]
    return Series(name, [step for step, _ in present], [value for _, value in present])
