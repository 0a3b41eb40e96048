"""Choose the report's plots: of one run, and of several runs laid over each other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from ddk_train.report.plots import Plot, Series, dumbbell_plot, line_plot, share_plot
from ddk_train.report.run_files import Interval, RunLog

NATS = "nats a token"
PARITY = "1 (the thin line) is parity."
AGREEMENT = "Share of the validation labels for which both have the same likeliest token."


def interval_plots(run: RunLog) -> list[Plot]:
    """Plot a run's measurements and draws, interval by interval; nothing before the second measurement."""
    if len(run.intervals) < 2:
        return []

    def measured(
        title: str,
        note: str,
        unit: str,
        values: Sequence[Mapping[str, float] | None],
        level: float | None = None,
    ) -> list[Plot]:
        steps = [line.step for line in run.intervals]
        present = [value for value in values if value is not None]
        series = [Series(name, steps, [value[name] for value in present]) for name in run.domains]
        return [line_plot(title, note, unit, series, level)] if len(present) == len(steps) else []

    first, last = run.intervals[0], run.intervals[-1]
    perplexity = (first.student_ppl, last.student_ppl, first.teacher_ppl)
    kl = [line.validation_kl for line in run.intervals]
    agreement = [line.validation_agreement for line in run.intervals]
    return [
        dumbbell_plot("Perplexity before and after", "A row a domain; the teacher is the goal.", perplexity),
        *measured(
            "Student / teacher perplexity", PARITY, "ratio", [line.ratio for line in run.intervals], 1.0
        ),
        *_draw_plots(run),
        *measured("KL to the teacher", "On the validation split.", NATS, kl),
        *measured("Top-1 agreement", AGREEMENT, "share", agreement),
    ]


def _draw_plots(run: RunLog) -> list[Plot]:
    """Plot the shares asked for, and those drawn; a run draws nothing after its last measurement."""
    intervals = [line for line in run.intervals if any(line.rows.values())]
    if not intervals:
        return []
    last = run.intervals[-1].step
    end = last if run.is_finished else min(last + run.config.distill_interval, run.config.max_steps)
    bounds = [*(line.step for line in intervals), end]
    factor = {name: [line.factor[name] for line in intervals] for name in run.domains}
    drawn = {name: [line.rows[name] / sum(line.rows.values()) for line in intervals] for name in run.domains}
    note = "The share of draws that the measurement at the start of an interval asks for."
    if run.config.strategy == "ddk":
        note += " The first interval draws by the domains' sizes instead."
    return [
        share_plot("Domain discrepancy factor", note, bounds, factor),
        share_plot("Rows drawn", "Shares of the rows drawn in each interval.", bounds, drawn),
    ]


def step_plots(run: RunLog) -> list[Plot]:
    """Plot what a run logged, line by line."""
    if not run.metrics:
        return []

    def logged(title: str, note: str, unit: str, *measures: str, level: float | None = None) -> Plot:
        return line_plot(title, note, unit, [_logged(m.replace("_", " "), run, m) for m in measures], level)

    def by_domain(title: str, measure: str) -> list[Plot]:
        lines = [(line.step, line.by_domain(measure)) for line in run.metrics]
        domains = dict.fromkeys([*run.domains, *(domain for _, values in lines for domain in values)])
        series = [
            _series(domain, ((step, values.get(domain)) for step, values in lines)) for domain in domains
        ]
        note = "Of the rows drawn, where the domain was drawn."
        return [line_plot(title, note, NATS, series)] if any(line.steps for line in series) else []

    # Without the KL term the loss is the cross-entropy.
    losses = ("loss", "cross_entropy", "kl") if run.config.uses_teacher else ("cross_entropy",)
    limit = run.config.max_grad_norm
    clipped = f"Before clipping to {limit:g} (the thin line)."
    return [
        logged("Loss", "Weighted sum of cross-entropy and KL, and each of them.", NATS, *losses),
        *by_domain("Cross-entropy by domain", "cross_entropy"),
        *by_domain("KL by domain", "kl"),
        logged("Learning rate", "At the logged step.", "", "learning_rate"),
        logged("Gradient norm", clipped, "norm", "grad_norm", level=limit),
        logged("Tokens a second", "In training steps, without evaluation.", "tokens/s", "tokens_per_second"),
        logged("Waiting for data", "Share of the time in training steps.", "share", "data_wait_fraction"),
    ]


def comparison_plots(runs: Mapping[str, RunLog]) -> list[Plot]:
    """Plot each measure with a line for each run; a run has the same colour in all plots."""

    def measured(value: Callable[[Interval], float | None]) -> list[Series]:
        return [
            _series(name, ((line.step, value(line)) for line in run.intervals)) for name, run in runs.items()
        ]

    def ratio(domain: str) -> list[Series]:
        return measured(lambda line: line.ratio.get(domain))

    def logged(measure: str) -> list[Series]:
        return [_logged(name, run, measure) for name, run in runs.items()]

    kl = [
        _logged(name, run, "kl") if run.config.uses_teacher else Series(name, [], [])
        for name, run in runs.items()
    ]
    validation_kl = measured(lambda line: fmean(line.validation_kl.values()) if line.validation_kl else None)
    domains = dict.fromkeys(domain for run in runs.values() for domain in run.domains)
    plots: list[tuple[str, str, str, list[Series], float | None]] = [
        ("Mean ratio", PARITY, "ratio", measured(lambda line: line.mean_ratio), 1.0),
        (
            "Worst ratio",
            "Of the domain with the highest.",
            "ratio",
            measured(lambda line: line.worst_ratio),
            1.0,
        ),
        ("Cross-entropy", "On the rows drawn.", NATS, logged("cross_entropy"), None),
        ("KL", "To the cached teacher, on the rows drawn.", NATS, kl, None),
        ("Tokens a second", "In training steps.", "tokens/s", logged("tokens_per_second"), None),
        ("KL on validation rows", "To the teacher, mean of the domains.", NATS, validation_kl, None),
        *((f"{domain}: ratio", PARITY, "ratio", ratio(domain), 1.0) for domain in domains),
    ]
    return [line_plot(*plot) for plot in plots if any(line.steps for line in plot[3])]


def _logged(name: str, run: RunLog, measure: str) -> Series:
    return Series(name, [line.step for line in run.metrics], [getattr(line, measure) for line in run.metrics])


def _series(name: str, points: Iterable[tuple[float, float | None]]) -> Series:
    """Return a series of the points that have a value."""
    present = [(step, value) for step, value in points if value is not None]
    return Series(name, [step for step, _ in present], [value for _, value in present])
