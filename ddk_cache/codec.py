"""A target <-> the integers that are stored. Pure numpy; docs/format.md says the same for other languages.

Each entry has a level: how far it lies below its position's best one, in steps of a grid of
log-probabilities (``topk``) or in draws (``sampled``). Levels alone are kept; what they are relative to
follows from everything summing to 1. Entries of equal level may stand in any order, so they stand in that
of their ids' codes, and the differences of these are kept. A row of S positions becomes

``entries``   [S]    how many entries each position has
``rankings``  [S]    in which of the codebook's rankings its ids are coded
``tail``      [S]    the level of the mass outside the entries, from the last entry's (``topk`` only)
``gaps``      [S E]  from each entry's level to the next one's
``codes``     [S E]  the ids

``gaps`` and ``codes`` hold the positions' first values, then their second ones and so on; zeros at the end.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.codebook import Codebook, fit
from ddk_cache.layout import RowArray, Target

__all__ = ["Codebook", "decode", "encode", "fit", "row_arrays"]

FURTHEST = 32_000  # levels below the best entry, some 1,000 nats: whatever is less likely counts as that
TAIL_AT_LAST = 1 << 15  # stored where the tail is as likely as the last entry; 0 where there is none
OFF = 0.02  # steps: how far renormalising may move all entries of a position together
SCANNED, HALVINGS = 8, 4  # the search for a shift of the grid that does not

Arrays = dict[str, NDArray[Any]]


def row_arrays(target: Target, seq_length: int) -> dict[str, RowArray]:
    """The arrays of one row, by name."""
    entries = seq_length * target.width
    arrays = {
        "entries": RowArray("uint16", seq_length, "pcodec"),
        "rankings": RowArray("uint16", seq_length, "pcodec"),
        "gaps": RowArray("uint16", entries, "pcodec"),
        "codes": RowArray("uint32", entries, "pcodec"),
    }
    if target.kind == "topk":
        arrays["tail"] = RowArray("uint16", seq_length, "pcodec")
    return arrays


def encode(
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    tail_logprob: NDArray[np.float32],
    codebook: Codebook,
    target: Target,
) -> Arrays:
    """Turn targets into integers.

    ``sampled`` is kept exactly. ``topk``: an entry's log-probability moves by less than 0.02 nat, given that
    entries and tail sum to 1.

    Parameters
    ----------
    ids, logprobs
        [n, S, E]; -1 and -inf where an entry is absent. Entries may come in any order, each id once.
    tail_logprob
        [n, S]; nats, -inf where nothing is left.

    Returns
    -------
    The arrays of ``row_arrays``, [n, width] each.
    """
    n, S = tail_logprob.shape
    shapes = row_arrays(target, S)
    arrays: Arrays = {name: np.zeros((n, array.width), array.dtype) for name, array in shapes.items()}
    for row in range(n):
        present = (ids[row] >= 0) & (logprobs[row] > -np.inf)
        at = np.flatnonzero(present.any(axis=1))
        present = present[at]
        if target.kind == "topk":
            levels, arrays["tail"][row, at] = _to_grid(
                logprobs[row, at], tail_logprob[row, at], present, codebook.step
            )
        else:
            levels = _to_levels(logprobs[row, at], target.samples)
        rankings, codes = codebook.encode(ids[row, at], present)
        # Best first, then by code, absent entries last: in the transposed arrays, [E, P], a rank is a line.
        key = np.where(present, levels << 32 | codes, np.iinfo(np.int64).max)
        key = np.ascontiguousarray(np.sort(key, axis=1).T)
        there = np.arange(target.width)[:, None] < present.sum(axis=1)
        gaps = np.diff(key >> 32, axis=0)
        codes = key & 0xFFFFFFFF
        codes[1:] -= np.where(gaps == 0, codes[:-1], 0)
        arrays["entries"][row, at] = present.sum(axis=1)
        arrays["rankings"][row, at] = rankings
        arrays["gaps"][row, : there[1:].sum()] = gaps[there[1:]]
        arrays["codes"][row, : there.sum()] = codes[there]
    return arrays


def decode(
    arrays: Mapping[str, NDArray[Any]], codebook: Codebook, target: Target, seq_length: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
    """The inverse of ``encode``.

    Returns
    -------
    ids int32 [n, S, E] and logprobs float32 [n, S, E], best first, -1 and -inf where an entry is absent;
    tail_logprob float32 [n, S], -inf where nothing is left. Entries and tail sum to 1.

    Raises
    ------
    ValueError
        The integers are not what ``encode`` makes.
    """
    n, E = len(arrays["entries"]), target.width
    ids = np.full((n, seq_length, E), -1, np.int32)
    logprobs = np.full((n, seq_length, E), -np.inf, np.float32)
    tail_logprob = np.full((n, seq_length), -np.inf, np.float32)
    if arrays["entries"].max(initial=0) > E:
        raise ValueError(f"a position has {arrays['entries'].max()} entries, more than {E}")
    for row in range(n):
        at = np.flatnonzero(arrays["entries"][row])
        entries = arrays["entries"][row, at]
        there = np.arange(E)[:, None] < entries  # [E, P]
        gaps, codes = _spread(arrays["gaps"][row], there[1:]), _spread(arrays["codes"][row], there)
        levels = np.zeros(there.shape, np.float32)
        levels[1:] = gaps
        tied = (gaps == 0).astype(np.uint32)
        for rank in range(1, E):
            levels[rank] += levels[rank - 1]
            codes[rank] += codes[rank - 1] * tied[rank - 1]
        found = codebook.ids(codes, arrays["rankings"][row, at])
        if target.kind == "topk":
            logs, tail_logprob[row, at] = _from_grid(levels, there, arrays["tail"][row, at], codebook.step)
        else:
            logs = _from_levels(levels, there, target.samples)
        if not there.all():
            found[~there], logs[~there] = -1, -np.inf
        ids[row, at], logprobs[row, at] = found.T, logs.T
    return ids, logprobs, tail_logprob


def _spread(values: NDArray[Any], there: NDArray[np.bool_]) -> NDArray[Any]:
    """Lay a row's values [width], rank after rank, out over the ranks and positions that have one, [E, P]."""
    if there.all():
        return values[: there.size].reshape(there.shape).copy()
    spread = np.zeros(there.shape, values.dtype)
    spread[there] = values[: np.count_nonzero(there)]
    return spread


def _to_levels(logprobs: NDArray[np.float32], samples: int) -> NDArray[np.int64]:
    """Levels [P, E] of counts, from log(count / samples)."""
    counts = np.rint(np.exp(logprobs) * samples).astype(np.int64)
    assert (counts.sum(axis=1) == samples).all(), "a position's counts must sum to the number of samples"
    levels: NDArray[np.int64] = counts.max(axis=1, keepdims=True) - counts
    return levels


def _from_levels(levels: NDArray[np.float32], there: NDArray[np.bool_], samples: int) -> NDArray[np.float32]:
    """log(count / samples) [E, P] from levels: the count of the best entry makes the sum right."""
    best = (samples + (levels * there).sum(axis=0)) / there.sum(axis=0)
    counts = best.astype(np.float32) - levels
    if (best != np.rint(best)).any() or counts.min(initial=1) < 1:
        raise ValueError(f"the counts of a position do not sum to {samples}")
    logs: NDArray[np.float32] = np.log(counts / np.float32(samples))
    return logs


def _to_grid(
    logprobs: NDArray[np.float32], tail: NDArray[np.float32], present: NDArray[np.bool_], step: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Levels [P, E] of log-probabilities [P, E], and the tail as it is stored [P]."""
    values = np.concatenate([np.where(present, logprobs, -np.inf), tail[:, None]], axis=1)
    steps = np.maximum((values - values.max(axis=1, keepdims=True)) / np.float32(step), -FURTHEST)
    levels = -np.rint(steps + _shifts(steps, step)[:, None]).astype(np.int64)
    levels, tail_levels = levels[:, :-1], levels[:, -1]
    best = np.where(present, levels, FURTHEST).min(axis=1)
    last = np.where(present, levels, -FURTHEST).max(axis=1)
    return levels - best[:, None], np.where(np.isneginf(tail), 0, TAIL_AT_LAST + tail_levels - last)


def _shifts(steps: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """How far each position is to be shifted before it is rounded, [P], 0 to 1 step.

    The decoder normalises: all of a position's errors move by their mean, weighted with the probabilities,
    so that the most likely entries come back nearly exact and the rest may be off by more than half a step.
    Unless that mean is zero, which the right shift makes it: the mean rises with the shift, one to one, and
    jumps down where an entry rounds to another level. It is periodic, its own mean over a period is zero, so
    it rises through zero somewhere.

    Parameters
    ----------
    steps
        [P, E + 1]; log-probabilities and tail, in steps from the position's largest.
    """
    exact = _log_sum(steps, step)

    def moved(positions: NDArray[np.intp], shifts: NDArray[np.float32]) -> NDArray[np.float32]:
        rounded = np.rint(steps[positions] + shifts[:, None])
        return shifts - (_log_sum(rounded, step) - exact[positions])

    shifts = np.zeros(len(steps), np.float32)
    left = np.arange(len(steps))
    for _ in range(2):  # Newton's method settles three positions out of four
        means = moved(left, shifts[left])
        left, means = left[np.abs(means) > OFF], means[np.abs(means) > OFF]
        shifts[left] -= means
    grid = np.arange(SCANNED + 1, dtype=np.float32) / SCANNED
    scanned = np.stack([moved(left, np.full(left.size, shift)) for shift in grid])
    low = grid[((scanned[:-1] < 0) & (scanned[1:] >= 0)).argmax(axis=0)]
    width = np.float32(1 / SCANNED)
    for _ in range(HALVINGS):
        width /= 2
        low += width * (moved(left, low + width) < 0)
    shifts[left] = low + width / 2
    return shifts


def _log_sum(steps: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """log of the sum of exp over the last axis, in steps in and out."""
    total = np.exp(steps * np.float32(step)).sum(axis=-1, dtype=np.float32)
    return np.log(total) / np.float32(step)


def _from_grid(
    levels: NDArray[np.float32], there: NDArray[np.bool_], tail: NDArray[np.uint16], step: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log-probabilities [E, P] and of the tail [P], which together sum to 1."""
    logs = levels * np.float32(-step)
    tail_levels = levels[-1] + (tail.astype(np.float32) - TAIL_AT_LAST)
    tail_logs = np.where(tail > 0, tail_levels * np.float32(-step), np.float32(-np.inf))
    masses = np.exp(logs)
    if not there.all():
        masses *= there
    total = np.logaddexp(np.log(masses.sum(axis=0)), tail_logs)
    return logs - total, tail_logs - total
