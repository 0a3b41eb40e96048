"""The markers that a reader has seen, as many as fit into a limit; the least recently used go first."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache import layout, shards
from ddk_cache.errors import CacheError
from ddk_cache.markers import Marker, empty_records
from ddk_cache.records import read_markers, split_arrays
from ddk_cache.storage import Storage
from ddk_cache.token_seals import OF_ANOTHER_BUILD, TokenSeals, read_seals

MOST_BYTES = 128 << 20  # of markers, in a process

Place = tuple[str, layout.SplitName, int]  # domain, split, shard


class MarkerCache:
    """Fetches a shard's marker when the shard is first touched. Safe to call from several threads.

    Parameters
    ----------
    codebooks
        The digest of each domain's codebook; None where it has none.
    states
        How far each domain is.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: layout.Manifest,
        codebooks: Mapping[str, str | None],
        states: Mapping[str, layout.DomainState],
    ) -> None:
        self._storage, self._manifest, self._codebooks, self._states = storage, manifest, codebooks, states
        self._forget()

    def _forget(self) -> None:
        self._held: OrderedDict[Place, Marker] = OrderedDict()
        self._seals: dict[tuple[str, layout.SplitName], TokenSeals] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("_storage", "_manifest", "_codebooks", "_states")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()

    def get(self, domain: str, split: layout.SplitName, numbers: Sequence[int]) -> dict[int, Marker]:
        """The markers of the numbered shards.

        Raises
        ------
        CacheError
            One is missing, damaged, or another shard's or build's.
        """
        found: dict[int, Marker] = {}
        with self._lock:
            for number in numbers:
                if (marker := self._held.get((domain, split, number))) is not None:
                    self._held.move_to_end((domain, split, number))
                    found[number] = marker
        missing = [number for number in numbers if number not in found]
        if not missing:
            return found
        fetched = self._fetch(domain, split, missing)
        with self._lock:
            for number, marker in fetched.items():
                if (domain, split, number) not in self._held:
                    self._held[domain, split, number] = marker
                    self._bytes += marker.records.nbytes
            while self._bytes > MOST_BYTES and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].records.nbytes
        return found | fetched

    def _fetch(self, domain: str, split: layout.SplitName, numbers: Sequence[int]) -> dict[int, Marker]:
        if self._manifest.version == 1:
            return self._indices(domain, split, numbers)
        book, seals = self._codebooks[domain], self._list(domain, split)
        found: dict[int, Marker] = {}
        for number, marker in zip(
            numbers,
            read_markers(self._storage, self._manifest, domain, split, numbers, book),
            strict=True,
        ):
            if isinstance(marker, CacheError):
                raise CacheError(f"{marker}: run ddk-cache verify, then build again") from marker
            if not seals.knows(number, marker):
                key = layout.marker_key(domain, split, number)
                raise CacheError(
                    f"{self._storage.url}/{key}: {OF_ANOTHER_BUILD}: run ddk-cache verify, then build again"
                )
            found[number] = marker
        return found

    def _list(self, domain: str, split: layout.SplitName) -> TokenSeals:
        """The list of the split's token markers, read when the first of its shards is touched."""
        if (domain, split) not in self._seals:
            counts = self._states[domain].split(split)
            self._seals[domain, split] = read_seals(self._storage, self._manifest, domain, split, counts)
        return self._seals[domain, split]

    def _indices(self, domain: str, split: layout.SplitName, numbers: Sequence[int]) -> dict[int, Marker]:
        """What version 1 has in a marker's place: the arrays' own indices, without the rows' crc32c."""
        rows = self._manifest.shard_rows
        arrays = split_arrays(self._manifest, split)
        keys = [layout.shard_key(domain, split, name, number) for number in numbers for name in arrays]
        tails = self._storage.read_ranges([(key, -shards.tail_length(rows), 0) for key in keys])
        records = empty_records(len(keys), rows)
        for key, tail, record in zip(keys, tails, records, strict=True):
            try:
                record["lengths"] = shards.chunk_lengths(tail, rows)
            except ValueError as error:
                raise CacheError(f"{self._storage.url}/{key}: {error}") from error
        by_shard = records.reshape(len(numbers), len(arrays))
        present = (by_shard["lengths"] > 0).sum(axis=2).min(axis=1, initial=rows)
        return {
            number: Marker(int(count), part)
            for number, count, part in zip(numbers, present, by_shard, strict=True)
        }


def starts(lengths: NDArray[np.uint32]) -> NDArray[np.int64]:
    """First byte of each chunk [R]: objects may be larger than 4 GiB."""
    ends: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
    return ends - lengths
