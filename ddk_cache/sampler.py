"""The rows that an interval trains on: a pure function of sizes, shares, seed and state.

Algorithm 1 of DDK (arXiv 2407.16154) draws a new set of rows D_t for every interval t, according to the
factor r. N is the number of domains. The order is global: each process of a distributed run draws all rows
and takes its part, so that the draws do not depend on the number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class SamplerState:
    """The number of rows drawn from each domain, and of intervals; a checkpoint stores it.

    A domain's rows form an endless sequence of shuffled passes. ``drawn[i]`` is the position in that of
    domain i: a domain that is used up starts over with a new shuffle (cyclic, as in the paper).
    """

    drawn: tuple[int, ...]
    interval: int = 0


def natural_share(rows: Sequence[int]) -> Float64:
    """Return each domain's share of all rows, float64 [N]: the first interval of Algorithm 1 draws by it."""
    sizes = np.asarray(rows, np.float64)
    return np.asarray(sizes / sizes.sum())


@dataclass(frozen=True)
class RowSampler:
    """Draws the rows of a run's intervals.

    Parameters
    ----------
    rows
        Number of rows of each domain's train split, [N]; a domain without rows needs the share 0.
    seed
        The run's seed.
    limit
        Number of rows that each domain may give in the whole run, float64 [N], whole or inf; None is inf for
        all. They are spread over the run: in no interval does a domain give more than its part of what its
        limit leaves. The other domains give what it cannot.
    total
        Number of rows of the whole run; needed with ``limit``.
    """

    rows: Sequence[int]
    seed: int
    limit: Float64 | None = None
    total: int = 0

    def draw(self, state: SamplerState, share: Float64, count: int) -> tuple[Int64, Int64, SamplerState]:
        """Draw the rows of the next interval, shuffled.

        A domain gives floor or ceil of ``count * share`` rows, and ``count * share`` on average: systematic
        sampling with one random offset, which has the least variance that unbiased integers can have.

        Parameters
        ----------
        state
            The state after the last interval.
        share
            Probability of each domain, float64 [N], with sum 1.
        count
            Number of rows to draw.

        Returns
        -------
        domain
            int64 [count], the index of each row's domain.
        row
            int64 [count], the index of each row in its domain's train split.
        state
            The state for the next interval.
        """
        random = np.random.default_rng((self.seed, 0, state.interval))
        most = np.full(len(self.rows), np.inf)
        if self.limit is not None:
            most = np.ceil((self.limit - state.drawn) * count / (self.total - sum(state.drawn)))
        counts = row_counts(share, most, count, random.random())
        domain = np.repeat(np.arange(len(self.rows)), counts)
        row = np.concatenate(
            [self._take(index, state.drawn[index], int(size)) for index, size in enumerate(counts)]
        )
        order = random.permutation(count)
        drawn = tuple(int(before + size) for before, size in zip(state.drawn, counts, strict=True))
        return domain[order], row[order], SamplerState(drawn, state.interval + 1)

    def _take(self, domain: int, start: int, size: int) -> Int64:
        """Return rows ``start`` to ``start + size`` of a domain's sequence of passes, int64 [size]."""
        if not size:  # perhaps of a domain without rows
            return np.empty(0, np.int64)
        rows, end = self.rows[domain], start + size
        parts: list[Int64] = []
        for epoch in range(start // rows, -(-end // rows)):
            order = np.random.default_rng((self.seed, 1, domain, epoch)).permutation(rows)
            parts.append(order[max(start - epoch * rows, 0) : end - epoch * rows])
        return np.concatenate(parts)


def row_counts(share: Float64, most: Float64, count: int, offset: float) -> Int64:
    """Divide ``count`` rows among the domains by systematic sampling: int64 [N], with sum ``count``.

    ``share`` [N] are probabilities with sum 1; ``most`` [N] are the rows that each domain can give at most,
    whole or inf, at least ``count`` in total; ``offset``, from 0 to 1, decides which counts are rounded up.
    """
    counts, rest = np.zeros(len(share), np.int64), count
    is_empty = np.zeros(len(share), np.bool_)
    # A domain asked for more than it can give gives that, and the others give more. A millionth of a row
    # covers the rounding of sums.
    while (full := (share > 0) & (share * rest > most - 1e-6)).any():
        counts[full] = most[full]
        rest = count - int(counts.sum())
        is_empty |= full
        share = np.where(is_empty, 0.0, share)
        if not share.any():  # a factor can underflow to 0
            share = np.where(is_empty, 0.0, 1.0)
        share = share / (share.sum() or 1.0)
    assert not rest or share.any(), "the domains give fewer rows than are drawn"
    bounds = np.concatenate([[0.0], np.cumsum(share)]) * rest
    bounds[-1] = rest
    return counts + np.diff(np.floor(bounds + offset).astype(np.int64))
