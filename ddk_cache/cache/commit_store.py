"""The commit records of a build: which exist, what they cover, and how they are put and dropped."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.codebooks import codebook_digest, usable_codebook
from ddk_cache.cache.commit_reader import CommitReader
from ddk_cache.cache.metadata import finished_shards, size_limits, split_arrays
from ddk_cache.errors import CacheError
from ddk_cache.format import layout, shards
from ddk_cache.format.commit_record import CommitRecord
from ddk_cache.format.layout import COMMITS, Kind, ShardKey, SplitName
from ddk_cache.storage.lock import LockedStorage

Arrays = dict[str, NDArray[Any]]
Listing = defaultdict[str, set[int]]  # the shards that have an object, by array


class CommitStore:
    """Reads, puts and drops the commit records of a build, and lists its shards.

    Parameters
    ----------
    state
        Returns the state of a domain; None before its tokens are recorded.
    """

    def __init__(
        self,
        storage: LockedStorage,
        manifest: layout.Manifest,
        state: Callable[[str], layout.DomainState | None],
    ) -> None:
        self._storage, self._manifest, self._state = storage, manifest, state
        self._reader = CommitReader(storage, manifest, self.codebook_digest)
        self._codebooks: dict[int, str] = {}  # digests by teacher_index; a codebook never changes
        # A listing is valid while its domain has the version at which the listing began. Versions are
        # objects, not counters: several threads may invalidate at once.
        self._versions: dict[str, object] = {}
        self._listings: dict[tuple[str, SplitName], tuple[object, Listing]] = {}

    def get(self, key: ShardKey, kind: Kind) -> CommitRecord | None:
        """Return a shard's record; None where it is missing, damaged or of another build."""
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

        ``names``: of the arrays to read; by default all that a record of that kind covers.
        """
        arrays = split_arrays(self._manifest, key.split, kind)
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
        listing = self._listing(domain, split)
        arrays = {name for kind in kinds for name in split_arrays(self._manifest, split, kind)}
        return set.intersection(*(listing[name] for name in (*kinds, *arrays)))

    def invalidate_listing(self, domain: str) -> None:
        """Forget which shards of a domain were listed."""
        self._versions[domain] = object()

    def codebook_digest(self, domain: str) -> str | None:
        """Return the digest of the codebook that encodes a domain; None where it is lost."""
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

    def _listing(self, domain: str, split: SplitName) -> Listing:
        version = self._versions.get(domain)
        cached = self._listings.get((domain, split))
        if cached is None or cached[0] is not version:
            cached = version, self._list(f"{domain}/{split}")
            self._listings[domain, split] = cached
        return cached[1]

    def _list(self, prefix: str) -> Listing:
        listing: Listing = defaultdict(set)
        for key in self._storage.sizes(prefix):
            array, _, chunk = key.removeprefix(f"{prefix}/").partition("/c/")
            if (shard := chunk.removesuffix("/0")).isdecimal():
                listing[array].add(int(shard))
        return listing

    def _rows(self, key: ShardKey) -> int:
        state = self._state(key.domain)
        assert state is not None
        return layout.rows_in(state.split(key.split).rows, key.shard, self._manifest.shard_rows)
