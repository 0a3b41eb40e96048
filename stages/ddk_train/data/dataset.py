"""A cache for torch's DataLoader: dataset, sampler, collator.

Example
-------
>>> rows = CacheDataset("runs/cache")
>>> sampler = MixtureSampler(rows, rows_per_interval=32_000)
>>> loader = DataLoader(rows, 8, sampler=sampler, collate_fn=Collator(vocab_size), num_workers=2)
>>> for interval in range(30):
...     sampler.share = factor                      # [N]; natural shares until it is set
...     for batch in loader: ...                    # one interval

tools/hf_trainer.py is a complete program: Hugging Face's Trainer with DDK.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from ddk_cache import Cache, Rows, open_cache
from ddk_cache.format.layout import SplitName
from ddk_cache.sampler import RowSampler, SamplerState, natural_share
from ddk_train.data.batches import make_batch


@dataclass(frozen=True)
class Row:
    """One row, and the index of its domain."""

    domain: int
    rows: Rows  # n = 1


class CacheDataset(Dataset[Row]):
    """The rows of a split of every domain, concatenated. Training rows have the teacher's targets.

    Each DataLoader worker opens the cache at ``url`` again, since an open store belongs to its process; use
    ``multiprocessing_context="spawn"`` or ``"forkserver"``. ``allow_incomplete`` uses the finished shards of
    an unfinished cache. Raises CacheError as ``ddk_cache.open_cache`` does.
    """

    def __init__(self, url: str, split: SplitName = "train", *, allow_incomplete: bool = False) -> None:
        self.url, self.split, self.allow_incomplete = url, split, allow_incomplete
        self._cache: Cache | None = None
        self.domains = self.cache.domains
        self.rows = [len(self.cache[name].split(split)) for name in self.domains]
        self._ends = np.cumsum(self.rows)

    @property
    def cache(self) -> Cache:
        """The cache, open in this process."""
        if self._cache is None:
            self._cache = open_cache(self.url, allow_incomplete=self.allow_incomplete)
        return self._cache

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cache": None}

    def __len__(self) -> int:
        return sum(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Return rows in the order of ``indices``; each domain is read once."""
        index = np.asarray(indices, np.int64)
        if index.size and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"the rows are 0 to {len(self) - 1}, not {index.tolist()}")
        domain = np.searchsorted(self._ends, index, side="right")
        row = index - (self._ends - self.rows)[domain]
        items: dict[int, Row] = {}
        for domain_index in np.unique(domain).tolist():
            chosen = np.flatnonzero(domain == domain_index)
            rows = self.cache[self.domains[domain_index]].split(self.split).read(row[chosen])
            items |= {item: Row(domain_index, rows[i : i + 1]) for i, item in enumerate(chosen.tolist())}
        return [items[item] for item in range(len(items))]

    def index(self, domain: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices in this dataset of rows [n] of domains [n]."""
        return np.asarray((self._ends - self.rows)[domain] + row)


class MixtureSampler(Sampler[int]):
    """Draws the indices of rows by ``share``, one interval for every ``iter``.

    An interval of ``rows_per_interval`` (over all processes: optimizer steps times rows a step) replaces an
    epoch: a share set between two intervals applies to the whole next interval, however far a loader reads
    ahead.
    """

    share: NDArray[np.float64]
    """The share of each domain in the next interval, [N], summing to 1; at first, by its number of rows."""
    state: SamplerState
    """Save it with a checkpoint, and set it to resume."""

    def __init__(self, dataset: CacheDataset, rows_per_interval: int, seed: int = 0) -> None:
        self._dataset, self._count, self._seed = dataset, rows_per_interval, seed
        self.share = natural_share(dataset.rows)
        self.state = SamplerState((0,) * len(dataset.rows))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        domain, row, self.state = RowSampler(self._dataset.rows, self._seed).draw(
            self.state, self.share, self._count
        )
        yield from self._dataset.index(domain, row).tolist()


@dataclass(frozen=True)
class Collator:
    """Collates rows into a dict with the names and shapes of :class:`ddk_train.data.batches.Batch`.

    ``shift_labels`` repeats the labels under the name by which transformers' Trainer counts them.
    ``vocab_size`` is the width of the student's head.
    """

    vocab_size: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        by_domain = {
            domain: Rows.concatenate([row.rows for row in rows if row.domain == domain])
            for domain in sorted({row.domain for row in rows})
        }
        batch = make_batch(by_domain, self.vocab_size)
        return vars(batch) | {"shift_labels": batch.labels}
