"""The codec's codebook: the grid of log-probabilities, and rankings of the vocabulary.

The candidates of one position are not a random draw from the vocabulary: digits follow a digit, nouns follow
"the". A sample of the teacher's answers is therefore clustered, each cluster with its ranking; a position
stores the index of the ranking in which its candidates come first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ddk_cache.format.layout import Target

# Steps of the grid, in nats. An error is at most half a step and a 64th (codec.py), and may be 0.02.
# A bfloat16 head puts logits on a grid of 1/8 or 1/16, which 1/32 divides: fewer distinct gaps, no error.
STEPS = (0.0385, 1 / 32)
RANKED = 2048  # ids in a ranking; other ids are coded by their rank in the common ranking
MOST_RANKINGS = 128
POSITIONS_A_RANKING = 128  # of the sample, at least
CLUSTERED = 1 << 15  # the commonest ids; only these tell clusters apart
PRIOR = 1000  # entries of the common frequencies that each cluster's counts start from
ROUNDS = 4  # of refinement after each doubling of the clusters
BLOCK = 512  # positions scored at a time: the scores fit into the processor's cache
SCORED = 64  # the first entries of a position, which choose its ranking


@dataclass(frozen=True, eq=False)
class Codebook:
    """Rankings of the vocabulary and the grid's step.

    Raises ValueError for arrays that ``fit_codebook`` cannot return.
    """

    step: float
    """Of the grid of log-probabilities, in nats; unused for ``sampled`` targets."""
    common: NDArray[np.int32]
    """[V]; every id, the teacher's commonest candidate first."""
    rankings: NDArray[np.int32]
    """[C, M]; the likeliest ids of each cluster, best first."""

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step must be above 0 and at most 1 nat, not {self.step}")
        if self.common.dtype != np.int32 or self.common.ndim != 1:
            raise ValueError("common must be int32 of shape [V]")
        if not np.array_equal(np.sort(self.common), np.arange(self.common.size)):
            raise ValueError("common must hold every id once")
        if self.rankings.dtype != np.int32 or self.rankings.ndim != 2 or not self.rankings.size:
            raise ValueError("rankings must be int32 of shape [C, M]")
        if self.rankings.shape[0] > MOST_RANKINGS or self.rankings.shape[1] > RANKED:
            raise ValueError(f"rankings must be at most {MOST_RANKINGS} of {RANKED:,} ids")
        ascending = np.sort(self.rankings, axis=1)
        if ascending.min() < 0 or ascending.max() >= self.common.size or not np.diff(ascending).all():
            raise ValueError("rankings must hold ids of the vocabulary, each once")
        if np.unique(self.rankings).size > CLUSTERED:
            raise ValueError(f"rankings must hold at most {CLUSTERED:,} ids in all")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that a cache stores, by name."""
        step = np.array([self.step], np.float32)
        return {"step": step, "common": self.common, "rankings": self.rankings}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Make a codebook from the result of ``arrays``; raise ValueError for others."""
        if set(arrays) != {"step", "common", "rankings"} or arrays["step"].shape != (1,):
            raise ValueError("the tables must be step [1], common and rankings")
        return cls(float(arrays["step"][0]), arrays["common"], arrays["rankings"])

    def ids(self, codes: NDArray[np.uint32], ranking: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the ids [E, P] of codes [E, P] under the positions' rankings [P].

        Raises ValueError if a code or a ranking is out of range.
        """
        C, M = self.rankings.shape
        if ranking.max(initial=0) >= C or codes.max(initial=0) >= M + self.common.size:
            raise ValueError("a code or a ranking is out of range")
        # Indices into the rankings one after another, then into the common one.
        first = ranking * np.uint32(M)
        index = codes + first + (codes >= M) * (np.uint32((C - 1) * M) - first)
        ids: NDArray[np.int32] = np.take(self._flat, index)
        return ids

    def encode(
        self, ids: NDArray[np.int32], present: NDArray[np.bool_]
    ) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Choose each position's ranking, and code its ids; return the rankings [P] and the codes [P, E].

        ``ids`` and ``present`` are [P, E]; an id that is not present gets an arbitrary code.
        """
        rows = np.where(present, np.take(self._row, ids, mode="clip"), 0)
        ranking = np.empty(len(ids), np.uint16)
        for start in range(0, len(ids), BLOCK):
            block = slice(start, start + BLOCK)
            ranking[block] = _scores(self._costs, rows[block, :SCORED]).argmin(axis=1)
        codes = self._ranks[rows, ranking[:, None]].astype(np.int64)
        M = self.rankings.shape[1]
        common = np.take(self._common_rank, ids, mode="clip")
        return ranking, np.where(codes < M, codes, M + common)

    @cached_property
    def _flat(self) -> NDArray[np.int32]:
        return np.concatenate([self.rankings.ravel(), self.common])

    @cached_property
    def _common_rank(self) -> NDArray[np.int32]:
        """[V]; each id's rank in the common ranking."""
        return inverse(self.common)

    @cached_property
    def _row(self) -> NDArray[np.int32]:
        """[V]; each id's row in ``_ranks``; 0 for ids in no ranking."""
        row = np.zeros(self.common.size, np.int32)
        ranked = np.unique(self.rankings)
        row[ranked] = np.arange(1, ranked.size + 1)
        return row

    @cached_property
    def _ranks(self) -> NDArray[np.uint16]:
        """[rows, C]; an id's rank in each ranking, M where it has none."""
        C, M = self.rankings.shape
        ranks = np.full((int(self._row.max()) + 1, C), M, np.uint16)
        ranks[self._row[self.rankings], np.arange(C)[:, None]] = np.arange(M)
        return ranks

    @cached_property
    def _costs(self) -> NDArray[np.uint16]:
        """[rows, C]; an id's approximate cost under each ranking, in sixteenths of a bit.

        Ids in no ranking cost 0 everywhere: they do not affect the choice.
        """
        costs = np.round(16 * np.log2(4 + self._ranks.astype(np.float64))).astype(np.uint16)
        costs[0] = 0
        return costs


def inverse(permutation: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the index of each value of a permutation of 0..n-1."""
    index = np.empty_like(permutation)
    index[permutation] = np.arange(permutation.size, dtype=np.int32)
    return index


def _scores(table: NDArray[Any], rows: NDArray[np.integer]) -> NDArray[Any]:
    """Sum over E the rows [P, E] of table [R, C]: [P, C]."""
    sums = np.zeros((len(rows), table.shape[1]), table.dtype)
    terms = np.empty_like(sums)
    for column in np.ascontiguousarray(rows.T):
        sums += np.take(table, column, axis=0, out=terms, mode="clip")
    return sums


def fit_codebook(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32], target: Target, vocab_size: int
) -> Codebook:
    """Learn a codebook from a sample of the teacher's answers; the same sample gives the same codebook.

    ``ids`` and ``logprobs`` are [N, E]; -1 and -inf where an entry is absent. N may be 0; more than 16,000
    positions gain little.
    """
    counts = np.bincount(ids[ids >= 0], minlength=vocab_size)
    common = np.argsort(-counts, kind="stable").astype(np.int32)
    clustered = min(CLUSTERED, int(np.count_nonzero(counts)))
    rows = np.minimum(np.where(ids >= 0, np.take(inverse(common), ids, mode="clip"), clustered), clustered)
    weights = _cluster(rows, clustered)
    # Further ids of the common ranking follow in their order, without weight.
    ranked = min(RANKED, vocab_size)
    weights = np.pad(weights, [(0, max(0, ranked - clustered)), (0, 0)])
    order = np.argsort(-weights, axis=0, kind="stable")[:ranked]
    step = _choose_step(logprobs) if target.kind == "topk" else STEPS[0]
    return Codebook(step, common, np.ascontiguousarray(common[order].T))


def _cluster(rows: NDArray[np.integer], clustered: int) -> NDArray[np.float64]:
    """Sort positions into clusters of similar candidates; return the ids' counts in each, [clustered, C].

    A mixture of unigram distributions, fitted by hard expectation-maximisation; clusters are split in two
    at random, up to the most that the sample allows.

    ``rows`` [N, E] are ranks in the common ranking, ``clustered`` for ids that are not clustered.
    """
    random = np.random.default_rng(0)
    positions = len(rows)
    most = min(MOST_RANKINGS, positions // POSITIONS_A_RANKING)
    cluster = np.zeros(positions, np.int64)
    C = 1
    weights = _weights(rows, cluster, C, clustered)
    while most // C >= 2:
        cluster = 2 * cluster + random.integers(2, size=positions)
        C *= 2
        for _ in range(ROUNDS):
            weights = _weights(rows, cluster, C, clustered)
            table = np.zeros((clustered + 1, C), np.float32)
            table[:clustered] = np.log(weights / weights.sum(axis=0))
            for start in range(0, positions, BLOCK):
                block = slice(start, start + BLOCK)
                cluster[block] = _scores(table, rows[block]).argmax(axis=1)
        weights = _weights(rows, cluster, C, clustered)
    return weights


def _weights(
    rows: NDArray[np.integer], cluster: NDArray[np.int64], C: int, clustered: int
) -> NDArray[np.float64]:
    """Count each id in each cluster, and add PRIOR entries of the common frequencies: [clustered, C]."""
    cells = (rows * C + cluster[:, None]).ravel()
    counts = np.bincount(cells, minlength=(clustered + 1) * C).reshape(-1, C)[:clustered].astype(np.float64)
    total = counts.sum(axis=1, keepdims=True)
    weights: NDArray[np.float64] = counts + PRIOR * total / max(total.sum(), 1)
    return weights


def _choose_step(logprobs: NDArray[np.float32]) -> float:
    """Return the step of the grid on which the gaps between entries have the least entropy."""
    best_first = -np.sort(-logprobs, axis=1)
    gaps_present = np.isfinite(best_first[:, 1:])

    def bits(step: float) -> float:
        with np.errstate(invalid="ignore"):
            gaps = -np.diff(np.rint(best_first / step), axis=1)[gaps_present]
        frequencies = np.unique(gaps, return_counts=True)[1] / max(gaps.size, 1)
        return float(-(frequencies * np.log2(frequencies)).sum())

    return min(STEPS, key=bits)
