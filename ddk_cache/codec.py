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
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.codebook import Codebook, fit
from ddk_cache.layout import RowArray, Target

__all__ = ["Codebook", "decode", "encode", "fit", "row_arrays"]

FURTHEST = 32_000  # levels below the best entry, over 900 nats: whatever is less likely counts as that
TAIL_AT_LAST = 1 << 15  # stored where the tail is as likely as the last entry; 0 where there is none
TAIL_ABOVE = 700  # levels, over 20 nats: a tail lies above the best entry by that at most
OFFSETS = 64  # places of the grid, parts of a step apart, that are tried for each position
GAPS_A_PAGE = 8192  # the first ranks' are large, then they get smaller: 2 bytes a token less at k = 64

Arrays = dict[str, NDArray[Any]]

# Until a block as large as this has come and gone once, glibc hands memory that is freed back to the system
# and takes it anew, page by page: 0.7 ms for every row, as much as decoding it takes.
np.empty(1 << 24, np.uint8)


def row_arrays(target: Target, seq_length: int) -> dict[str, RowArray]:
    """The arrays of one row, by name; none of a ``label`` target."""
    if target.kind == "label":
        return {}
    entries = seq_length * target.width
    arrays = {
        "entries": RowArray("uint16", seq_length, "pcodec"),
        "rankings": RowArray("uint16", seq_length, "pcodec"),
        "gaps": RowArray("uint16", entries, "pcodec", page=GAPS_A_PAGE),
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
    """Turn targets into integers; what a row becomes depends on that row and the codebook alone.

    ``sampled`` is kept exactly. ``topk``: given that entries and tail sum to 1, an entry's log-probability
    moves by a half and a 64th of the grid's step at most, so by less than 0.02 nat; an entry that is less
    likely than the best one by more than FURTHEST comes back as that.

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
        present, logs = present[at], logprobs[row, at]
        if target.kind == "topk":
            levels, arrays["tail"][row, at] = _to_grid(logs, present, tail_logprob[row, at], codebook.step)
        else:
            levels = _to_levels(logs, target.samples)
        arrays["rankings"][row, at], codes = codebook.encode(ids[row, at], present)
        arrays["entries"][row, at] = entries = np.count_nonzero(present, axis=1)
        # Best first, then by code, absent entries last; transposed to [E, P], where a rank is a line.
        key = np.where(present, levels.astype(np.int64) << 32 | codes, np.iinfo(np.int64).max)
        key = np.sort(key, axis=1).T
        gaps = np.diff((key >> 32).astype(np.int32, order="C"), axis=0)
        codes = key.astype(np.uint32, order="C")
        codes[1:] -= codes[:-1] * (gaps == 0)
        there = np.arange(target.width)[:, None] < entries
        arrays["gaps"][row, : entries.sum() - at.size] = gaps[there[1:]]
        arrays["codes"][row, : entries.sum()] = codes[there]
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
        # [E, P]; None where nothing is absent, as nearly always with a top_p of 1: that halves the time.
        there = None if (entries == E).all() else np.arange(E, dtype=np.uint16)[:, None] < entries
        gaps = _spread(arrays["gaps"][row], (E - 1, at.size), None if there is None else there[1:])
        codes = _spread(arrays["codes"][row], (E, at.size), there)
        levels = np.zeros(codes.shape, np.float32)
        levels[1:] = gaps
        tied = (gaps == 0).astype(np.uint32)
        for above, level in pairwise(levels):
            level += above
        for (above, code), tie in zip(pairwise(codes), tied, strict=True):
            code += above * tie
        found = codebook.ids(codes, arrays["rankings"][row, at])
        if target.kind == "topk":
            logs, tail_logprob[row, at] = _from_grid(levels, there, arrays["tail"][row, at], codebook.step)
        else:
            logs = _from_levels(levels, there, entries, target.samples)
        if there is not None:
            found[~there], logs[~there] = -1, -np.inf
        ids[row, at], logprobs[row, at] = found.T, logs.T
        _refuse_repeats(ids[row, at])
    return ids, logprobs, tail_logprob


def _refuse_repeats(ids: NDArray[np.int32]) -> None:
    """Raise ValueError where a position has an id twice: its mass would count twice; [P, E], -1 is none."""
    ascending = np.sort(ids, axis=1)
    if ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any():
        raise ValueError("a position has an id twice")


def _spread(values: NDArray[Any], shape: tuple[int, int], there: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Lay a row's values [width] out over the ranks and positions that have one, line by line."""
    if there is None:
        return values[: shape[0] * shape[1]].reshape(shape).copy()
    spread = np.zeros(shape, values.dtype)
    spread[there] = values[: np.count_nonzero(there)]
    return spread


def _to_levels(logprobs: NDArray[np.float32], samples: int) -> NDArray[np.int32]:
    """Levels [P, E] of counts, from log(count / samples)."""
    counts = np.rint(np.exp(logprobs) * samples).astype(np.int32)
    assert (counts.sum(axis=1) == samples).all(), "a position's counts must sum to the number of samples"
    levels: NDArray[np.int32] = counts.max(axis=1, keepdims=True) - counts
    return levels


def _from_levels(
    levels: NDArray[np.float32], there: NDArray[np.bool_] | None, entries: NDArray[np.uint16], samples: int
) -> NDArray[np.float32]:
    """log(count / samples) [E, P] from levels: the best entry's count is what makes the sum right."""
    best = (samples + (levels if there is None else levels * there).sum(axis=0)) / entries
    counts = best.astype(np.float32) - levels
    if (best != np.rint(best)).any() or counts.min(initial=1) < 1:
        raise ValueError(f"the counts of a position do not sum to {samples}")
    logprobs: NDArray[np.float32] = np.log(counts / np.float32(samples))
    return logprobs


def _to_grid(
    logprobs: NDArray[np.float32], present: NDArray[np.bool_], tail: NDArray[np.float32], step: float
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Round to a grid whose masses sum to 1.

    The decoder divides by the masses' sum, which moves a position's entries together. So the grid is put
    where that changes least. Of OFFSETS places there is always one where it is within 1 / OFFSETS steps:
    moving the grid by a full step brings the same sum again; on the way the sum is 1 on average (but for
    step^2 / 24), and its log falls by 1 / OFFSETS steps at most from one place to the next, though it may
    rise by more.

    Parameters
    ----------
    logprobs, present, tail
        [P, E], [P, E] and [P]; nats.

    Returns
    -------
    Levels [P, E], 0 for a position's best entry; the tails as they are stored [P].
    """
    logs = np.concatenate([np.where(present, logprobs, -np.inf), tail[:, None]], axis=1)
    best = logs[:, :-1].max(axis=1, keepdims=True)
    steps = np.clip((logs - best) / np.float32(step), -FURTHEST, TAIL_ABOVE)
    down = np.floor(steps)
    # At place j, j / OFFSETS steps further up, an entry rounds up from j = first on.
    first = OFFSETS - ((steps - down) * OFFSETS).astype(np.int32)
    masses = np.exp(down * np.float32(step))
    cells = first + np.arange(len(first), dtype=np.int32)[:, None] * (OFFSETS + 1)
    risen = np.bincount(cells.ravel(), masses.ravel(), minlength=len(first) * (OFFSETS + 1))
    sums = masses.sum(axis=1, keepdims=True) + np.expm1(step) * risen.reshape(-1, OFFSETS + 1).cumsum(axis=1)
    moved = np.exp(-step * (np.arange(OFFSETS) / OFFSETS - 0.5))
    place = np.abs(sums[:, :-1] * np.exp(best) * moved - 1).argmin(axis=1)[:, None]
    levels = -(down.astype(np.int32) + (first <= place))
    entries, tails = levels[:, :-1], levels[:, -1]
    nearest = entries.min(axis=1, keepdims=True)  # absent ones are FURTHEST away
    furthest = np.where(present, entries, -FURTHEST).max(axis=1)
    return entries - nearest, np.where(tail > -np.inf, TAIL_AT_LAST + tails - furthest, 0)


def _from_grid(
    levels: NDArray[np.float32], there: NDArray[np.bool_] | None, tail: NDArray[np.uint16], step: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log-probabilities [E, P] and of the tail [P], which together sum to 1."""
    tail_levels = levels[-1] + (tail.astype(np.float32) - TAIL_AT_LAST)
    if levels[-1].max(initial=0) > FURTHEST + 1 or tail_levels[tail > 0].min(initial=0) < -TAIL_ABOVE - 1:
        raise ValueError("a level is out of range")
    logs = levels * np.float32(-step)
    tail_logs = np.where(tail > 0, tail_levels * np.float32(-step), np.float32(-np.inf))
    masses = np.exp(logs)
    if there is not None:
        masses *= there
    total = np.log(masses.sum(axis=0) + np.exp(tail_logs))
    logs -= total
    return logs, tail_logs - total
