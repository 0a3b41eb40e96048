"""Read a split's rows, checked and decoded. numpy only; nothing here knows of training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddk_cache import codec, layout, shards
from ddk_cache.commit_reader import CommitCache, starts
from ddk_cache.errors import CacheError
from ddk_cache.layout import rows_in
from ddk_cache.metadata import split_arrays
from ddk_cache.storage import Storage
from ddk_cache.validate import check_entries, check_labels, check_tokens

ROWS_AT_ONCE = 16  # read by an iteration over a split


@dataclass(frozen=True)
class Rows:
    """Some rows of a split. Position t holds the distribution over token t+1, given its document up to t.

    Where ``loss_mask`` is False there is no entry, no tail (-inf) and a ``label_logprob`` of 0.
    """

    tokens: NDArray[np.int32]
    """[n, S]; 0 in the padding."""
    segments: NDArray[np.uint16]
    """[n, S]; 0 = padding, 1.. = the document's number in its row."""
    loss_mask: NDArray[np.bool_]
    """[n, S]; position t has a label, the token at t+1, and it counts."""
    label_logprob: NDArray[np.float32] | None
    """[n, S]; log p(token t+1) in nats at temperature 1, exact."""
    ids: NDArray[np.int32] | None = None
    """[n, S, E]; best first, -1 where an entry is absent."""
    logprobs: NDArray[np.float32] | None = None
    """[n, S, E]; nats, of the target at its temperature; -inf where absent."""
    tail_logprob: NDArray[np.float32] | None = None
    """[n, S]; log of the mass outside the entries; -inf where none is left."""


class SplitReader:
    """Rows of one split, by number, in any order. Safe to call from several threads."""

    def __init__(
        self,
        storage: Storage,
        manifest: layout.Manifest,
        domain: str,
        name: layout.SplitName,
        total: int,
        commits: CommitCache,
        codebook: codec.Codebook | None,
        finished: NDArray[np.int64] | None = None,
    ) -> None:
        self.name = name
        self._storage = storage
        self._manifest = manifest
        self._domain = domain
        self._total = total
        self._commits = commits
        self._codebook = codebook
        self._finished = finished  # shards that an unfinished split has; None: all of them
        self._arrays = split_arrays(manifest, name)

    @property
    def codebook(self) -> codec.Codebook | None:
        """The tables that the entries are written with; None where no entry was written yet."""
        return self._codebook

    def __len__(self) -> int:
        if self._finished is None:
            return self._total
        if not len(self._finished):
            return 0
        per_shard = self._manifest.shard_rows
        last = rows_in(self._total, int(self._finished[-1]), per_shard)
        return (len(self._finished) - 1) * per_shard + last

    def read(self, rows: ArrayLike, *, targets: bool = True, labels: bool = True) -> Rows:
        """Read rows [n] by number, in the given order; repeats are allowed.

        ``targets=False`` leaves ids, logprobs and tail_logprob None and does not touch their bytes;
        ``labels=False`` does so with label_logprob.

        Raises
        ------
        IndexError
            A row's number is not in 0..len-1.
        CacheError
            Bytes are damaged, missing, or not those of this place; the message names the shard.
        """
        wanted = np.asarray(rows, np.int64)
        if wanted.ndim != 1:
            raise ValueError(f"rows must be a list of row numbers, not of shape {wanted.shape}")
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"{self._domain}/{self.name} has rows 0 to {len(self) - 1}, not {wanted.tolist()}"
            )
        targets = targets and self._manifest.has_targets(self.name)
        entries = codec.row_arrays(self._manifest.target, self._manifest.seq_length)
        left_out = (set() if targets else set(entries)) | (set() if labels else {"label_logprob"})
        found = self._read_arrays([name for name in self._arrays if name not in left_out], wanted)
        try:
            return self._rows(found, targets)
        except ValueError as error:
            raise CacheError(f"{self._storage.url}: {self._domain}/{self.name}: {error}") from error

    def _rows(self, found: dict[str, NDArray[Any]], targets: bool) -> Rows:
        """What the arrays say, once they agree with each other."""
        mask = found["loss_mask"]
        check_tokens(found["tokens"], found["segments"], mask, self._manifest.vocab_size)
        if "label_logprob" in found:
            check_labels(found["label_logprob"], mask)
        decoded: tuple[NDArray[Any], ...] = ()
        if targets:
            check_entries(found["entries"], mask)
            if self._codebook is None:
                raise ValueError("the codebook is missing")
            decoded = codec.decode(found, self._codebook, self._manifest.target, self._manifest.seq_length)
        return Rows(
            found["tokens"].astype(np.int32),
            found["segments"],
            mask.astype(np.bool_),
            found.get("label_logprob"),
            *decoded,
        )

    def _read_arrays(self, names: Sequence[str], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The named arrays' rows: [n, width] each."""
        shard, inner = np.divmod(rows, self._manifest.shard_rows)
        if self._finished is not None:
            shard = self._finished[shard]
        columns = {name: at for at, name in enumerate(self._arrays)}
        commits = self._commits.get(self._domain, self.name, np.unique(shard).tolist())
        for number, commit in commits.items():
            expected = rows_in(self._total, number, self._manifest.shard_rows)
            if commit.rows != expected:
                raise CacheError(f"{self._place(number)}: has {commit.rows} rows, not {expected}")
        first = {
            (name, number): starts(commit.arrays["lengths"][columns[name]])
            for number, commit in commits.items()
            for name in names
        }
        places = [
            (name, number, row)
            for name in names
            for number, row in zip(shard.tolist(), inner.tolist(), strict=True)
        ]
        ranges, crcs = [], []
        for name, number, row in places:
            record = commits[number].arrays[columns[name]]
            start, length = int(first[name, number][row]), int(record["lengths"][row])
            if length > shards.most_bytes(self._arrays[name]):
                raise CacheError(f"{self._place(number)}: {name} has a chunk of {length} bytes")
            ranges.append((layout.object_key(self._domain, self.name, name, number), start, start + length))
            crcs.append(int(record["crcs"][row]))
        arrays = {
            name: np.empty((len(rows), self._arrays[name].width), self._arrays[name].dtype) for name in names
        }
        chunks = self._storage.read_ranges(ranges)
        for at, ((name, _, _), wanted, chunk, crc) in enumerate(
            zip(places, ranges, chunks, crcs, strict=True)
        ):
            row = arrays[name][at % len(rows)]
            try:
                shards.decode_into(row, chunk, self._arrays[name], crc)
            except ValueError:
                self._again(row, wanted, self._arrays[name], crc)
        return arrays

    def _again(
        self, row: NDArray[Any], wanted: tuple[str, int, int], array: layout.RowArray, crc: int
    ) -> None:
        """Ask once more for a chunk that came damaged: it may have been the connection."""
        (chunk,) = self._storage.read_ranges([wanted])
        try:
            shards.decode_into(row, chunk, array, crc)
        except ValueError as error:
            raise CacheError(
                f"{self._storage.url}/{wanted[0]}: {error}: run ddk-cache verify, then build again"
            ) from error

    def _place(self, shard: int) -> str:
        return f"{self._storage.url}: {self._domain}/{self.name} shard {shard}"

    def __getitem__(self, row: int | slice) -> Rows:
        """``split[5]`` is one row, without the first dimension: [S] and [S, E]; ``split[2:9]`` is several."""
        if isinstance(row, slice):
            return self.read(range(*row.indices(len(self))))
        return _one(self.read([row + len(self) if row < 0 else row]))

    def __iter__(self) -> Iterator[Rows]:
        """Row after row, as ``split[row]``; read some at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = self[start : start + ROWS_AT_ONCE]
            for place in range(len(rows.tokens)):
                yield _one(rows, place)


def _one(rows: Rows, place: int = 0) -> Rows:
    columns: list[Any] = [None if values is None else values[place] for values in vars(rows).values()]
    return Rows(*columns)


def document_logprobs(
    rows: Rows,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """What the teacher makes of each document, or piece of one: exp(-sum / labels) is its perplexity.

    Returns
    -------
    Four arrays [documents]: the row's place in ``rows``, the segment, how many labels it has, and the sum of
    their log-probabilities in nats. Documents without a label are left out.
    """
    assert rows.label_logprob is not None
    row, position = (found.astype(np.int64) for found in np.nonzero(rows.loss_mask))
    segment = rows.segments[row, position].astype(np.int64)
    found, document = np.unique(row << 16 | segment, return_inverse=True)
    labels = np.bincount(document, minlength=len(found)).astype(np.int64)
    sums = np.bincount(document, rows.label_logprob[row, position], len(found)).astype(np.float64)
    return found >> 16, found & 0xFFFF, labels, sums
