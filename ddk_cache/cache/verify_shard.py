"""Check a shard against its commit records, and its rows for consistency, in parts of bounded memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.codebooks import codebook_digest
from ddk_cache.cache.commits import CommitReader
from ddk_cache.cache.metadata import size_limits, split_arrays
from ddk_cache.errors import CacheError
from ddk_cache.format import codec, layout, shards
from ddk_cache.format.codebook import Codebook
from ddk_cache.format.commit_record import DIGEST, CommitRecord, record_size
from ddk_cache.format.layout import COMMITS, TOKEN_COMMITS, Kind, ShardKey, SplitName
from ddk_cache.format.validate import check_rows
from ddk_cache.storage.storage import Storage

BYTES_AT_ONCE = 32 << 20  # of a shard's objects that are read at a time; at least one row
ENTRIES_AT_ONCE = 1 << 20  # entries that are decoded at a time, 30 bytes each; at least one row
Counts = NDArray[np.float64]  # [4]: rows, tokens, labels, and the sum of the labels' losses in nats
Damage = Literal["tokens", "answers", "record", "codebook", "unanswered"]
"""What is damaged: tokens, whose record is dropped as well; answers; the record of all arrays; nothing but
the codebook, which is lost or not the one that encoded the shard; or nothing, and there are no answers."""


@dataclass(frozen=True)
class ShardResult:
    """What the check of a shard found."""

    bytes: int
    """Bytes of its objects."""
    counts: Counts
    reason: str | None = None
    """None if the shard is intact."""
    damage: Damage = "answers"


@dataclass(frozen=True)
class _Content:
    """What a shard's objects hold."""

    record: CommitRecord
    """The record that would cover them."""
    counts: Counts
    problem: ValueError | None
    """Of the first rows that cannot be decoded, or are not consistent."""


class _BadShard(ValueError):
    def __init__(self, reason: str, damage: Damage) -> None:
        super().__init__(reason)
        self.damage: Damage = damage


class ShardCheck:
    """Checks the shards of one domain. Safe to call from several threads.

    Parameters
    ----------
    codebook
        The one of the domain's teacher; None if it is lost.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: layout.Manifest,
        domain: str,
        state: layout.DomainState,
        codebook: Codebook | None,
    ) -> None:
        self._storage, self._manifest, self._domain, self._state = storage, manifest, domain, state
        self._codebook = codebook
        digest = codebook_digest(codebook) if codebook else None
        self._commits = CommitReader(storage, manifest, {domain: digest}.get)
        self._row_entries = manifest.seq_length * max(1, manifest.target.width)

    def most_memory(self, split: SplitName) -> int:
        """Return about how many bytes the check of a shard takes."""
        room = self._manifest.rows_per_shard(self._state.split(split).rows)
        records = record_size(len(split_arrays(self._manifest, self._domain, split)), room)
        return BYTES_AT_ONCE + 30 * max(ENTRIES_AT_ONCE, self._row_entries) + 6 * records

    def check(self, key: ShardKey, sizes: Mapping[str, int]) -> ShardResult:
        """Check a shard; ``sizes`` has the bytes of each of its arrays and of its record, by key."""
        size = sum(sizes.get(key.object(name), 0) for name in self._arrays(key.split))
        try:
            return ShardResult(size, self._check(key, sizes))
        except ValueError as error:
            damage = error.damage if isinstance(error, _BadShard) else "tokens"
            return ShardResult(size, np.zeros(4), str(error), damage)

    def _arrays(self, split: SplitName) -> dict[str, layout.RowArray]:
        return split_arrays(self._manifest, self._domain, split)

    def _bad(self, array: str, reason: str = "is damaged or belongs to another shard") -> _BadShard:
        is_token_array = array in self._manifest.token_arrays(self._domain)
        return _BadShard(f"{array} {reason}", "tokens" if is_token_array else "answers")

    def _check(self, key: ShardKey, sizes: Mapping[str, int]) -> Counts:
        """Return the counts of an intact shard; raises ValueError."""
        arrays = self._arrays(key.split)
        self._check_sizes(key, sizes)
        record = self._read_commits(key, sizes)
        for name, entry in zip(arrays, record.arrays, strict=True):
            if (size := sizes[key.object(name)]) != entry["size"]:
                raise self._bad(name, f"has {size} bytes, not {entry['size']}")
        content = self._read_objects(key, sizes)
        for name, entry, expected in zip(arrays, content.record.arrays, record.arrays, strict=True):
            if not np.array_equal(entry["sha256"], expected["sha256"]):
                raise self._bad(name)
        if not np.array_equal(content.record.arrays, record.arrays):
            raise _BadShard("its commit record differs from its own objects", "answers")
        if content.problem is not None:
            raise content.problem
        return content.counts

    def _check_sizes(self, key: ShardKey, sizes: Mapping[str, int]) -> None:
        """Raise ValueError if an object is missing, or so large or small that it is not read."""
        arrays, index_bytes = self._arrays(key.split), shards.index_size(self._rows(key)[1])
        answers = {*arrays, COMMITS} - self._manifest.token_arrays(self._domain).keys()
        is_answered = any(key.object(name) in sizes for name in answers)
        for name, most in zip(arrays, size_limits(self._manifest, key, list(arrays)).values(), strict=True):
            if name in answers and not is_answered:
                raise _BadShard("has no answers", "unanswered")
            if (size := sizes.get(key.object(name))) is None:
                raise self._bad(name, "is missing")
            if not index_bytes < size <= most:
                raise self._bad(name, f"has {size:,} bytes, fewer or more than it can have")

    def _read_commits(self, key: ShardKey, sizes: Mapping[str, int]) -> CommitRecord:
        """Return the record of all arrays, if both records are usable; raises ValueError."""
        tokens = self._read_commit(key, TOKEN_COMMITS)
        try:
            record = self._read_commit(key, COMMITS)
        except _BadShard as error:
            if error.damage == "record" and self._has_other_digest(key, sizes):
                error.damage = "codebook"
            raise
        if not record.has_prefix(tokens):
            raise _BadShard("its two commit records differ in its tokens", "answers")
        return record

    def _read_commit(self, key: ShardKey, kind: Kind) -> CommitRecord:
        (record,) = self._commits.read([key], kind)
        if isinstance(record, CacheError):
            reason = str(record).removeprefix(f"{self._storage.url}/")
            raise _BadShard(reason, "tokens" if kind == TOKEN_COMMITS else "record")
        rows, room = self._rows(key)
        if (record.rows, record.shard_rows) != (rows, room):
            reason = f"has {record.rows} rows in a shard of {record.shard_rows}, not {rows}"
            raise _BadShard(reason, "tokens" if kind == TOKEN_COMMITS else "answers")
        return record

    def _rows(self, key: ShardKey) -> tuple[int, int]:
        """Return how many rows a shard must have, and how many it must have room for."""
        total, manifest = self._state.split(key.split).rows, self._manifest
        return layout.rows_in(total, key.shard, manifest.shard_rows), manifest.rows_per_shard(total)

    def _has_other_digest(self, key: ShardKey, sizes: Mapping[str, int]) -> bool:
        """Return whether a shard's record covers its objects, under a digest that no damage explains."""
        try:
            record = self._read_objects(key, sizes).record
        except ValueError:
            return False
        expected = record.serialise(self._commits.identity(key, COMMITS))
        (stored,) = self._storage.read_all({key.object(COMMITS): len(expected)})
        if stored is None or len(stored) < len(expected):
            return False
        is_equal = np.frombuffer(stored, np.uint8) == np.frombuffer(expected, np.uint8)
        # Two digests have a byte or two in common by chance; a flipped bit leaves the others.
        return bool(is_equal[:-DIGEST].all() and np.count_nonzero(is_equal[-DIGEST:]) < DIGEST // 2)

    def _read_objects(self, key: ShardKey, sizes: Mapping[str, int]) -> _Content:
        """Read all objects of a shard, some rows at a time; raises ValueError if an index is damaged."""
        arrays, (rows, room) = self._arrays(key.split), self._rows(key)
        objects, record = list(map(key.object, arrays)), CommitRecord.empty(len(arrays), rows, room)
        record.arrays["size"] = [sizes[name] for name in objects]
        spans = [(name, sizes[name] - shards.index_size(room), sizes[name]) for name in objects]
        indices = self._storage.read_ranges(spans)
        for name, entry, index, (_, chunk_bytes, _) in zip(
            arrays, record.arrays, indices, spans, strict=True
        ):
            try:
                entry["lengths"] = _lengths(index, arrays[name], rows, room, chunk_bytes)
            except ValueError as error:
                raise self._bad(name) from error
        ends = np.cumsum(record.arrays["lengths"][:, :rows], axis=1, dtype=np.int64)
        digests = [sha256() for _ in arrays]
        counts, problem = np.zeros(4), None
        for first, last in _parts(ends.sum(axis=0)):
            starts = ends[:, first - 1] if first else np.zeros(len(arrays), np.int64)
            ranges = zip(objects, starts.tolist(), ends[:, last - 1].tolist(), strict=True)
            parts = self._storage.read_ranges(list(ranges))
            chunk_ends = ends[:, first:last] - starts[:, None]
            for entry, digest, part, part_ends in zip(record.arrays, digests, parts, chunk_ends, strict=True):
                digest.update(part)
                entry["crcs"][first:last] = shards.stored_checksums(part, part_ends)
            try:
                if problem is None:
                    lengths = record.arrays["lengths"][:, first:last]
                    counts += self._check_rows(key.split, parts, lengths)
            except ValueError as error:
                problem = error
        for entry, digest, index in zip(record.arrays, digests, indices, strict=True):
            digest.update(index)
            entry["sha256"] = np.frombuffer(digest.digest(), np.uint8)
        return _Content(record, counts, problem)

    def _check_rows(self, split: SplitName, parts: Sequence[bytes], lengths: NDArray[np.integer]) -> Counts:
        """Decode and check the rows whose chunks have these lengths [arrays, rows]; raises ValueError."""
        manifest, arrays = self._manifest, self._arrays(split)
        counts, step = np.zeros(4), max(1, ENTRIES_AT_ONCE // self._row_entries)
        for first in range(0, lengths.shape[1], step):
            values = {
                name: shards.decode_chunks(part, array, array_lengths, first, step)
                for (name, array), part, array_lengths in zip(arrays.items(), parts, lengths, strict=True)
            }
            check_rows(values, manifest.vocab_size)
            if manifest.has_targets(split) and self._codebook is not None:
                codec.decode(values, self._codebook, manifest.target)
            tokens, labels = (np.count_nonzero(values[name]) for name in ("segments", "loss_mask"))
            loss = -values["label_logprob"].sum(dtype=np.float64)
            counts += np.array([len(values["tokens"]), tokens, labels, loss])
        return counts


def _parts(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end of parts of at most BYTES_AT_ONCE; rows end at these bytes [rows]."""
    first = 0
    while first < len(ends):
        most = BYTES_AT_ONCE + (int(ends[first - 1]) if first else 0)
        last = max(first + 1, int(np.searchsorted(ends, most, side="right")))
        yield first, last
        first = last


def _lengths(
    index: bytes, array: layout.RowArray, rows: int, shard_rows: int, chunk_bytes: int
) -> NDArray[np.int64]:
    """Return the lengths of an object's chunks [shard_rows]; raises ValueError for those that cannot be."""
    lengths = shards.parse_index(index, shard_rows, chunk_bytes)
    if not lengths[:rows].all() or lengths[rows:].any() or lengths.max() > shards.most_bytes(array):
        raise ValueError("a chunk is missing, or larger than it can be")
    return lengths
