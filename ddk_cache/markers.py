"""Markers: what vouches for a shard, written after everything that it vouches for.

A marker says, for each array, the size and the sha256 of the shard's object and each row's chunk: its length
and its crc32c. All of it is taken from the bytes that were meant, in memory, never from what a store gives
back. A seal ties it to its place: a marker, or a shard with its marker, that belongs elsewhere does not pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache import layout, shards

HEADER = 8  # bytes: the number of rows, uint64
SEAL = 32  # bytes: a sha256


def _record(shard_rows: int) -> np.dtype[Any]:
    """What a marker has for each array; a shard's rows are often fewer, the rest is 0."""
    rows = (shard_rows,)
    return np.dtype([("size", "<u8"), ("sha256", "u1", 32), ("lengths", "<u4", rows), ("crcs", "<u4", rows)])


def empty_records(arrays: int, shard_rows: int) -> NDArray[Any]:
    """A marker's records, [arrays], all 0."""
    return np.zeros(arrays, _record(shard_rows))


def size(arrays: int, shard_rows: int) -> int:
    """Bytes of a marker."""
    return HEADER + arrays * _record(shard_rows).itemsize + SEAL


@dataclass(frozen=True, eq=False)
class Marker:
    """What a shard's objects are meant to be."""

    rows: int
    records: NDArray[Any]
    """[arrays]; size, sha256 [32], lengths [R] and crcs [R] of each."""

    def pack(self, place: bytes) -> bytes:
        """The bytes that are stored at ``place``."""
        body = self._body(len(self.records))
        return body + sha256(place + body).digest()

    def token_seal(self, place: bytes, arrays: int) -> bytes:
        """The seal of the token marker at ``place``, which vouches for the first ``arrays`` of these."""
        return sha256(place + self._body(arrays)).digest()

    def _body(self, arrays: int) -> bytes:
        return self.rows.to_bytes(HEADER, "little") + self.records[:arrays].tobytes()

    def same_rows(self, other: "Marker", rows: int) -> bool:
        """Whether the first arrays, as many as both have, begin with the same ``rows`` chunks."""
        count = min(len(self.records), len(other.records))
        return all(
            np.array_equal(self.records[:count][field][:, :rows], other.records[:count][field][:, :rows])
            for field in ("lengths", "crcs")
        )

    def vouches_for(self, array: int, data: bytes) -> bool:
        """Whether ``data`` is the object of that array."""
        record = self.records[array]
        return len(data) == int(record["size"]) and sha256(data).digest() == bytes(record["sha256"])


def describe(objects: Sequence[bytes], rows: int, shard_rows: int) -> Marker:
    """The marker of the objects in hand, one an array, as ``shards.pack`` made them."""
    records = empty_records(len(objects), shard_rows)
    for record, data in zip(records, objects, strict=True):
        record["size"] = len(data)
        record["sha256"] = np.frombuffer(sha256(data).digest(), np.uint8)
        lengths = shards.chunk_lengths(data[-shards.tail_length(shard_rows) :], shard_rows)
        ends = np.cumsum(lengths, dtype=np.int64)[:rows]
        record["lengths"] = lengths
        whole = memoryview(data)  # slices of it are no copies
        record["crcs"][:rows] = [shards.seal_of(whole[:end]) for end in ends.tolist()]
    return Marker(rows, records)


def parse(data: bytes, place: bytes, arrays: int, shard_rows: int) -> Marker:
    """Read a marker found at ``place``.

    Raises
    ------
    ValueError
        It is damaged, or belongs elsewhere.
    """
    body, seal = data[:-SEAL], data[-SEAL:]
    if len(data) != size(arrays, shard_rows):
        raise ValueError(f"the marker has {len(data)} bytes, not {size(arrays, shard_rows)}")
    if sha256(place + body).digest() != seal:
        raise ValueError("the marker is damaged, or belongs to another shard, domain or cache")
    return Marker(
        int.from_bytes(body[:HEADER], "little"), np.frombuffer(body, _record(shard_rows), offset=HEADER)
    )


def place(
    manifest: layout.Manifest, domain: str, split: layout.SplitName, shard: int, codebook: str | None
) -> bytes:
    """What a marker is sealed with; ``codebook`` is the digest of the one that the entries are coded by."""
    return layout.canonical(
        {"binding": manifest.binding(domain), "split": split, "shard": shard, "codebook": codebook}
    )
