"""The markers of a build: which there are, what they vouch for, and the list of those over tokens."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache import layout, shards
from ddk_cache.errors import CacheError, UnreachableError
from ddk_cache.lock import LockedStorage
from ddk_cache.markers import SEAL, Marker, place
from ddk_cache.records import read_markers, rows_in, shard_limits, vouched_arrays
from ddk_cache.tables import codebook_digest, usable_codebook
from ddk_cache.token_seals import TokenSeals, digest, read_seals, seal_of

Arrays = dict[str, NDArray[Any]]
Listing = defaultdict[str, set[int]]


class MarkerStore:
    """What a writer's markers say.

    Parameters
    ----------
    state
        How far a domain is; None before its tokens are recorded.
    """

    def __init__(
        self,
        storage: LockedStorage,
        manifest: layout.Manifest,
        state: Callable[[str], layout.DomainState | None],
    ) -> None:
        self._storage, self._manifest, self._state = storage, manifest, state
        self._digests: dict[int, str] = {}  # of codebooks, which never change, by teacher
        self._written: dict[tuple[str, layout.SplitName], dict[int, bytes]] = defaultdict(dict)
        self._seals: dict[tuple[str, layout.SplitName, str | None], TokenSeals] = {}
        # Of each domain its last change, and of each split what there was by a listing begun since.
        self._changes: dict[str, object] = {}
        self._listings: dict[tuple[str, layout.SplitName], tuple[object, Listing]] = {}

    def get(self, domain: str, split: layout.SplitName, shard: int, kind: str) -> Marker | None:
        """A shard's marker; None where there is none of this build's."""
        book = self._book(domain, split, kind)
        (found,) = read_markers(self._storage, self._manifest, domain, split, [shard], book, kind)
        if isinstance(found, UnreachableError):  # that says nothing of what is there
            raise found
        if isinstance(found, CacheError):
            return None
        return found if self.is_listed(domain, split, shard, found) else None

    def put(self, domain: str, split: layout.SplitName, shard: int, marker: Marker, kind: str) -> None:
        """Let a marker vouch for a shard."""
        if kind == layout.TOKEN_MARKERS:
            self._written[domain, split][shard] = seal_of(marker, self._manifest, domain, split, shard)
        at = place(self._manifest, domain, split, shard, self._book(domain, split, kind))
        self._storage.write(layout.marker_key(domain, split, shard, kind), marker.pack(at))
        self.list_anew(domain)

    def drop(self, domain: str, split: layout.SplitName, shard: int, *kinds: str) -> None:
        """Let nothing of these kinds vouch for a shard any more."""
        for kind in kinds:
            self._storage.delete(layout.marker_key(domain, split, shard, kind))
        self.list_anew(domain)

    def list_anew(self, domain: str) -> None:
        """What was listed of a domain may have changed."""
        self._changes[domain] = object()

    def is_listed(self, domain: str, split: layout.SplitName, shard: int, marker: Marker) -> bool:
        """Whether a marker's tokens are those of which the domain's state tells; True where it does not."""
        seals = self._listed(domain, split)
        return seals is None or seals.knows(shard, marker)

    def list_tokens(
        self, domain: str, split: layout.SplitName, counts: layout.SplitState
    ) -> layout.SplitState:
        """``counts`` with the digest of the list of their token markers, which is written if it is not there.

        Raises
        ------
        CacheError
            The list was lost, and the markers are not those that were in it.
        """
        if counts.token_seals is not None and self._read(domain, split, counts) is not None:
            return counts
        seals = self._collect(domain, split, layout.shards(counts.rows, self._manifest.shard_rows))
        if counts.token_seals not in (None, digest(seals)):
            raise CacheError(self.other_tokens(domain, split))
        if seals:
            self._storage.write(layout.seals_key(domain, split), b"".join(seals))
        return counts.model_copy(update={"token_seals": digest(seals)})

    def _collect(self, domain: str, split: layout.SplitName, count: int) -> list[bytes]:
        """The seals of so many token markers: as written here, as listed before, or as they are there."""
        before = self._listed(domain, split)
        whole = [] if before is None else before.seals[: before.rows // self._manifest.shard_rows]
        known = dict(enumerate(whole)) | self._written[domain, split]
        others = [number for number in range(count) if number not in known]
        keys = [layout.marker_key(domain, split, number, layout.TOKEN_MARKERS) for number in others]
        found = self._storage.read_ranges([(key, -SEAL, 0) for key in keys])
        known |= zip(others, found, strict=True)
        return [known[number] for number in range(count)]

    def other_tokens(self, domain: str, split: layout.SplitName) -> str:
        """What to say of tokens that are not those of the domain's source, by what is known of them."""
        listed = self._listed(domain, split)
        if listed is not None and listed.seals:
            why, then = f"the source of domain {domain!r} has changed since the cache was built", ""
        else:
            why = (
                f"the tokens of domain {domain!r} are not those of its source: it has changed since the "
                "cache was built, or they are of another build"
            )
            then = f", or remove {domain} there to have it made anew"
        return f"{self._storage.url}: {why}: build into a new cache{then}"

    def _listed(self, domain: str, split: layout.SplitName) -> TokenSeals | None:
        """The list that goes with the domain's state; None without a state, or where it is damaged."""
        state = self._state(domain)
        return None if state is None else self._read(domain, split, state.split(split))

    def _read(self, domain: str, split: layout.SplitName, counts: layout.SplitState) -> TokenSeals | None:
        key = domain, split, counts.token_seals
        if key not in self._seals:
            try:
                self._seals[key] = read_seals(self._storage, self._manifest, domain, split, counts)
            except UnreachableError:
                raise
            except CacheError:
                return None
        return self._seals[key]

    def listing(self, domain: str, split: layout.SplitName) -> Listing:
        """The shards of which each of a split's arrays has an object, its markers' among them, by name."""
        key, change = (domain, split), self._changes.get(domain)
        if key not in self._listings or self._listings[key][0] is not change:
            self._listings[key] = change, self._list(domain, split)
        return self._listings[key][1]

    def _list(self, domain: str, split: layout.SplitName) -> Listing:
        there: Listing = defaultdict(set)
        for key in self._storage.sizes(f"{domain}/{split}"):
            array, _, chunk = key.removeprefix(f"{domain}/{split}/").partition("/c/")
            if (number := chunk.removesuffix("/0")).isdigit():
                there[array].add(int(number))
        return there

    def with_objects(self, there: Listing, split: layout.SplitName, *kinds: str) -> set[int]:
        """The listed shards that have their markers of these kinds, and every array that these vouch for."""
        arrays = {name for kind in kinds for name in vouched_arrays(self._manifest, split, kind)}
        return set.intersection(*(there[name] for name in (*kinds, *arrays)))

    def is_whole(self, domain: str, split: layout.SplitName, shard: int, kind: str) -> bool:
        """Whether a marker vouches for as many rows as the shard has: the last one may have grown since."""
        marker = self.get(domain, split, shard, kind)
        return marker is not None and marker.rows == self._rows(domain, split, shard)

    def vouched(
        self,
        domain: str,
        split: layout.SplitName,
        shard: int,
        kind: str,
        names: Sequence[str] | None = None,
    ) -> Arrays:
        """The first rows of a shard, as many as its marker vouches for in all arrays: [n, width] each."""
        arrays = vouched_arrays(self._manifest, split, kind)
        names = list(arrays) if names is None else names
        empty = {name: np.empty((0, arrays[name].width), arrays[name].dtype) for name in names}
        marker = self.get(domain, split, shard, kind)
        if marker is None:
            return empty
        records = dict(zip(arrays, marker.records, strict=True))
        objects = self._storage.read_all(shard_limits(self._manifest, domain, split, shard, names))
        found = {}
        for name, data in zip(names, objects, strict=True):
            lengths, crcs = (records[name][field][: marker.rows] for field in ("lengths", "crcs"))
            found[name] = shards.unpack_vouched(data or b"", arrays[name], lengths, crcs)
        count = min(self._rows(domain, split, shard), *(len(rows) for rows in found.values()))
        return {name: rows[:count] for name, rows in found.items()}

    def _rows(self, domain: str, split: layout.SplitName, shard: int) -> int:
        state = self._state(domain)
        assert state is not None
        return rows_in(state.split(split).rows, shard, self._manifest.shard_rows)

    def book(self, domain: str) -> str | None:
        """The digest of the codebook that a domain's entries are coded by; None where it is lost."""
        teacher = self._manifest.domain(domain).teacher
        if teacher not in self._digests:
            codebook = usable_codebook(self._storage, teacher)
            if codebook is None:
                return None
            self._digests[teacher] = codebook_digest(codebook)
        return self._digests[teacher]

    def _book(self, domain: str, split: layout.SplitName, kind: str) -> str | None:
        """The digest that a marker of that kind is sealed with."""
        return self.book(domain) if kind == layout.MARKERS and self._manifest.has_targets(split) else None
