"""A cache for torch's DataLoader, in a training loop of one's own: dataset, sampler, collator.

Example
-------
>>> rows = CacheDataset("runs/cache")
>>> sampler = MixtureSampler(rows, rows_per_interval=32_000)
>>> loader = DataLoader(rows, 8, sampler=sampler, collate_fn=Collator(vocab_size), num_workers=2)
>>> for interval in range(30):
...     sampler.share = factor                      # [N]; natural shares until it is set
...     for batch in loader: ...                    # one interval

tools/hf_trainer.py is a whole program: Hugging Face's Trainer with DDK.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from ddk_cache import Cache, Rows, open_cache
from ddk_cache.layout import SplitName
from ddk_cache.sampler import SamplerState, draw, natural_share
from ddk_train.batches import make_batch


@dataclass(frozen=True)
class Row:
    """One row, and the number of its domain."""

    domain: int
    rows: Rows  # n = 1


class CacheDataset(Dataset[Row]):
    """The rows of a split of every domain, one domain after another.

    Parameters
    ----------
    url
        The cache's folder or URL. A DataLoader's worker opens it anew, since an open store belongs to its
        process; take ``multiprocessing_context="spawn"`` or ``"forkserver"``.
    split
        Training rows come with the teacher's entries.
    allow_incomplete
        Take what an unfinished cache holds.

    Raises
    ------
    CacheError
        As ``ddk_cache.open_cache``.
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
        """A batch's rows: each domain's are read at once. The order is that of ``indices``."""
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"the rows are 0 to {len(self) - 1}, not {wanted.tolist()}")
        domain = np.searchsorted(self._ends, wanted, side="right")
        row = wanted - (self._ends - self.rows)[domain]
        found: dict[int, Row] = {}
        for number in np.unique(domain).tolist():
            mine = np.flatnonzero(domain == number)
            rows = self.cache[self.domains[number]].split(self.split).read(row[mine])
            for place, at in enumerate(mine.tolist()):
                found[at] = Row(number, _part(rows, place))
        return [found[at] for at in range(len(wanted))]

    def index(self, domain: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of rows in this dataset, from their domains' numbers and their own: [n]."""
        return np.asarray((self._ends - self.rows)[domain] + row)


class MixtureSampler(Sampler[int]):
    """The rows of one interval after another, mixed by ``share``: every ``iter`` is the next interval.

    An interval takes the place of an epoch, so that a share set between two of them holds from the first row
    of the next one, however far a loader reads ahead.

    Parameters
    ----------
    dataset
        Whose rows are drawn; its indices come out.
    rows_per_interval
        Rows of an interval, over all processes: optimizer steps times rows a step.
    seed
        Of the draws.
    """

    share: NDArray[np.float64]
    """What the next interval draws by, [N], summing to 1: natural shares until it is set."""
    state: SamplerState
    """Where it stands; keep it (``to_json``) with a checkpoint, and set it again."""

    def __init__(self, dataset: CacheDataset, rows_per_interval: int, seed: int = 0) -> None:
        self._dataset, self._count, self._seed = dataset, rows_per_interval, seed
        self.share = natural_share(dataset.rows)
        self.state = SamplerState((0,) * len(dataset.rows))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        domain, row, self.state = draw(self.state, self.share, self._dataset.rows, self._count, self._seed)
        yield from self._dataset.index(domain, row).tolist()


@dataclass(frozen=True)
class Collator:
    """Rows to a batch: a dict with the names and shapes of :class:`ddk_train.batches.Batch`.

    Its labels are the tokens that follow, and stand a second time under transformers' name for such labels,
    ``shift_labels``, by which its Trainer counts them. ``vocab_size`` is the width of the student's head,
    which may be narrower than the teacher's.
    """

    vocab_size: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        together = {
            number: _joined([row.rows for row in rows if row.domain == number])
            for number in sorted({row.domain for row in rows})
        }
        batch = make_batch(together, self.vocab_size)
        return vars(batch) | {"shift_labels": batch.labels}


def _part(rows: Rows, place: int) -> Rows:
    columns: list[Any] = [None if v is None else v[place : place + 1] for v in vars(rows).values()]
    return Rows(*columns)


def _joined(rows: Sequence[Rows]) -> Rows:
    parts = zip(*(vars(one).values() for one in rows), strict=True)
    columns: list[Any] = [None if part[0] is None else np.concatenate(part) for part in parts]
    return Rows(*columns)
