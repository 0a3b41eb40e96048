"""Read commit records, and keep those that a reader has used."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.metadata import split_arrays
from ddk_cache.errors import CacheError
from ddk_cache.format.commit_record import CommitRecord, parse, record_size, shard_identity
from ddk_cache.format.layout import COMMITS, Kind, Manifest, ShardKey, SplitName
from ddk_cache.storage.storage import Storage

MOST_BYTES = 128 << 20  # of records that one process keeps


class CommitReader:
    """Reads the commit records of a cache.

    Parameters
    ----------
    codebook_digest
        Returns the digest of a domain's codebook; None where it is lost.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, codebook_digest: Callable[[str], str | None]
    ) -> None:
        self.storage, self.manifest, self.codebook_digest = storage, manifest, codebook_digest

    def identity(self, key: ShardKey, kind: Kind) -> bytes:
        """Return what the digest of a shard's record covers besides the record."""
        has_entries = kind == COMMITS and self.manifest.has_targets(key.split)
        return shard_identity(self.manifest, key, self.codebook_digest(key.domain) if has_entries else None)

    def read(self, keys: Sequence[ShardKey], kind: Kind) -> list[CommitRecord | CacheError]:
        """Return the records of several shards, or why one cannot be used.

        Raises
        ------
        UnreachableError
            The store does not answer, which says nothing about a record.
        """
        most = record_size(len(split_arrays(self.manifest, keys[0].split, kind)), self.manifest.shard_rows)
        objects = self.storage.read_all({key.object(kind): most for key in keys})
        return [self._parse(key, kind, data) for key, data in zip(keys, objects, strict=True)]

    def _parse(self, key: ShardKey, kind: Kind, data: bytes | None) -> CommitRecord | CacheError:
        where = f"{self.storage.url}/{key.object(kind)}"
        if data is None:
            return CacheError(f"{where}: is missing, or larger than it can be")
        try:
            return parse(data, self.identity(key, kind), len(split_arrays(self.manifest, key.split, kind)))
        except ValueError as error:
            return CacheError(f"{where}: {error}")


class CommitCache:
    """Keeps the commit records that a reader has used; drops the least recently used beyond MOST_BYTES.

    Safe to call from several threads. A pickled copy begins empty.
    """

    def __init__(self, reader: CommitReader) -> None:
        self._reader = reader
        self._forget()

    def _forget(self) -> None:
        self._records: OrderedDict[ShardKey, CommitRecord] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_reader": self._reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def get(self, domain: str, split: SplitName, shards: Sequence[int]) -> dict[int, CommitRecord]:
        """Return the records of some shards of a split.

        Raises
        ------
        CacheError
            One is missing, damaged, or of another shard or build.
        """
        keys = [ShardKey(domain, split, shard) for shard in shards]
        records: dict[int, CommitRecord] = {}
        with self._lock:
            for key in keys:
                if (record := self._records.get(key)) is not None:
                    self._records.move_to_end(key)
                    records[key.shard] = record
        missing = [key for key in keys if key.shard not in records]
        if not missing:
            return records
        new = dict(zip(missing, self._read(missing), strict=True))
        with self._lock:
            for key, record in new.items():
                if key not in self._records:
                    self._records[key] = record
                    self._bytes += record.arrays.nbytes
            while self._bytes > MOST_BYTES and len(self._records) > 1:
                self._bytes -= self._records.popitem(last=False)[1].arrays.nbytes
        return records | {key.shard: record for key, record in new.items()}

    def _read(self, keys: Sequence[ShardKey]) -> list[CommitRecord]:
        records: list[CommitRecord] = []
        for record in self._reader.read(keys, COMMITS):
            if isinstance(record, CacheError):
                raise CacheError(f"{record}: run ddk-cache verify, then build again") from record
            records.append(record)
        return records


def starts(lengths: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the first byte of each chunk [R]; an object may be larger than 4 GiB."""
    ends: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
    return ends - lengths
