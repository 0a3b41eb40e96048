"""Sparse targets <-> the integers that a cache stores. Pure numpy; docs/format.md describes them for readers.

An entry's level is its distance from the position's best entry: in steps of a grid of log-probabilities
(``topk``) or in draws (``sampled``). Only levels are stored. Entries and tail sum to 1, which gives the rest
back. Entries of equal level may come in any order, so they are sorted by the codes of their ids, and the
differences of the codes are stored. A row of S token positions becomes

``entries``   [S]    number of entries of each position
``rankings``  [S]    index of the codebook's ranking that codes the position's ids
``tail``      [S]    level of the mass outside the entries, counted from the last entry's (``topk`` only)
``gaps``      [S E]  from each entry's level to the next one's
``codes``     [S E]  the ids

``gaps`` and ``codes`` hold the first value of every position, then the second of every position, and so on;
zeros follow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ddk_cache.format.codebook import Codebook
from ddk_cache.format.layout import RowArray, Target

FURTHEST = 32_000  # levels below the best entry, over 900 nats; less likely entries are stored at this level
TAIL_AT_LAST = 1 << 15  # stored where the tail is as likely as the last entry; 0 where there is no tail
TAIL_ABOVE = 700  # levels, over 20 nats; a tail is at most this far above the best entry
SHIFTS = 64  # shifts of the grid, 1/64 of a step apart, that are tried for each position
GAPS_A_PAGE = 8192  # the first ranks have larger gaps than later ones: 2 bytes a token less at k = 64

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Targets:
    """The teacher's sparse targets at M token positions: from engine to codec, and from codec to loss."""

    ids: NDArray[np.int32]
    """[M, E]; -1 where an entry is absent. Decoded entries come best first."""
    logprobs: NDArray[np.float32]
    """[M, E]; nats, of the target at its temperature; -inf where an entry is absent."""
    tail_logprob: NDArray[np.float32]
    """[M]; nats, log of the mass outside the entries; -inf where none is left."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, positions: slice | NDArray[Any]) -> Self:
        return type(self)(*(values[positions] for values in vars(self).values()))

    @classmethod
    def absent(cls, count: int, width: int) -> "Targets":
        """Return targets without any mass at ``count`` positions."""
        logprobs = np.full((count, width), -np.inf, np.float32)
        return Targets(np.full((count, width), -1, np.int32), logprobs, np.full(count, -np.inf, np.float32))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_]) -> "Targets":
        """Take the targets at the True positions of mask [n, S] from arrays [n, S, E] and [n, S] by name."""
        return Targets(arrays["ids"][mask], arrays["logprobs"][mask], arrays["tail_logprob"][mask])

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join parts, at least one, in their order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))


@cache
def _keep_freed_memory() -> None:
    """Make glibc reuse freed blocks instead of returning them to the system: reading takes 5% less time.

    It does so for blocks up to the size of the largest that was freed.
    """
    np.empty(1 << 24, np.uint8)


def row_arrays(target: Target, seq_length: int) -> dict[str, RowArray]:
    """Return the arrays of one row by name; none for a ``label`` target."""
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


def encode(targets: Targets, loss_mask: NDArray[np.bool_], codebook: Codebook, target: Target) -> Arrays:
    """Encode targets as integers; a row's integers depend on that row and the codebook alone.

    ``sampled`` is lossless. ``topk``: given that entries and tail sum to 1, an entry's log-probability moves
    by at most a half and a 64th of the grid's step, less than 0.02 nat. An entry further than FURTHEST levels
    below the best one is stored as exactly that far.

    Parameters
    ----------
    targets
        At the M positions where ``loss_mask`` is True, row after row. Entries come in any order, each id
        once.
    loss_mask
        [n, S].

    Returns
    -------
    The arrays of ``row_arrays``, [n, width] each.
    """
    _keep_freed_memory()
    n, seq_length = loss_mask.shape
    shapes = row_arrays(target, seq_length)
    arrays: Arrays = {name: np.zeros((n, array.width), array.dtype) for name, array in shapes.items()}
    for row, span in enumerate(row_spans(loss_mask)):
        part, positions = targets[span], np.flatnonzero(loss_mask[row])
        present = (part.ids >= 0) & (part.logprobs > -np.inf)
        has_entries = np.asarray(present.any(axis=1))
        if not has_entries.all():
            part, positions, present = part[has_entries], positions[has_entries], present[has_entries]
        if target.kind == "topk":
            levels, arrays["tail"][row, positions] = _to_grid(part, present, codebook.step)
        else:
            levels = _to_levels(part.logprobs, target.samples)
        arrays["rankings"][row, positions], codes = codebook.encode(part.ids, present)
        arrays["entries"][row, positions] = entries = np.count_nonzero(present, axis=1)
        # Best first, then by code, absent entries last; transposed to [E, P], where a rank is a line.
        key = np.where(present, levels.astype(np.int64) << 32 | codes, np.iinfo(np.int64).max)
        key = np.sort(key, axis=1).T
        gaps = np.diff((key >> 32).astype(np.int32, order="C"), axis=0)
        codes = key.astype(np.uint32, order="C")
        codes[1:] -= codes[:-1] * (gaps == 0)
        present = np.arange(target.width)[:, None] < entries
        arrays["gaps"][row, : entries.sum() - positions.size] = gaps[present[1:]]
        arrays["codes"][row, : entries.sum()] = codes[present]
    return arrays


def decode(arrays: Mapping[str, NDArray[Any]], codebook: Codebook, target: Target) -> Targets:
    """Decode the arrays of ``encode``, [n, width] each; raise ValueError for integers that it cannot make.

    Return targets at the positions that have entries, row after row. Entries come best first; entries and
    tail sum to 1.
    """
    _keep_freed_memory()
    width, has_entries = target.width, arrays["entries"] > 0
    if arrays["entries"].max(initial=0) > width:
        raise ValueError(f"a position has {arrays['entries'].max()} entries, more than {width}")
    count = np.count_nonzero(has_entries)
    ids, logprobs = np.empty((count, width), np.int32), np.empty((count, width), np.float32)
    tail_logprob = np.full(count, -np.inf, np.float32)
    for row, span in enumerate(row_spans(has_entries)):
        positions = np.flatnonzero(has_entries[row])
        entries = arrays["entries"][row, positions]
        # [E, P]; None where no entry is absent, as nearly always with a top_p of 1: that halves the time.
        present = None if (entries == width).all() else np.arange(width, dtype=np.uint16)[:, None] < entries
        lower = None if present is None else present[1:]
        gaps = _by_rank(arrays["gaps"][row], (width - 1, len(entries)), lower)
        codes = _by_rank(arrays["codes"][row], (width, len(entries)), present)
        levels = np.zeros(codes.shape, np.float32)
        levels[1:] = gaps
        ties = (gaps == 0).astype(np.uint32)
        for above, level in pairwise(levels):
            level += above
        for (above, code), tie in zip(pairwise(codes), ties, strict=True):
            code += above * tie
        row_ids = codebook.ids(codes, arrays["rankings"][row, positions])
        if target.kind == "topk":
            tail = arrays["tail"][row, positions]
            row_logprobs, tail_logprob[span] = _from_grid(levels, present, tail, codebook.step)
        else:
            row_logprobs = _from_levels(levels, present, entries, target.samples)
        if present is not None:
            row_ids[~present], row_logprobs[~present] = -1, -np.inf
        ids[span], logprobs[span] = row_ids.T, row_logprobs.T
        ascending = np.sort(ids[span], axis=1)
        if ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any():
            raise ValueError("a position has an id twice")
    return Targets(ids, logprobs, tail_logprob)


def row_spans(mask: NDArray[np.bool_]) -> Iterator[slice]:
    """Yield where the True positions of each row of mask [n, S] are among all True positions."""
    ends = np.count_nonzero(mask, axis=1).cumsum().tolist()
    return (slice(start, end) for start, end in pairwise([0, *ends]))


def _by_rank(values: NDArray[Any], shape: tuple[int, int], present: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Lay a row's values [width] out as [ranks, P], with 0 where no entry is present."""
    if present is None:
        return values[: shape[0] * shape[1]].reshape(shape).copy()
    laid_out = np.zeros(shape, values.dtype)
    laid_out[present] = values[: np.count_nonzero(present)]
    return laid_out


def _to_levels(logprobs: NDArray[np.float32], samples: int) -> NDArray[np.int32]:
    """Return levels [P, E] of counts, from log(count / samples)."""
    counts = np.rint(np.exp(logprobs) * samples).astype(np.int32)
    assert (counts.sum(axis=1) == samples).all(), "a position's counts must sum to the number of samples"
    levels: NDArray[np.int32] = counts.max(axis=1, keepdims=True) - counts
    return levels


def _from_levels(
    levels: NDArray[np.float32], present: NDArray[np.bool_] | None, entries: NDArray[np.uint16], samples: int
) -> NDArray[np.float32]:
    """Return log(count / samples) [E, P] from levels: the best entry's count makes the sum right."""
    best = (samples + (levels if present is None else levels * present).sum(axis=0)) / entries
    counts = best.astype(np.float32) - levels
    if (best != np.rint(best)).any() or counts.min(initial=1) < 1:
        raise ValueError(f"the counts of a position do not sum to {samples}")
    logprobs: NDArray[np.float32] = np.log(counts / np.float32(samples))
    return logprobs


def _to_grid(
    targets: Targets, present: NDArray[np.bool_], step: float
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Round log-probabilities [P, E] to a grid on which the masses sum to 1.

    Return levels [P, E], 0 for a position's best entry, and the tails as they are stored, [P].
    """
    logprobs = np.where(present, targets.logprobs, -np.inf)
    outcomes = np.concatenate([logprobs, targets.tail_logprob[:, None]], axis=1)
    best = logprobs.max(axis=1, keepdims=True)
    steps = np.clip((outcomes - best) / np.float32(step), -FURTHEST, TAIL_ABOVE)
    down = np.floor(steps)
    # Moved up by j / SHIFTS steps, an outcome reaches the next level from j = rises_at on.
    rises_at = SHIFTS - ((steps - down) * SHIFTS).astype(np.int32)
    shift = _best_shift(np.exp(down * np.float32(step)), rises_at, best, step)
    levels = -(down.astype(np.int32) + (rises_at <= shift))
    entries, tails = levels[:, :-1], levels[:, -1]
    nearest = entries.min(axis=1, keepdims=True)  # absent ones are FURTHEST away
    furthest = np.where(present, entries, -FURTHEST).max(axis=1)
    has_tail = targets.tail_logprob > -np.inf
    return entries - nearest, np.where(has_tail, TAIL_AT_LAST + tails - furthest, 0)


def _best_shift(
    masses: NDArray[np.floating], rises_at: NDArray[np.int32], best: NDArray[np.float32], step: float
) -> NDArray[np.intp]:
    """Choose the shift of each position's grid [P, 1] for which the rounded masses sum closest to 1.

    The decoder divides by the masses' sum, which moves a position's entries together. One of the SHIFTS is
    always within 1 / SHIFTS steps: a shift by a full step has the same sum again. Between, the sum is 1 on
    average (but for step^2 / 24), and its log falls by at most 1 / SHIFTS steps from one shift to the next,
    though it may rise by more.

    Parameters
    ----------
    masses, rises_at
        [P, E + 1]; masses rounded down, relative to the best entry's; the shift from which each rounds up.
    best
        [P, 1]; nats, the best entry's log-probability.
    """
    cells = rises_at + np.arange(len(masses), dtype=np.int32)[:, None] * (SHIFTS + 1)
    rising = np.bincount(cells.ravel(), masses.ravel(), minlength=len(masses) * (SHIFTS + 1))
    risen = rising.reshape(-1, SHIFTS + 1).cumsum(axis=1)
    sums = masses.sum(axis=1, keepdims=True) + np.expm1(step) * risen
    moved = np.exp(-step * (np.arange(SHIFTS) / SHIFTS - 0.5))
    shift: NDArray[np.intp] = np.abs(sums[:, :-1] * np.exp(best) * moved - 1).argmin(axis=1)[:, None]
    return shift


def _from_grid(
    levels: NDArray[np.float32], present: NDArray[np.bool_] | None, tail: NDArray[np.uint16], step: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return log-probabilities [E, P] and the tail's [P], which together sum to 1."""
    tail_levels = levels[-1] + (tail.astype(np.float32) - TAIL_AT_LAST)
    if levels[-1].max(initial=0) > FURTHEST + 1 or tail_levels[tail > 0].min(initial=0) < -TAIL_ABOVE - 1:
        raise ValueError("a level is out of range")
    logprobs = levels * np.float32(-step)
    tail_logprob = np.where(tail > 0, tail_levels * np.float32(-step), np.float32(-np.inf))
    masses = np.exp(logprobs)
    if present is not None:
        masses *= present
    total = np.log(masses.sum(axis=0) + np.exp(tail_logprob))
    logprobs -= total
    return logprobs, tail_logprob - total
