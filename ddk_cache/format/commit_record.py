"""Commit records: one for each shard, written after everything that it covers.

For each array a record holds the size and sha256 of the shard's object, and the length and crc32c of each
row's chunk. All of it is computed from the bytes in memory before they are written, never from what a store
returns. The shard digest at its end ties a record to one shard of one build: a record, or a shard with its
record, from elsewhere is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ddk_cache.format import shards
from ddk_cache.format.layout import Manifest, ShardKey, canonical

HEADER = 8  # bytes: the number of rows, uint64
DIGEST = 32  # bytes: a sha256


def _entry(shard_rows: int) -> np.dtype[Any]:
    """Return the type of what a record holds for each array; rows that a shard lacks are 0."""
    rows = (shard_rows,)
    return np.dtype(
        [("size", "<u8"), ("sha256", "u1", DIGEST), ("lengths", "<u4", rows), ("crcs", "<u4", rows)]
    )


def record_size(arrays: int, shard_rows: int) -> int:
    """Return the bytes of a record."""
    return HEADER + arrays * _entry(shard_rows).itemsize + DIGEST


def shard_identity(manifest: Manifest, key: ShardKey, codebook: str | None) -> bytes:
    """Return the shard and build that a shard digest covers besides the record.

    ``codebook`` is the codebook's digest if the record covers entries, else None.
    """
    shard = {"split": key.split, "shard": key.shard, "codebook": codebook}
    return canonical({"fingerprint": manifest.fingerprint(key.domain)} | shard)


@dataclass(frozen=True, eq=False)
class CommitRecord:
    """The bytes that a shard's objects must have."""

    rows: int
    arrays: NDArray[Any]
    """[arrays]; size, sha256 [32], lengths [shard_rows] and crcs [shard_rows] of each."""

    @classmethod
    def empty(cls, arrays: int, rows: int, shard_rows: int) -> Self:
        """Return a record of ``rows`` rows, with zeros for each array."""
        return cls(rows, np.zeros(arrays, _entry(shard_rows)))

    @property
    def shard_rows(self) -> int:
        """Rows that the shard has room for."""
        return int(self.arrays["lengths"].shape[1])

    def serialise(self, identity: bytes) -> bytes:
        """Return the bytes that are stored for the shard of that identity."""
        body = self.rows.to_bytes(HEADER, "little") + self.arrays.tobytes()
        return body + sha256(identity + body).digest()

    def has_prefix(self, other: "CommitRecord") -> bool:
        """Return whether its first arrays are those of ``other``, and equal."""
        arrays = self.arrays[: len(other.arrays)]
        return self.rows == other.rows and arrays.tobytes() == other.arrays.tobytes()

    def same_rows(self, other: "CommitRecord", rows: int) -> bool:
        """Return whether the first ``rows`` chunks of all arrays are equal."""
        return all(
            np.array_equal(self.arrays[field][:, :rows], other.arrays[field][:, :rows])
            for field in ("lengths", "crcs")
        )


def describe(objects: Sequence[bytes], rows: int, shard_rows: int) -> CommitRecord:
    """Return the record of the objects of ``shards.join``, one per array.

    Raises ValueError if the index of an object is damaged.
    """
    record = CommitRecord.empty(len(objects), rows, shard_rows)
    for entry, data in zip(record.arrays, objects, strict=True):
        lengths = shards.chunk_lengths(data, shard_rows)
        entry["size"] = len(data)
        entry["sha256"] = np.frombuffer(sha256(data).digest(), np.uint8)
        entry["lengths"] = lengths
        entry["crcs"][:rows] = shards.stored_checksums(data, np.cumsum(lengths)[:rows])
    return record


def parse(data: bytes, identity: bytes, arrays: int) -> CommitRecord:
    """Parse the record of the shard with that identity.

    Raises ValueError if the record is damaged or belongs to another shard or build.
    """
    room, rest = divmod(len(data) - record_size(arrays, 0), record_size(arrays, 1) - record_size(arrays, 0))
    if rest or room < 1:
        raise ValueError(f"the commit record cannot have {len(data)} bytes")
    digest = sha256(identity)
    digest.update(memoryview(data)[:-DIGEST])  # a slice of it is no copy
    if digest.digest() != data[-DIGEST:]:
        raise ValueError("the commit record is damaged, or belongs to another shard, domain or build")
    rows = int.from_bytes(data[:HEADER], "little")
    if rows > room:
        raise ValueError(f"the commit record claims {rows} rows in a shard of {room}")
    return CommitRecord(rows, np.frombuffer(data, _entry(room), arrays, HEADER))
