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
    state: SamplerState, share: NDArray[np.float64], rows: Sequence[int], count: int, seed: int
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
    bounds = np.concatenate([[0.0], np.cumsum(share)]) * count
    bounds[-1] = count
    sizes = np.diff(np.floor(bounds + random.random()).astype(np.int64))
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


def _take(domain: int, start: int, size: int, rows: int, seed: int) -> Int64:
    """``size`` rows from place ``start`` on of the domain's endless sequence of shuffled passes."""
    parts = [np.empty(0, np.int64)]
    end = start + size
    for epoch in range(start // rows, -(-end // rows)):
        order = np.random.default_rng((seed, 1, domain, epoch)).permutation(rows)
        parts.append(order[max(start - epoch * rows, 0) : end - epoch * rows])
    return np.concatenate(parts)
