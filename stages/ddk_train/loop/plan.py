"""The plan that ``train --dry-run`` prints: the resolved configuration and the amount of data."""

import math

import numpy as np
from numpy.typing import NDArray

from ddk_cache import Cache
from ddk_cache.errors import ConfigError, counted
from ddk_cache.sampler import row_counts
from ddk_train.config import MANY_EPOCHS, TrainConfig
from ddk_train.loop.mixture import Measurement, mean_labels, most_rows, next_factor, row_share, train_rows
from ddk_train.student.distributed import Ranks

COLUMNS = ("domain", "rows", "labels", "tokens", "share", "epochs")
MOST_EPOCHS = 100  # beyond it an error, beyond MANY_EPOCHS a warning


def plan(config: TrainConfig, cache: Cache, ranks: Ranks) -> str:
    """Return the configuration as YAML, and as comments the rows that the run would draw from each domain.

    ``epochs`` are passes over the domain's training rows in ``max_steps``.
    """
    rows, share, counts = _draws(config, cache, ranks)
    rows_in_a_step = ranks.rows_in_a_step(config)
    drawn = config.max_steps * rows_in_a_step
    table = [COLUMNS]
    for name, size, part, count in zip(cache.domains, rows, share.tolist(), counts.tolist(), strict=True):
        state = cache[name].state.train
        sizes = (f"{size:,}", f"{state.labels:,}", f"{state.tokens:,}")
        table.append((name, *sizes, f"{part:.2f}", f"{count / size:.2f}"))
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    lines = [
        f"{counted(config.max_steps, 'step')} of {counted(rows_in_a_step, 'row')} of {cache.seq_length:,} "
        f"tokens: {counted(drawn, 'row')}, at most {drawn * cache.seq_length:,} tokens",
        *("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table),
    ]
    return config.to_yaml() + "\n".join(f"# {line}" for line in lines)


def _draws(
    config: TrainConfig, cache: Cache, ranks: Ranks
) -> tuple[list[int], NDArray[np.float64], NDArray[np.int64]]:
    """Return each domain's training rows, its share and the rows drawn of it in ``max_steps``, [N] each.

    Shares by gap depend on the student; equal gaps in all domains are assumed.
    """
    rows = train_rows(cache)
    equal = np.ones(len(rows))
    share = next_factor(config, Measurement(cache.domains, None, equal, equal, rows))
    drawn = config.max_steps * ranks.rows_in_a_step(config)
    most = most_rows(config, cache.domains, rows, drawn)
    counts = row_counts(row_share(config, 1, share, mean_labels(cache)), most, drawn, offset=0.5)
    return rows, share, np.asarray(counts)


def check_epochs(config: TrainConfig, cache: Cache, ranks: Ranks) -> list[str]:
    """Return a warning for each domain that the run would read more than 20 times.

    Raises ConfigError for a domain that it would read more than 100 times, unless its ``max_epochs`` is set.
    """
    lines = []
    rows, _, counts = _draws(config, cache, ranks)
    for name, size, count in zip(cache.domains, rows, counts.tolist(), strict=True):
        epochs = count / size
        times = f"max_steps: {config.max_steps:,} steps read domain {name!r} about {epochs:,.0f} times"
        if epochs > MOST_EPOCHS and config.of_domain(name, "max_epochs") is None:
            fewer = max(1, math.floor(config.max_steps * MANY_EPOCHS / epochs))
            raise ConfigError(
                f"{times}, which has {counted(size, 'row')}: set it to {fewer:,}, or set max_epochs if "
                "so many passes are meant"
            )
        if epochs > MANY_EPOCHS:
            change = "set" if config.of_domain(name, "max_epochs") is None else "lower"
            lines.append(f"{times}: after {MANY_EPOCHS} it learns them by heart; {change} max_epochs")
    return lines


def remarks(config: TrainConfig) -> list[str]:
    """Return a warning for each key that has no full effect in so few steps."""
    lines = []
    steps = f"is not below max_steps ({config.max_steps:,})"
    if config.warmup_steps >= config.max_steps:
        lines.append(f"warmup_steps: {config.warmup_steps:,} {steps}: learning_rate is not reached")
    if config.strategy in ("ddk", "auto", "gap") and config.distill_interval >= config.max_steps:
        lines.append(
            f"distill_interval: {config.distill_interval:,} {steps}: the first shares stay to the end"
        )
    return lines
