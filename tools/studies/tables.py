"""The results of a study's runs: means, standard errors, and differences to the control, seed by seed."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from ddk_train.report.run_files import RunLog

Runs = Mapping[str, Mapping[int, RunLog]]  # by variant and seed

MEASURES = {"mean ratio": 3, "worst ratio": 3, "mean KL": 4, "worst KL": 4}  # with the decimals shown


def outcome(run: RunLog) -> dict[str, float]:
    """Return a run's last measurement.

    ``ratio`` is student / teacher perplexity, ``KL`` nats a token on held-out rows (missing where the cache
    has no targets for them), ``rows/<domain>`` what the whole run drew.
    """
    last = run.intervals[-1]
    result = {"mean ratio": fmean(last.ratio.values()), "worst ratio": max(last.ratio.values())}
    if last.validation_kl:
        kl = last.validation_kl.values()
        result |= {"mean KL": fmean(kl), "worst KL": max(kl)}
        result |= {f"KL/{name}": value for name, value in last.validation_kl.items()}
    result |= {f"perplexity/{name}": value for name, value in last.student_ppl.items()}
    result |= {f"ratio/{name}": value for name, value in last.ratio.items()}
    for name in run.domains:
        result[f"rows/{name}"] = sum(line.rows[name] for line in run.intervals)
    return result | {"tokens": run.tokens, "training seconds": run.training_seconds}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and standard error; a single value has no error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "standard_error": error}


def figures(runs: Runs, control: str) -> dict[str, Any]:
    """Return everything the tables show, and more, as JSON."""
    outcomes = {
        variant: {seed: outcome(run) for seed, run in by_seed.items()} for variant, by_seed in runs.items()
    }
    some = next(iter(next(iter(runs.values())).values()))
    variants = {}
    for variant, by_seed in outcomes.items():
        compared = outcomes.get(control, {})
        both = sorted(by_seed.keys() & compared.keys())
        variants[variant] = {
            "seeds": sorted(by_seed),
            "values": {
                key: spread([values[key] for values in by_seed.values()]) for key in _keys(*by_seed.values())
            },
            "differences": {
                key: spread([by_seed[seed][key] - compared[seed][key] for seed in both])
                for key in _keys(*by_seed.values(), *compared.values())
                if both
            },
            "runs": {str(seed): values for seed, values in by_seed.items()},
            "intervals": [
                {"step": line.step, "factor": line.factor, "rows": line.rows, "ratio": line.ratio}
                for line in next(iter(runs[variant].values())).intervals
            ],
        }
    began = {seed: run.intervals[0].ratio for seed, run in next(iter(runs.values())).items()}
    facts = some.facts
    return {
        "control": control,
        "domains": some.domains,
        "teacher_perplexity": some.intervals[-1].teacher_ppl,
        "ratio_at_the_beginning": began,
        "variants": variants,
        "machine": facts and facts.machine,
        "versions": facts and facts.versions,
        "began": facts and facts.began.isoformat(),
    }


def _keys(first: Mapping[str, float], *others: Mapping[str, float]) -> list[str]:
    """Return the figures that all outcomes have."""
    return [key for key in first if all(key in other for other in others)]


def markdown(numbers: Mapping[str, Any], control: str) -> str:
    """Return four tables: the measures, their differences to the control, perplexity and rows by domain."""
    variants, domains = numbers["variants"], numbers["domains"]
    measures = [key for key in MEASURES if all(key in figures["values"] for figures in variants.values())]
    seeds = max(len(figures["seeds"]) for figures in variants.values())
    values = [
        [variant, *(shown(figures["values"][key], MEASURES[key]) for key in measures)]
        for variant, figures in variants.items()
    ]
    differences = [
        [variant, *(shown(figures["differences"][key], MEASURES[key], sign=True) for key in measures)]
        for variant, figures in variants.items()
        if variant != control and figures["differences"]
    ]
    perplexity = [
        [variant, *(shown(figures["values"][f"perplexity/{name}"], 2) for name in domains)]
        for variant, figures in variants.items()
    ]
    teacher = ["teacher", *(f"{numbers['teacher_perplexity'][name]:.2f}" for name in domains)]
    rows = [
        [variant, *(f"{figures['values'][f'rows/{name}']['mean']:,.0f}" for name in domains)]
        for variant, figures in variants.items()
    ]
    return "\n".join(
        [
            f"Mean ± standard error of up to {seeds} seeds.",
            table(["variant", *measures], values),
            f"Difference to {control}, by seed:",
            table(["variant", *measures], differences),
            "Perplexity on held-out rows:",
            table(["variant", *domains], [*perplexity, teacher]),
            "Rows drawn:",
            table(["variant", *domains], rows),
        ]
    )


def shown(value: Mapping[str, float | None], decimals: int, *, sign: bool = False) -> str:
    mean, error = value["mean"], value["standard_error"]
    text = f"{mean:{'+' if sign else ''}.{decimals}f}"
    return text if error is None else f"{text} ± {error:.{decimals}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines), ""])
