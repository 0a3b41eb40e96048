"""Read, keep, put and drop commit records; format/commit_record.py defines them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.codebooks import codebook_digest, usable_codebook
from ddk_cache.cache.metadata import Listing, finished_shards, list_shards, size_limits, split_arrays
from ddk_cache.errors import CacheError
from ddk_cache.format import layout, shards
from ddk_cache.format.commit_record import CommitRecord, parse, record_size, shard_identity
from ddk_cache.format.layout import COMMITS, Kind, Manifest, ShardKey, SplitName
from ddk_cache.storage.lock import LockedStorage
from ddk_cache.storage.storage import Storage

Arrays = dict[str, NDArray[Any]]

MOST_BYTES = 128 << 20  # of records that one process keeps
BYTES_AT_ONCE = 32 << 20  # of records that are read at a time; at least one


class CommitReader:
    """Reads the commit records of a cache.

    ``codebook_digest`` returns the digest of a domain's codebook; None if it is lost.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, codebook_digest: Callable[[str], str | None]
    ) -> None:
        self.storage, self.manifest, self.codebook_digest = storage, manifest, codebook_digest

    def identity(self, key: ShardKey, kind: Kind) -> bytes:
        """Return what the digest of a shard's record covers besides the record."""
        has_entries = kind == COMMITS and self.manifest.has_targets(key.split)
        return shard_identity(self.manifest, key, self.codebook_digest(key.domain) if has_entries else None)

    def read(self, keys: Sequence[ShardKey], kind: Kind) -> Iterator[CommitRecord | CacheError]:
        """Yield the records of several shards of one split, or the error of each unusable one.

        Raises UnreachableError if the store does not respond: that says nothing about a record.
        """
        if not keys:
            return
        arrays = len(split_arrays(self.manifest, keys[0].domain, keys[0].split, kind))
        most = record_size(arrays, self.manifest.shard_rows)
        step = max(1, BYTES_AT_ONCE // most)
        for first in range(0, len(keys), step):
            part = keys[first : first + step]
            objects = self.storage.read_all({key.object(kind): most for key in part})
            yield from map(self._parse, part, repeat(kind), objects, repeat(arrays))

    def _parse(self, key: ShardKey, kind: Kind, data: bytes | None, arrays: int) -> CommitRecord | CacheError:
        where = f"{self.storage.url}/{key.object(kind)}"
        if data is None:
            return CacheError(f"{where}: is missing, or larger than it can be")
        try:
            return parse(data, self.identity(key, kind), arrays)
        except ValueError as error:
            return CacheError(f"{where}: {error}")


class CommitCache:
    """Keeps the commit records that a reader has used; drops the least recently used beyond MOST_BYTES.

    Safe to call from several threads. A pickled copy begins empty.
    """

    def __init__(self, reader: CommitReader) -> None:
        self._reader = reader
        self._records: OrderedDict[ShardKey, CommitRecord] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["CommitCache"], tuple[CommitReader]]:
        return CommitCache, (self._reader,)

    def get(self, key: ShardKey) -> CommitRecord:
        """Return the record of a shard; raise CacheError as ``read`` does."""
        ((_, record),) = self.read([key])
        return record

    def read(self, keys: Sequence[ShardKey]) -> Iterator[tuple[ShardKey, CommitRecord]]:
        """Yield some shards of a split with their records, those that are kept first.

        Raises CacheError if a record is missing, damaged, or of another shard or build.
        """
        missing = []
        for key in keys:
            with self._lock:
                record = self._records.get(key)
                if record is not None:
                    self._records.move_to_end(key)
            if record is None:
                missing.append(key)
            else:
                yield key, record
        for key, result in zip(missing, self._reader.read(missing, COMMITS), strict=True):
            if isinstance(result, CacheError):
                raise CacheError(f"{result}: run ddk-cache verify, then build again") from result
            self._keep(key, result)
            yield key, result

    def _keep(self, key: ShardKey, record: CommitRecord) -> None:
        with self._lock:
            if key not in self._records:
                self._records[key] = record
                self._bytes += record.arrays.nbytes
            while self._bytes > MOST_BYTES and len(self._records) > 1:
                self._bytes -= self._records.popitem(last=False)[1].arrays.nbytes


class CommitStore:
    """Reads, puts and drops the commit records of a build, and lists its shards.

    ``state`` returns the state of a domain; None before its tokens are written.
    """

    def __init__(
        self, storage: LockedStorage, manifest: Manifest, state: Callable[[str], layout.DomainState | None]
    ) -> None:
        self._storage, self._manifest, self._state = storage, manifest, state
        self._reader = CommitReader(storage, manifest, self.codebook_digest)
        self._codebooks: dict[int, str] = {}  # digests by teacher_index; a codebook never changes
        # A listing is valid while its domain has the version at which the listing began. Versions are
        # objects, not counters: several threads may invalidate at once.
        self._versions: dict[str, object] = {}
        self._listings: dict[tuple[str, SplitName], tuple[object, Listing]] = {}

    def get(self, key: ShardKey, kind: Kind) -> CommitRecord | None:
        """Return a shard's record; None if it is missing, damaged or of another build."""
        (record,) = self._reader.read([key], kind)
        return None if isinstance(record, CacheError) else record

    def put(self, key: ShardKey, kind: Kind, record: CommitRecord) -> None:
        """Commit a shard."""
        self._storage.write(key.object(kind), record.serialise(self._reader.identity(key, kind)))
        self.invalidate_listing(key.domain)

    def drop(self, key: ShardKey, *kinds: Kind) -> None:
        """Delete a shard's records, so that the shard is written again."""
        for kind in kinds:
            self._storage.delete(key.object(kind))
        self.invalidate_listing(key.domain)

    def covers_all_rows(self, key: ShardKey, kind: Kind) -> bool:
        """Return whether a record covers as many rows as the shard has: the last shard may have grown."""
        record = self.get(key, kind)
        return record is not None and record.rows == self._rows(key)

    def read_covered(self, key: ShardKey, kind: Kind, names: Sequence[str] = ()) -> Arrays:
        """Return the first rows of a shard that equal its record in all arrays: [n, width] each.

        ``names`` selects arrays; by default all that a record of that kind covers.
        """
        arrays = split_arrays(self._manifest, key.domain, key.split, kind)
        names = names or list(arrays)
        record = self.get(key, kind)
        if record is None:
            return {name: np.empty((0, arrays[name].width), arrays[name].dtype) for name in names}
        entries = dict(zip(arrays, record.arrays, strict=True))
        objects = self._storage.read_all(size_limits(self._manifest, key, names))
        rows: Arrays = {}
        for name, data in zip(names, objects, strict=True):
            lengths, crcs = (entries[name][field][: record.rows] for field in ("lengths", "crcs"))
            rows[name] = shards.decode_covered(data or b"", arrays[name], lengths, crcs)
        count = min(self._rows(key), *(len(values) for values in rows.values()))
        return {name: values[:count] for name, values in rows.items()}

    def committed(self, domain: str, split: SplitName, *kinds: Kind) -> set[int]:
        """Return the shards that have records of these kinds, and every object that the records cover.

        They are listed, not read.
        """
        version, cached = self._versions.get(domain), self._listings.get((domain, split))
        if cached is None or cached[0] is not version:
            cached = version, list_shards(self._storage.sizes(f"{domain}/{split}"))
            self._listings[domain, split] = cached
        arrays = {name for kind in kinds for name in split_arrays(self._manifest, domain, split, kind)}
        return set.intersection(*(cached[1][f"{domain}/{split}/{name}"] for name in (*kinds, *arrays)))

    def invalidate_listing(self, domain: str) -> None:
        """Forget which shards of a domain were listed."""
        self._versions[domain] = object()

    def codebook_digest(self, domain: str) -> str | None:
        """Return the digest of the codebook that encodes a domain; None if it is lost."""
        teacher_index = self._manifest.domain(domain).teacher_index
        if teacher_index not in self._codebooks:
            codebook = usable_codebook(self._storage, teacher_index)
            if codebook is None:
                return None
            self._codebooks[teacher_index] = codebook_digest(codebook)
        return self._codebooks[teacher_index]

    def drop_coded(self, teacher_index: int) -> None:
        """Drop the records of every shard that a teacher's codebook encodes."""
        for domain in self._manifest.domains_of(teacher_index):
            for split in filter(self._manifest.has_targets, layout.SPLITS):
                for shard in finished_shards(self._storage, domain, split):
                    self.drop(ShardKey(domain, split, shard), COMMITS)
        self._codebooks.pop(teacher_index, None)

    def encoded_otherwise(self, teacher_index: int) -> list[ShardKey]:
        """Return the committed shards of a teacher if its codebook encoded none of them."""
        committed = [
            ShardKey(domain, split, shard)
            for domain in self._manifest.domains_of(teacher_index)
            if self._state(domain) is not None
            for split in filter(self._manifest.has_targets, layout.SPLITS)
            for shard in sorted(self.committed(domain, split, COMMITS))
        ]
        return [] if any(self.get(key, COMMITS) for key in committed) else committed

    def _rows(self, key: ShardKey) -> int:
        state = self._state(key.domain)
        assert state is not None
        return layout.rows_in(state.split(key.split).rows, key.shard, self._manifest.shard_rows)
