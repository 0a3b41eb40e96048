"""Which rows an interval trains on: a pure function of sizes, shares, seed and state.

The order is global. A process of a distributed run draws the whole of it and takes its own part, so the
draws do not depend on how many processes there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class SamplerState:
    """Where every domain stands, and how many intervals were drawn.

    ``drawn[i]`` counts the rows taken from domain i since the start; the row at that place of the domain's
    endless sequence of shuffled passes comes next, so a domain that runs out starts over (cyclic).
    """

    drawn: tuple[int, ...]
    interval: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"drawn": list(self.drawn), "interval": self.interval}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SamplerState":
        return cls(tuple(int(count) for count in data["drawn"]), int(data["interval"]))


def natural_share(rows: Sequence[int]) -> NDArray[np.float64]:
    """Each domain's share of all rows, [N]: what a plain random sample of the corpus draws."""
    sizes = np.asarray(rows, np.float64)
    return np.asarray(sizes / sizes.sum())


def draw(
    state: SamplerState,
    share: NDArray[np.float64],
    rows: Sequence[int],
    count: int,
    seed: int,
    most: NDArray[np.float64] | None = None,
) -> tuple[Int64, Int64, SamplerState]:
    """Draw the next interval's rows, shuffled.

    Parameters
    ----------
    state
        Where the draws before this one ended.
    share
        Probability of each domain, [N], summing to 1.
    rows
        Rows of each domain's train split, [N], all at least 1.
    count
        Rows to draw.
    seed
        The run's seed.
    most
        Rows that each domain may give since the start, [N], whole numbers or inf; None is inf for all. What
        a domain cannot give is shared out to the others.

    Returns
    -------
    domain, row
        int64 [count]: the domain's number and the row's number in it.
    state
        To be handed to the next draw.

    A domain's number of rows is floor or ceil of ``count * share``, right on average (systematic sampling
    with one random offset): the least variance that unbiased whole numbers can have.
    """
    random = np.random.default_rng((seed, 0, state.interval))
    left = np.full(len(rows), np.inf) if most is None else most - state.drawn
    sizes = row_counts(share, left, count, random.random())
    domain = np.repeat(np.arange(len(rows)), sizes)
    row = np.concatenate(
        [
            _take(number, state.drawn[number], int(size), rows[number], seed)
            for number, size in enumerate(sizes)
        ]
    )
    order = random.permutation(count)
    drawn = tuple(int(before + size) for before, size in zip(state.drawn, sizes, strict=True))
    return domain[order], row[order], SamplerState(drawn, state.interval + 1)


def row_counts(share: NDArray[np.float64], left: NDArray[np.float64], count: int, offset: float) -> Int64:
    """How many of ``count`` rows each domain gives, [N], by its share, [N], if it has as many left, [N].

    ``offset``, 0 to 1, decides what is rounded up.
    """
    sizes, rest = np.zeros(len(share), np.int64), count
    is_empty = np.zeros(len(share), np.bool_)
    # Whoever is asked for all that is left gives it, and the others are asked for more. A millionth of a row
    # covers the rounding of sums.
    while (full := (share > 0) & (share * rest > left - 1e-6)).any():
        sizes[full] = left[full]
        rest = count - int(sizes.sum())
        is_empty |= full
        share = np.where(is_empty, 0.0, share)
        if not share.any():  # a factor can be so small that it is 0
            share = np.where(is_empty, 0.0, 1.0)
        share = share / (share.sum() or 1.0)
    assert not rest or share.any(), "there are not so many rows left"
    bounds = np.concatenate([[0.0], np.cumsum(share)]) * rest
    bounds[-1] = rest
    return sizes + np.diff(np.floor(bounds + offset).astype(np.int64))


def _take(domain: int, start: int, size: int, rows: int, seed: int) -> Int64:
    """``size`` rows from place ``start`` on of the domain's endless sequence of shuffled passes."""
    parts = [np.empty(0, np.int64)]
    end = start + size
    for epoch in range(start // rows, -(-end // rows)):
        order = np.random.default_rng((seed, 1, domain, epoch)).permutation(rows)
        parts.append(order[max(start - epoch * rows, 0) : end - epoch * rows])
    return np.concatenate(parts)
