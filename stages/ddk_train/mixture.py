"""Which share of each domain an interval trains on: Algorithm 1's rule, and what it is compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddk_cache.discrepancy import gap_factor, initial_factor, update_factor
from ddk_cache.errors import ConfigError
from ddk_cache.sampler import natural_share
from ddk_train.config import TrainConfig
from ddk_train.distributed import Ranks

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """What is known at the end of an interval; arrays over domains, [N]."""

    domains: tuple[str, ...]
    factor: Float64 | None  # of the interval that ended; None before the first
    student_ppl: Float64
    teacher_ppl: Float64
    rows: list[int]  # of each train split


def _ddk(config: TrainConfig, now: Measurement) -> Float64:
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
    "gap": _gap,
    "uniform": _uniform,
    "proportional": _proportional,
    "static": _static,
}


def next_factor(config: TrainConfig, now: Measurement) -> Float64:
    """The factor of the interval to come, [N], summing to 1."""
    return STRATEGIES[config.strategy](config, now)


def interval_share(config: TrainConfig, interval: int, factor: Float64, rows: list[int]) -> Float64:
    """What to draw by: the factor, but in DDK's first interval a plain sample (Algorithm 1)."""
    return natural_share(rows) if config.strategy == "ddk" and interval == 0 else factor


def row_share(config: TrainConfig, interval: int, share: Float64, labels_per_row: Float64) -> Float64:
    """The probability of each domain that a row is drawn with, [N], so that its labels get ``share``, [N].

    The loss is a mean over labels: rows drawn by the factor would leave a domain of conversations, whose rows
    have few, a small part of it. A plain sample of the corpus is one of rows.
    """
    is_plain = config.strategy == "proportional" or (config.strategy == "ddk" and interval == 0)
    if config.share_of == "rows" or is_plain:
        return share
    rows = share / labels_per_row
    return np.asarray(rows / rows.sum())


def most_rows(config: TrainConfig, domains: tuple[str, ...], rows: list[int]) -> Float64:
    """Training rows that each domain may give over the run, [N], by ``max_epochs``; inf without it."""
    own = [config.domains[name].max_epochs if name in config.domains else None for name in domains]
    epochs = [config.max_epochs if one is None else one for one in own]
    return np.floor(
        [math.inf if one is None else one * count for one, count in zip(epochs, rows, strict=True)]
    )


def within_epochs(
    config: TrainConfig, domains: tuple[str, ...], rows: list[int], ranks: Ranks
) -> TrainConfig:
    """The configuration with as many steps as ``max_epochs`` leaves rows for.

    Schedules end with them, as they do at ``max_steps``.

    Raises
    ------
    ConfigError
        There are not enough rows for a step.
    """
    most, in_a_step = most_rows(config, domains, rows), ranks.rows_in_a_step(config)
    if config.weights is not None:
        most = most[[config.weights[name] > 0 for name in domains]]
    if most.sum() >= config.max_steps * in_a_step:
        return config
    steps = int(most.sum()) // in_a_step
    if not steps:
        raise ConfigError(f"max_epochs: leaves {int(most.sum())} rows, and a step takes {in_a_step}")
    ranks.say(f"max_epochs: the rows last for {steps:,} steps, so max_steps is {steps:,}")
    return config.model_copy(update={"max_steps": steps})


def check_weights(config: TrainConfig, domains: tuple[str, ...]) -> None:
    """Raise ConfigError unless static weights name the cache's domains, all of them and no other."""
    if config.weights is None or set(config.weights) == set(domains):
        return
    unknown = sorted(set(config.weights) - set(domains))
    missing = sorted(set(domains) - set(config.weights))
    problem = f"no domain {unknown[0]!r} in the cache" if unknown else f"domain {missing[0]!r} has no weight"
    raise ConfigError(f"weights: {problem}; its domains are {', '.join(domains)}")
