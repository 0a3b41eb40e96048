"""The share of each domain in an interval: Algorithm 1's rule, and those it is compared with. Pure.

Arrays are float64 over the N domains, in the cache's order. Shares and factors sum to 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddk_cache import Cache
from ddk_cache.discrepancy import gap_factor, initial_factor, update_factor
from ddk_cache.errors import ConfigError
from ddk_cache.sampler import natural_share
from ddk_train.config import TrainConfig

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """The inputs of a strategy at the end of an interval; arrays over domains, [N]."""

    domains: tuple[str, ...]
    factor: Float64 | None  # of the interval that ended; None before the first
    student_ppl: Float64  # exp of the mean cross-entropy in nats, on the validation split
    teacher_ppl: Float64
    rows: list[int]  # of each train split


def _ddk(config: TrainConfig, now: Measurement) -> Float64:
    """Equation 1 of DDK before the first interval, then equation 2 (arXiv 2407.16154)."""
    if now.factor is None:
        return initial_factor(now.student_ppl, now.teacher_ppl)
    return update_factor(now.factor, now.student_ppl, now.teacher_ppl, config.smoothing)


def _gap(config: TrainConfig, now: Measurement) -> Float64:
    return gap_factor(now.student_ppl, now.teacher_ppl, config.gap_temperature)


def _uniform(config: TrainConfig, now: Measurement) -> Float64:
    return np.full(len(now.domains), 1 / len(now.domains))


def _proportional(config: TrainConfig, now: Measurement) -> Float64:
    return natural_share(now.rows)


def _static(config: TrainConfig, now: Measurement) -> Float64:
    assert config.weights is not None
    weights = np.array([config.weights[name] for name in now.domains], np.float64)
    return np.asarray(weights / weights.sum())


STRATEGIES: dict[str, Callable[[TrainConfig, Measurement], Float64]] = {
    "ddk": _ddk,
    "auto": _ddk,  # within ``TrainConfig.most_epochs``
    "gap": _gap,
    "uniform": _uniform,
    "proportional": _proportional,
    "static": _static,
}


def next_factor(config: TrainConfig, now: Measurement) -> Float64:
    """Return the factor r of the next interval, [N], by the configured strategy.

    For ``ddk`` and ``auto``, with x[i] = student_ppl[i] / teacher_ppl[i] and alpha = ``smoothing``::

        r[i]  = exp(x[i]) / sum_j exp(x[j])                                         equation 1, at first
        r'[i] = alpha * r[i] exp(x[i]) / sum_j r[j] exp(x[j]) + (1 - alpha) / N     equation 2, later
    """
    return STRATEGIES[config.strategy](config, now)


def is_plain_sample(config: TrainConfig, interval: int) -> bool:
    """Return whether an interval draws a plain random sample of the corpus; ``interval`` counts from 0.

    DDK's first interval is one (Algorithm 1).
    """
    return config.strategy == "proportional" or (config.by_ddk and interval == 0)


def interval_share(config: TrainConfig, interval: int, factor: Float64, rows: list[int]) -> Float64:
    """Return the share of each domain in an interval, [N]: the factor; in a plain sample that of its rows."""
    return natural_share(rows) if is_plain_sample(config, interval) else factor


def row_share(config: TrainConfig, interval: int, share: Float64, labels_per_row: Float64) -> Float64:
    """Return the probability p of drawing a row of each domain, [N], from its share s, [N].

    The loss is a mean over labels, so with ``share_of: labels`` the share is of labels:
    p[i] = s[i] / l[i] / sum_j (s[j] / l[j]) with l = ``labels_per_row``, [N]. By rows, conversations, which
    have few labels in a row, would count for less than their share. With ``share_of: rows``, and for a plain
    random sample of the corpus, p = s.
    """
    if config.share_of == "rows" or is_plain_sample(config, interval):
        return share
    rows = share / labels_per_row
    return np.asarray(rows / rows.sum())


def train_rows(cache: Cache) -> list[int]:
    """Return the training rows of each domain, [N]."""
    return [len(cache[name].train) for name in cache.domains]


def mean_labels(cache: Cache) -> Float64:
    """Return the mean number of labels in a training row of each domain, [N], over all tokenised rows."""
    states = [cache[name].state.train for name in cache.domains]
    return np.array([max(state.labels, 1) / max(state.rows, 1) for state in states])


def most_rows(config: TrainConfig, domains: tuple[str, ...], rows: list[int], total: int) -> Float64:
    """Return the most rows to draw from each domain in a run of ``total`` rows, [N], whole or inf."""
    limits = [config.most_epochs(name, total / sum(rows)) for name in domains]
    return np.floor(np.array(limits) * rows)


def steps_within_epochs(
    config: TrainConfig, domains: tuple[str, ...], rows: list[int], rows_in_a_step: int
) -> int:
    """Return ``max_steps``, or the steps that ``max_epochs`` allows; raise ConfigError if that is none."""
    steps = config.max_steps
    # In fewer steps ``auto`` allows fewer passes.
    while (most := _most_in_all(config, domains, rows, steps * rows_in_a_step)) < steps * rows_in_a_step:
        steps = int(most) // rows_in_a_step
        if not steps:
            raise ConfigError(f"max_epochs: leaves {int(most)} rows, and a step takes {rows_in_a_step}")
    return steps


def _most_in_all(config: TrainConfig, domains: tuple[str, ...], rows: list[int], total: int) -> float:
    """Return the sum of ``most_rows`` over the domains that are drawn from."""
    most = most_rows(config, domains, rows, total)
    weights = config.weights or dict.fromkeys(domains, 1.0)
    return float(most[[weights[name] > 0 for name in domains]].sum())


def check_weights(config: TrainConfig, domains: tuple[str, ...]) -> None:
    """Raise ConfigError unless static weights name exactly the cache's domains."""
    if config.weights is None or set(config.weights) == set(domains):
        return
    unknown = sorted(set(config.weights) - set(domains))
    missing = sorted(set(domains) - set(config.weights))
    problem = f"no domain {unknown[0]!r} in the cache" if unknown else f"domain {missing[0]!r} has no weight"
    raise ConfigError(f"weights: {problem}; its domains are {', '.join(domains)}")
