"""Which plots the report shows, of one run and of several laid over each other."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from ddk_train.plots import Series, dumbbells, lines, shares
from ddk_train.run_files import Interval, Run

NATS = "nats a token"


def over_intervals(run: Run) -> str:
    """What was measured and drawn, interval by interval."""
    if len(run.intervals) < 2:
        return ""
    measured = run.intervals
    planned = [line for line in measured if any(line.rows.values())]
    end = measured[-1].step if run.is_finished else _end(run)
    bounds = [*(line.step for line in planned), end]
    steps = [line.step for line in measured]

    def by_domain(values: Sequence[Mapping[str, float]]) -> list[Series]:
        return [Series(name, steps, [value[name] for value in values]) for name in run.domains]

    first, last = measured[0], measured[-1]
    drawn = {name: [line.rows[name] / sum(line.rows.values()) for line in planned] for name in run.domains}
    factor = {name: [line.factor[name] for line in planned] for name in run.domains}
    by_size = (
        " The first interval draws by the domains' sizes instead." if run.config.strategy == "ddk" else ""
    )
    plots = [
        dumbbells(
            "Perplexity before and after",
            "A domain in each row; the teacher is the goal.",
            (first.student_ppl, last.student_ppl, first.teacher_ppl),
        ),
        lines(
            "Student / teacher perplexity",
            "1 (the thin line) is parity.",
            "ratio",
            by_domain([line.ratio for line in measured]),
            level=1.0,
        ),
        shares(
            "Domain discrepancy factor",
            f"The share of draws that the measurement at an interval's begin asks for.{by_size}",
            bounds,
            factor,
        ),
        shares("Rows drawn", "What each interval did draw; the shares add up to 1.", bounds, drawn),
    ]
    same = "Share of the validation labels for which both have the same likeliest token."
    for title, note, unit, values in (
        ("KL to the teacher", "On the validation split.", NATS, [line.validation_kl for line in measured]),
        ("Top-1 agreement", same, "share", [line.validation_agreement for line in measured]),
    ):
        known = [value for value in values if value is not None]
        if len(known) == len(measured):
            plots.append(lines(title, note, unit, by_domain(known)))
    note = f"An interval is {run.config.distill_interval:,} optimizer steps."
    return f'<h2>Over the intervals</h2><p>{note}</p><div class="grid">{"".join(plots)}</div>'


def _end(run: Run) -> int:
    """Where the interval that is under way will end."""
    return min(run.intervals[-1].step + run.config.distill_interval, run.config.max_steps)


def over_steps(run: Run) -> str:
    """What was logged, line by line."""
    if not run.metrics:
        return ""
    steps = [line.step for line in run.metrics]

    def of(*names: str) -> list[Series]:
        return [
            Series(name.replace("_", " "), steps, [getattr(line, name) for line in run.metrics])
            for name in names
        ]

    # Without the KL term the loss is the cross-entropy.
    losses = ("loss", "cross_entropy", "kl") if run.config.uses_teacher else ("cross_entropy",)
    limit = run.config.max_grad_norm
    plots = [lines("Loss", "Weighted sum of cross-entropy and KL, and each of them.", NATS, of(*losses))]
    for title, name in (("Cross-entropy by domain", "cross_entropy"), ("KL by domain", "kl")):
        series = _by_domain(run, name)
        if any(one.steps for one in series):
            plots.append(lines(title, "Of the rows drawn; a line where a domain was.", NATS, series))
    plots += [
        lines("Learning rate", "At the logged step.", "", of("learning_rate")),
        lines(
            "Gradient norm",
            f"Before clipping to {limit:g} (the thin line).",
            "norm",
            of("grad_norm"),
            level=limit,
        ),
        lines(
            "Tokens a second",
            "In training steps; evaluation is not in it.",
            "tokens/s",
            of("tokens_per_second"),
        ),
        lines("Waiting for data", "Share of the time in training steps.", "share", of("data_wait_fraction")),
    ]
    every = run.config.logging_steps
    note = f"As logged, not smoothed: losses and speeds are means over {every:,} step{'s' * (every > 1)}."
    return f'<h2>Over the steps</h2><p>{note}</p><div class="grid">{"".join(plots)}</div>'


def _by_domain(run: Run, name: str) -> list[Series]:
    """A series for each domain, in the order of the other plots."""
    logged = [(line.step, line.by_domain(name)) for line in run.metrics]
    domains = dict.fromkeys([*run.domains, *(domain for _, values in logged for domain in values)])
    return [_series(domain, ((step, values.get(domain)) for step, values in logged)) for domain in domains]


def _series(name: str, points: Iterable[tuple[float, float | None]]) -> Series:
    """Of the points that have a value."""
    known = [(step, value) for step, value in points if value is not None]
    return Series(name, [step for step, _ in known], [value for _, value in known])


def names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders, as short as they stay different."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{found} ({number})" for number, found in enumerate(found, start=1)]


def laid_over(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A plot for each measure, a line for each run, which looks the same in all of them."""
    named = list(zip(names, runs, strict=True))

    def intervals(value: Callable[[Interval], float | None]) -> list[Series]:
        return [_series(name, ((line.step, value(line)) for line in run.intervals)) for name, run in named]

    def metrics(measure: str, among: Callable[[Run], bool] = lambda _: True) -> list[Series]:
        return [
            _series(name, ((line.step, getattr(line, measure)) for line in run.metrics if among(run)))
            for name, run in named
        ]

    def ratio(domain: str) -> list[Series]:
        return intervals(lambda line: line.ratio.get(domain))

    def held_out(line: Interval) -> float | None:
        return None if line.validation_kl is None else fmean(line.validation_kl.values())

    parity = "1 (the thin line) is parity."
    measured = [
        ("Mean ratio", parity, "ratio", intervals(lambda line: fmean(line.ratio.values())), 1.0),
        ("Worst ratio", "Of the domain that is furthest from the teacher.", "ratio",
         intervals(lambda line: max(line.ratio.values())), 1.0),
        ("Cross-entropy", "On the rows drawn.", NATS, metrics("cross_entropy"), None),
        ("KL", "To the cached teacher, on the rows drawn.", NATS,
         metrics("kl", lambda run: run.config.uses_teacher), None),
        ("Tokens a second", "In training steps.", "tokens/s", metrics("tokens_per_second"), None),
        ("KL on held-out rows", "To the teacher, mean of the domains.", NATS, intervals(held_out), None),
    ]  # fmt: skip
    domains = dict.fromkeys(domain for run in runs for domain in run.domains)
    measured += [(f"{domain}: ratio", parity, "ratio", ratio(domain), 1.0) for domain in domains]
    plots = [
        lines(title, note, unit, series, level=level)
        for title, note, unit, series, level in measured
        if any(one.steps for one in series)
    ]
    note = "Student / teacher perplexity on the validation splits, and what was logged on the way."
    return f'<h2>Side by side</h2><p>{note}</p><div class="grid">{"".join(plots)}</div>' if plots else ""
