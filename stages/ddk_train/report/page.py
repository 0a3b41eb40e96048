"""Write one self-contained HTML page about a run, or about several side by side, from page.html."""

import glob
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import jinja2
import yaml

from ddk_cache.errors import counted
from ddk_cache.util import durable
from ddk_cache.util.configuration import flat
from ddk_train.config import Schedule, TrainConfig
from ddk_train.loop.objective import reads_targets
from ddk_train.report import figures
from ddk_train.report.outcome import verdict
from ddk_train.report.plots import SMOOTH_FROM, replace_controls
from ddk_train.report.run_files import RunLog, read_run


def short(value: float) -> str:
    """Format a number with three digits or more, and commas between thousands: 1.23, 12.3, 12,345."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{max(0, 2 - int(math.log10(max(abs(value), 1))))}f}"


FILTERS: dict[str, Callable[[float], str]] = {
    "short": short,
    "count": lambda value: f"{value:,}" if isinstance(value, int) else f"{value:,.0f}",
    "percent": lambda share: f"{share:.0%}",
    # Bounded, since a timedelta is.
    "duration": lambda seconds: str(timedelta(seconds=round(min(seconds, 1e9)))),
}


def write_report(
    folders: Sequence[Path], page: Path | None = None, *, reload_seconds: float | None = None
) -> Path:
    """Write the page about runs, finished or not, and return its path.

    Without ``page`` it is ``report.html``: in the folder of a single run, beside the first of several.
    With ``reload_seconds`` browsers reload the page while a run is not finished. Raises ConfigError if a
    folder has no run or a damaged file.
    """
    logs = [read_run(folder) for folder in folders]
    names = [run.name for run in logs]
    runs = dict(zip(names if len({*names}) == len(names) else _short_names(folders), logs, strict=True))
    if page is None:
        page = (folders[0] if len(runs) == 1 else folders[0].resolve().parent) / "report.html"
    finished = all(run.is_finished for run in logs)
    context = _one_run(logs[0]) if len(runs) == 1 else _several_runs(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    template = environment.get_template("page.html")
    text = template.render(**context, runs=runs, reload_seconds=None if finished else reload_seconds)
    durable.write(page, replace_controls(text))
    durable.remove_staged(page.parent.glob(f"{glob.escape(page.name)}#*"))
    return page


def watch(folders: Sequence[Path], page: Path, seconds: float) -> None:
    """Write the page every ``seconds`` until the runs are finished."""
    while not all(read_run(folder).is_finished for folder in folders):
        time.sleep(seconds)
        write_report(folders, page, reload_seconds=seconds)
    write_report(folders, page)


def _one_run(run: RunLog) -> dict[str, object]:
    teachers = f" from {', '.join(map(_last_part, run.facts.teachers))}" if run.facts else ""
    return {
        "title": f"{_last_part(run.config.student)}{teachers}, {run.config.strategy} ({run.name})",
        "loss": _loss(run),
        "status": _status(run),
        "interval_plots": figures.interval_plots(run),
        "step_plots": figures.step_plots(run),
        "settings": _settings(run.config),
        "samples": _samples({"student": run}),
        "is_smoothed": len(run.metrics) >= SMOOTH_FROM,
        "verdict": verdict(run),
    }


def _samples(runs: Mapping[str, RunLog]) -> dict[str, dict[tuple[str, str], list[tuple[str, str]]]]:
    """Return by domain, then by held-out text and its continuation, who wrote at which step what.

    Of several runs the last sample of each is taken.
    """
    samples: dict[str, dict[tuple[str, str], list[tuple[str, str]]]] = {}
    for name, run in runs.items():
        for domain, lines in run.generations_by_domain.items():
            for line in lines if len(runs) == 1 else lines[-1:]:
                written = samples.setdefault(domain, {}).setdefault((line.prompt, line.text), [])
                written.append((f"{name}, step {line.step:,}", line.sample))
    return samples


def _settings(config: TrainConfig) -> list[tuple[str, bool]]:
    """Return each key of the configuration as YAML, and whether it differs from its default."""
    return [
        (yaml.safe_dump({key: value}, allow_unicode=True), getattr(config, key) != field.get_default())
        for (key, value), field in zip(
            config.model_dump(mode="json").items(), TrainConfig.model_fields.values(), strict=True
        )
    ]


def _several_runs(runs: Mapping[str, RunLog]) -> dict[str, object]:
    measures = {name: _last_measures(run) for name, run in runs.items()}
    held_out = ("mean ratio", "worst ratio", "held-out KL", "bits per byte")
    return {
        "title": f"{len(runs)} runs: {', '.join(runs)}",
        "measures": measures,
        "lowest": {
            key: min((m[key] for m in measures.values() if key in m), default=None) for key in held_out
        },
        "training": ("cross-entropy", "KL"),
        "teachers": {
            domain: dict.fromkeys(
                short(run.intervals[-1].teacher_ppl[domain]) for run in runs.values() if domain in run.domains
            )
            for domain in dict.fromkeys(domain for run in runs.values() for domain in run.domains)
        },
        "differences": _differences(runs),
        "plots": {axis: figures.comparison_plots(runs, axis) for axis in figures.AXES},
        "samples": _samples(runs),
    }


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with enough parents to make them unique."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index})" for index, name in enumerate(names, start=1)]


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _status(run: RunLog) -> str:
    config = run.config
    if not run.is_finished:
        return f"Not finished: {run.step:,} of {config.max_steps:,} steps so far."
    if config.stop_ratio is not None and run.step < config.max_steps:
        return f"Stopped at step {run.step:,}: every ratio was at or below {config.stop_ratio:g}."
    return f"Finished: {counted(run.step, 'step')}."


def _loss(run: RunLog) -> str:
    """Return the terms of the loss with their weights, for each group of domains with the same."""
    domains: dict[str, list[str]] = {}
    for name in run.trained_domains:
        domains.setdefault(_loss_of(run.config, name), []).append(name)
    if len(domains) == 1:
        return next(iter(domains))
    return "; ".join(f"{', '.join(names)}: {loss}" for loss, names in domains.items())


def _loss_of(config: TrainConfig, domain: str) -> str:
    terms = []
    if cross_entropy := config.of_domain(domain, "cross_entropy_weight"):
        terms.append(f"{cross_entropy:g} · cross-entropy")
    if any(reads_targets(config, (domain,))):
        gamma = config.of_domain(domain, "gamma")
        weight = "gamma (by step)" if isinstance(gamma, Schedule) else f"{gamma:g}"
        kind = "KL" if config.divergence == "forward" else f"{config.divergence.replace('_', '-')} divergence"
        terms.append(f"{weight} · {kind} to the cached teacher ({config.tail} tail)")
    if policy := config.of_domain(domain, "policy_gradient_weight"):
        terms.append(f"{policy:g} · policy gradient on the student's own text")
    return " + ".join(terms)


def _last_measures(run: RunLog) -> dict[str, float]:
    measures: dict[str, float] = {}
    if run.intervals:
        last = run.kept
        measures |= {"mean ratio": last.mean_ratio, "worst ratio": last.worst_ratio}
        means = {"held-out KL": last.mean_validation_kl, "bits per byte": last.mean_bits_per_byte}
        measures |= {name: value for name, value in means.items() if value is not None}
    if run.metrics:
        measures["cross-entropy"] = run.metrics[-1].cross_entropy
        if run.uses_teacher:
            measures["KL"] = run.metrics[-1].kl
    return measures


def _differences(runs: Mapping[str, RunLog]) -> dict[str, list[str]]:
    """Return the values of the keys that differ between the runs' configurations, without the folder."""
    configs = [flat(run.config.model_dump(mode="json") | {"output_dir": ""}) for run in runs.values()]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [str(config.get(key, "–")) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}
