"""The list of a split's token markers, whose digest stands in the domain's state.

A marker's seal says where it belongs. Two builds of one configuration, from texts that have changed between
them, have the same places: what tells their shards apart is this list, made once all tokens are written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from ddk_cache import layout
from ddk_cache.errors import CacheError
from ddk_cache.markers import SEAL, Marker, place
from ddk_cache.records import rows_in
from ddk_cache.storage import Storage

OF_ANOTHER_BUILD = "the shard's tokens are those of another build"


def digest(seals: Sequence[bytes]) -> str:
    """What the state has of a list."""
    return sha256(b"".join(seals)).hexdigest()


def seal_of(
    marker: Marker, manifest: layout.Manifest, domain: str, split: layout.SplitName, shard: int
) -> bytes:
    """The seal of a shard's token marker, from that marker or the one for the whole shard."""
    arrays = len(layout.token_arrays(manifest.seq_length))
    return marker.token_seal(place(manifest, domain, split, shard, None), arrays)


@dataclass(frozen=True)
class TokenSeals:
    """A split's list."""

    manifest: layout.Manifest
    domain: str
    split: layout.SplitName
    rows: int
    seals: Sequence[bytes]
    """One a shard; none at all in a cache from before there were lists."""

    def knows(self, shard: int, marker: Marker) -> bool:
        """Whether the shard's marker is of the build that made the list.

        One that speaks of another number of rows than the shard has is for its reader to judge: a build that
        was killed while it added rows leaves such a one.
        """
        if not self.seals or marker.rows != rows_in(self.rows, shard, self.manifest.shard_rows):
            return True
        return seal_of(marker, self.manifest, self.domain, self.split, shard) == self.seals[shard]


def read_seals(
    storage: Storage,
    manifest: layout.Manifest,
    domain: str,
    split: layout.SplitName,
    state: layout.SplitState,
) -> TokenSeals:
    """The list of a split.

    Raises
    ------
    CacheError
        It is missing, or not the one that the state tells of.
    """
    count = layout.shards(state.rows, manifest.shard_rows)
    seals: list[bytes] = []
    if state.token_seals is not None:
        key = layout.seals_key(domain, split)
        data = storage.read(key, SEAL * count) if count else b""
        if data is None or len(data) != SEAL * count or sha256(data).hexdigest() != state.token_seals:
            raise CacheError(f"{storage.url}/{key}: is missing or damaged: run build again")
        seals = [data[at : at + SEAL] for at in range(0, len(data), SEAL)]
    return TokenSeals(manifest, domain, split, state.rows, seals)
