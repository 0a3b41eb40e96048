"""Read a split's rows, checked and decoded. numpy only; nothing here depends on training."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddk_cache.cache.commits import CommitCache
from ddk_cache.cache.metadata import split_arrays
from ddk_cache.cache.rows import Rows
from ddk_cache.errors import CacheError, counted
from ddk_cache.format import layout, shards, writer_logprob
from ddk_cache.format.codebook import Codebook
from ddk_cache.format.codec import decode, row_arrays
from ddk_cache.format.layout import rows_in
from ddk_cache.format.validate import check_rows
from ddk_cache.storage.storage import Storage

ROWS_AT_ONCE = 16  # read by an iteration over a split


class SplitSource(NamedTuple):
    """The location and coding of a split's rows."""

    storage: Storage
    manifest: layout.Manifest
    domain: str
    name: layout.SplitName
    commits: CommitCache
    codebook: Codebook | None


class _Chunk(NamedTuple):
    """The stored chunk of one row of an array."""

    array: layout.RowArray
    byte_range: tuple[str, int, int]  # key, start, end
    crc: int

    def decompress(self, data: bytes, values: NDArray[Any]) -> None:
        """Decompress into ``values`` [width]; raises ValueError where the bytes are damaged."""
        shards.decode_into(values, data, self.array, self.crc)


class Split:
    """Rows of one split, by index, in any order. Safe to call from several threads."""

    def __init__(
        self, source: SplitSource, state: layout.SplitState, finished: NDArray[np.int64] | None = None
    ) -> None:
        """``finished``: the shards of an unfinished split that can be read; None: all of them."""
        self.name, self.codebook = source.name, source.codebook
        self._source, self._state, self._finished = source, state, finished
        self._arrays = split_arrays(source.manifest, source.domain, source.name)
        self._columns = {name: column for column, name in enumerate(self._arrays)}

    def __len__(self) -> int:
        if self._finished is None:
            return self._state.rows
        if not len(self._finished):
            return 0
        per_shard = self._source.manifest.shard_rows
        last = rows_in(self._state.rows, int(self._finished[-1]), per_shard)
        return (len(self._finished) - 1) * per_shard + last

    @property
    def has_targets(self) -> bool:
        """Whether the rows have entries, not only the log-probabilities of the labels."""
        return self._source.manifest.has_targets(self.name)

    @property
    def shards(self) -> list[int]:
        """The indices of the shards that hold its rows, ascending."""
        if self._finished is None:
            return list(range(layout.shards(self._state.rows, self._source.manifest.shard_rows)))
        return [int(shard) for shard in self._finished]

    def __repr__(self) -> str:
        return f"<Split {self._source.domain}/{self.name}: {self.summary()}>"

    def summary(self) -> str:
        """Return the numbers of rows and tokens as text."""
        if len(self) < self._state.rows:
            return f"{len(self):,} of {self._state.rows:,} rows so far"
        return f"{counted(self._state.rows, 'row')}, {self._state.tokens:,} tokens"

    def read(self, rows: ArrayLike, *, targets: bool = True, labels: bool = True) -> Rows:
        """Read rows [n] by index, in the given order; repeats are allowed.

        ``targets=False`` leaves ids, logprobs and tail_logprob None and does not read their bytes;
        ``labels=False`` does the same for label_logprob.

        Raises
        ------
        IndexError
            A row index is not in 0..len-1.
        ValueError
            ``rows`` is not a list of integers; a mask of booleans is none.
        CacheError
            Bytes are damaged, missing, or of another shard; the message names the shard.
        """
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError(f"rows must be a list of row indices, not {index.dtype} of shape {index.shape}")
        source = self._source
        if index.size and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(
                f"{source.domain}/{self.name} has rows 0 to {len(self) - 1}, not {index.tolist()}"
            )
        targets = targets and source.manifest.has_targets(self.name)
        skipped = set() if targets else set(row_arrays(source.manifest.target, source.manifest.seq_length))
        skipped |= {"teacher_prefix"} if labels else {"teacher_prefix", "label_logprob"}
        names = [name for name in self._arrays if name not in skipped]
        arrays = self._read_arrays(names, index.astype(np.int64))
        try:
            return self._decode(arrays, targets)
        except ValueError as error:
            raise CacheError(f"{source.storage.url}: {source.domain}/{self.name}: {error}") from error

    def _decode(self, arrays: dict[str, NDArray[Any]], targets: bool) -> Rows:
        """Check the arrays against each other and decode them; raises ValueError."""
        manifest = self._source.manifest
        check_rows(arrays, manifest.vocab_size)
        decoded = None
        if targets:
            if self.codebook is None:
                raise ValueError("the codebook is missing")
            decoded = decode(arrays, self.codebook, manifest.target)
        written = arrays.get("writer_logprob")
        return Rows(
            tokens=arrays["tokens"].astype(np.int32),
            segments=arrays["segments"],
            loss_mask=arrays["loss_mask"].astype(np.bool_),
            label_logprob=arrays.get("label_logprob"),
            targets=decoded,
            writer_logprob=None if written is None else writer_logprob.decode(written),
        )

    def _read_arrays(self, names: Sequence[str], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Read the rows of the named arrays: [n, width] each."""
        chunks = self._chunks(names, rows)
        arrays = {
            name: np.empty((len(rows), self._arrays[name].width), self._arrays[name].dtype) for name in names
        }
        values = [row for name in names for row in arrays[name]]
        read = self._source.storage.read_ranges([chunk.byte_range for chunk in chunks])
        for chunk, data, row in zip(chunks, read, values, strict=True):
            try:
                chunk.decompress(data, row)
            except ValueError:
                self._retry(chunk, row)
        return arrays

    def _chunks(self, names: Sequence[str], rows: NDArray[np.int64]) -> list[_Chunk]:
        """Locate the chunks of the named arrays: the first array's rows, then the second's, and so on."""
        source = self._source
        per_shard = source.manifest.shard_rows
        shard_indices, inner = np.divmod(rows, per_shard)
        if self._finished is not None:
            shard_indices = self._finished[shard_indices]
        keys = [
            layout.ShardKey(source.domain, self.name, shard) for shard in np.unique(shard_indices).tolist()
        ]
        chunks: dict[tuple[str, int], _Chunk] = {}
        for key, record in source.commits.read(keys):  # one at a time: it may have 64 MiB
            expected = rows_in(self._state.rows, key.shard, per_shard)
            if record.rows != expected:
                raise CacheError(f"{source.storage.url}: {key}: has {record.rows} rows, not {expected}")
            positions = np.flatnonzero(shard_indices == key.shard)
            for name in names:
                array, entry = self._arrays[name], record.arrays[self._columns[name]]
                # The end of each chunk in its object, which may be larger than 4 GiB.
                ends = np.cumsum(entry["lengths"], dtype=np.int64)
                for position, row in zip(positions.tolist(), inner[positions].tolist(), strict=True):
                    end, length = int(ends[row]), int(entry["lengths"][row])
                    if length > shards.most_bytes(array):
                        raise CacheError(f"{source.storage.url}: {key}: {name} has a chunk of {length} bytes")
                    byte_range = key.object(name), end - length, end
                    chunks[name, position] = _Chunk(array, byte_range, int(entry["crcs"][row]))
        return [chunks[name, position] for name in names for position in range(len(rows))]

    def _retry(self, chunk: _Chunk, values: NDArray[Any]) -> None:
        """Read a damaged chunk a second time: the connection may have damaged it."""
        (data,) = self._source.storage.read_ranges([chunk.byte_range])
        try:
            chunk.decompress(data, values)
        except ValueError as error:
            key = f"{self._source.storage.url}/{chunk.byte_range[0]}"
            raise CacheError(f"{key}: {error}: run ddk-cache verify, then build again") from error

    def __getitem__(self, row: int | slice) -> Rows:
        """Return one row, without the first dimension: [S] and [S, E]; or a slice of rows."""
        if isinstance(row, slice):
            return self.read(range(*row.indices(len(self))))
        return self.read([row + len(self) if row < 0 else row])[0]

    def __iter__(self) -> Iterator[Rows]:
        """Yield row after row, as ``split[row]``; some are read at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = self[start : start + ROWS_AT_ONCE]
            yield from (rows[row] for row in range(len(rows)))
