"""Write a cache: tokens first, then one shard of the teacher's answers at a time, committed by its marker.

Every step can be killed. What a marker vouches for is whole; everything else is done again, to the same
bytes. A shard has two markers: one for its tokens, one for all of it. What no marker vouches for is never
kept, whatever it looks like.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache import codec, layout, markers, shards
from ddk_cache.errors import CacheError, TooLargeError
from ddk_cache.extension import check_configuration, keep_splits
from ddk_cache.lock import Holder, LockedStorage, locked
from ddk_cache.marker_store import Arrays, Listing, MarkerStore
from ddk_cache.records import (
    domain_documents,
    finished_shards,
    manifest_document,
    rows_in,
    usable_state,
    vouched_arrays,
)
from ddk_cache.tables import (
    codebook_digest,
    drop_codebook,
    usable_codebook,
    write_codebook,
    write_vocabulary,
)
from ddk_cache.tokens import Vocabulary

Packed = dict[str, list[bytes]]  # each row's chunk, by array

MOST_OWN_BYTES = 1 << 32  # of what the build keeps of a domain for itself


class Writer:
    """A build's hold on a cache; made by ``open_writer``."""

    def __init__(self, storage: LockedStorage, manifest: layout.Manifest) -> None:
        self.manifest = manifest
        self._storage = storage
        # While the lock is held nobody else changes them.
        self._states: dict[str, layout.DomainState | None] = {}
        self._markers = MarkerStore(storage, manifest, self.state)

    @property
    def holder(self) -> Holder:
        """The lock's, in the process that took it: it admits others to write, and dismisses them."""
        assert isinstance(self._storage, Holder)
        return self._storage

    def state(self, domain: str) -> layout.DomainState | None:
        """How far the domain is; None until its tokens are written, or where its document is damaged."""
        if domain not in self._states:
            self._states[domain] = usable_state(self._storage, self.manifest, domain)
        return self._states[domain]

    def look_again(self, domain: str) -> None:
        """Read its state and list its shards anew: who was admitted to write may have changed them."""
        self._states.pop(domain, None)
        self._markers.list_anew(domain)

    def set_state(self, domain: str, state: layout.DomainState) -> None:
        """Lay out the domain's arrays for the rows of ``state``, list its token markers, then record it.

        Raises
        ------
        CacheError
            The list of ``state`` was lost, and the token markers are not those that were in it.
        """
        counts: dict[str, layout.SplitState] = {
            split: self._markers.list_tokens(domain, split, state.split(split)) for split in layout.SPLITS
        }
        state = state.model_copy(update=counts)
        self._storage.update(domain_documents(self.manifest, domain, state))
        self._states[domain] = state

    def read_own(self, domain: str, name: str) -> bytes | None:
        """What the build has kept of a domain for itself; None where it is larger than that can be."""
        with suppress(TooLargeError):
            return self._storage.read(layout.own_key(domain, name), MOST_OWN_BYTES)
        return None

    def write_own(self, domain: str, name: str, data: bytes | None) -> None:
        """Keep something of a domain for the build itself; None: no longer."""
        key = layout.own_key(domain, name)
        if data is None:
            self._storage.delete(key)
        else:
            self._storage.write(key, data)

    def write_tokens(
        self, domain: str, split: layout.SplitName, shard: int, rows: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a shard's token arrays, [n, S] each by name; only the last shard may have fewer rows.

        Objects that are there already stay untouched, and so does the marker over them; a shard that has
        grown is not finished any more.

        Raises
        ------
        CacheError
            Tokens that the domain's state vouches for are others: the source has changed since.
        """
        arrays = layout.token_arrays(self.manifest.seq_length)
        objects = {name: shards.pack(rows[name], arrays[name], self.manifest.shard_rows) for name in arrays}
        count = len(rows["tokens"])
        marker = markers.describe(list(objects.values()), count, self.manifest.shard_rows)
        before = self._markers.get(domain, split, shard, layout.TOKEN_MARKERS)
        is_new = before is None or before.rows != count or not before.same_rows(marker, count)
        if is_new:
            if before is not None and self._is_there(domain, split, shard, before, marker, rows):
                return
            if not self._markers.is_listed(domain, split, shard, marker):
                raise CacheError(self._markers.other_tokens(domain, split))
            self._markers.drop(domain, split, shard, layout.MARKERS, layout.TOKEN_MARKERS)
        wanted = {layout.shard_key(domain, split, name, shard): data for name, data in objects.items()}
        if not is_new:
            self._storage.update(wanted)
            self._markers.list_anew(domain)
        else:
            self._storage.write_all(wanted)
            self._markers.put(domain, split, shard, marker, layout.TOKEN_MARKERS)

    def read_tokens(self, domain: str, split: layout.SplitName, shard: int) -> Arrays:
        """A shard's token arrays, [n, S] each by name.

        Raises
        ------
        CacheError
            They are damaged, or gone. Nothing vouches for them any more then, so the next build makes them
            anew.
        """
        found = self._markers.vouched(domain, split, shard, layout.TOKEN_MARKERS)
        if len(found["tokens"]) < max(self.rows(domain, split, shard), 1):
            self._markers.drop(domain, split, shard, layout.MARKERS, layout.TOKEN_MARKERS)
            raise CacheError(
                f"{self._storage.url}: the tokens of {domain}/{split} shard {shard} are damaged: "
                "run build again"
            )
        return found

    def pack(self, split: layout.SplitName, answers: Mapping[str, NDArray[Any]]) -> Packed:
        """Some rows' answers, [n, width] each by name, as they are stored; needs no store."""
        return {name: shards.pack_rows(answers[name], a) for name, a in self._answer_arrays(split).items()}

    def write_answers(self, domain: str, split: layout.SplitName, shard: int, answers: Packed) -> None:
        """Write a shard's answers, then the marker that vouches for the shard.

        Raises
        ------
        CacheError
            The tokens that they answer are not there any more.
        """
        tokens = self._markers.get(domain, split, shard, layout.TOKEN_MARKERS)
        if tokens is None or tokens.rows != len(answers["label_logprob"]):
            raise CacheError(
                f"{self._storage.url}: the tokens of {domain}/{split} shard {shard} are gone: run build again"
            )
        names = self._answer_arrays(split)
        objects = {name: shards.join(answers[name], self.manifest.shard_rows) for name in names}
        described = markers.describe(list(objects.values()), tokens.rows, self.manifest.shard_rows)
        marker = markers.Marker(tokens.rows, np.concatenate([tokens.records, described.records]))
        # Old and new arrays must never stand under one marker.
        self._markers.drop(domain, split, shard, layout.MARKERS)
        self._storage.write_all(
            {layout.shard_key(domain, split, name, shard): data for name, data in objects.items()}
        )
        self._markers.put(domain, split, shard, marker, layout.MARKERS)

    def unfinished(self, domain: str, split: layout.SplitName) -> list[int]:
        """Numbers of the shards that lack an object: an array's, or a marker that vouches for them.

        A listing tells, however many there are. One with a marker that is damaged or another's is found where
        it is read and by ``verify``, which takes the marker away.
        """
        return self._unfinished(domain, split, self._markers.listing(domain, split))

    def _unfinished(self, domain: str, split: layout.SplitName, there: Listing) -> list[int]:
        total = layout.shards(self.split_state(domain, split).rows, self.manifest.shard_rows)
        if self.manifest.has_targets(split) and self._markers.book(domain) is None:
            return list(range(total))  # coded by tables that are lost
        done = self._markers.with_objects(there, split, layout.MARKERS, layout.TOKEN_MARKERS)
        if total - 1 in done and not self._markers.is_whole(domain, split, total - 1, layout.MARKERS):
            done.remove(total - 1)
        return [number for number in range(total) if number not in done]

    def settle(self, domain: str) -> layout.DomainState:
        """Record what is finished: the teacher's cross-entropy once the validation split is, then all of it.

        The cross-entropy is the mean over the validation split's labels, in nats and float64.
        """
        self._markers.list_anew(domain)  # others may have answered
        state = self.existing_state(domain)
        loss = None
        if not self.unfinished(domain, "validation"):
            total = 0.0
            for shard in range(layout.shards(state.validation.rows, self.manifest.shard_rows)):
                labels = self._markers.vouched(
                    domain, "validation", shard, layout.MARKERS, ["label_logprob"]
                )["label_logprob"]
                if len(labels) < self.rows(domain, "validation", shard):
                    self._markers.drop(domain, "validation", shard, layout.MARKERS)
                    raise CacheError(
                        f"{self._storage.url}: {domain}/validation shard {shard} is damaged: run build again"
                    )
                total -= float(labels.sum(dtype=np.float64))
            loss = total / state.validation.labels
        complete = loss is not None and not self.unfinished(domain, "train")
        settled = state.model_copy(update={"complete": complete, "teacher_cross_entropy": loss})
        self.set_state(domain, settled)
        return settled

    def finish(self) -> None:
        """Let the manifest tell which build's every finished domain is."""
        domains = []
        for domain in self.manifest.domains:
            state = self.existing_state(domain.name)
            domains.append(domain.model_copy(update={"splits": state.splits if state.complete else None}))
        self.manifest = self.manifest.model_copy(update={"domains": tuple(domains)})
        self._storage.update({"zarr.json": manifest_document(self.manifest)})

    def codebook(self, teacher: int = 0) -> codec.Codebook | None:
        """The tables that the codec needs; None where they are missing, or damaged in both copies.

        Tables that are then made anew are other tables if the teacher's answers differ by a bit; what was
        coded by the old ones is done again.
        """
        return usable_codebook(self._storage, teacher)

    def set_codebook(self, codebook: codec.Codebook, teacher: int = 0) -> None:
        """Keep the codec's tables, for good; what was coded by tables that are lost is to be done again."""
        before = self.codebook(teacher)
        assert before is None or codebook_digest(before) == codebook_digest(codebook)
        if before is None:
            for domain in (domain.name for domain in self.manifest.domains if domain.teacher == teacher):
                for split in filter(self.manifest.has_targets, layout.SPLITS):
                    for shard in finished_shards(self._storage, domain, split):
                        self._markers.drop(domain, split, shard, layout.MARKERS)
        write_codebook(self._storage, codebook, teacher)

    def split_state(self, domain: str, split: layout.SplitName) -> layout.SplitState:
        """A tokenised domain's counts."""
        return self.existing_state(domain).split(split)

    def existing_state(self, domain: str) -> layout.DomainState:
        """How far a tokenised domain is."""
        state = self.state(domain)
        assert state is not None
        return state

    def rows(self, domain: str, split: layout.SplitName, shard: int) -> int:
        """Rows of a shard."""
        return rows_in(self.split_state(domain, split).rows, shard, self.manifest.shard_rows)

    def tokens(self, place: tuple[str, layout.SplitName, int]) -> int:
        """About how many tokens a shard has, padding left out: the split's mean a row."""
        counts = self.split_state(*place[:2])
        return round(counts.tokens * self.rows(*place) / max(counts.rows, 1))

    def has_tokens(self, domain: str) -> bool:
        """Whether the tokens of all unfinished shards have been written; they are not read."""
        return all(self._has_tokens(domain, split) for split in layout.SPLITS)

    def _has_tokens(self, domain: str, split: layout.SplitName) -> bool:
        there = self._markers.listing(domain, split)
        missing = self._unfinished(domain, split, there)
        last = layout.shards(self.split_state(domain, split).rows, self.manifest.shard_rows) - 1
        if last in missing and not self._markers.is_whole(domain, split, last, layout.TOKEN_MARKERS):
            return False
        return set(missing) <= self._markers.with_objects(there, split, layout.TOKEN_MARKERS)

    def _answer_arrays(self, split: layout.SplitName) -> dict[str, layout.RowArray]:
        tokens = layout.token_arrays(self.manifest.seq_length)
        arrays = vouched_arrays(self.manifest, split)
        return {name: array for name, array in arrays.items() if name not in tokens}

    def _is_there(
        self,
        domain: str,
        split: layout.SplitName,
        shard: int,
        before: markers.Marker,
        marker: markers.Marker,
        rows: Mapping[str, NDArray[Any]],
    ) -> bool:
        """Whether these are the shard's tokens already, in other bytes, as another pcodec compresses them.

        Raises
        ------
        CacheError
            The rows that the domain's state speaks of have other tokens; rows beyond bind nobody.
        """
        state = self.state(domain)
        if state is None:
            return False
        total = state.split(split).rows
        count = min(rows_in(total, shard, self.manifest.shard_rows), before.rows)
        if before.same_rows(marker, count):
            return False
        old = self._markers.vouched(domain, split, shard, layout.TOKEN_MARKERS)
        if any(not np.array_equal(old[name][:count], rows[name][: len(old[name])][:count]) for name in old):
            raise CacheError(self._markers.other_tokens(domain, split))
        return len(old["tokens"]) == count == before.rows == marker.rows


@contextmanager
def open_writer(url: str, manifest: layout.Manifest, vocabulary: Vocabulary) -> Iterator[Writer]:
    """Create the cache, or go on with the one that is there, while holding its lock.

    Domains may have been added and max_tokens raised since; the manifest on disk then follows. Documents that
    are damaged are written anew.

    Raises
    ------
    ConfigError
        The cache there was built with another configuration; the message lists what differs.
    CacheError
        Another build is at work, or the place cannot be written.
    """
    with locked(url) as storage:
        there = check_configuration(storage, manifest)
        write_vocabulary(storage, vocabulary)
        manifest = keep_splits(storage, there, manifest)
        storage.update({"zarr.json": manifest_document(manifest)})
        for teacher in range(len(manifest.teachers)):
            names = manifest.domains_of(teacher)
            if not any(storage.read(f"{name}/zarr.json") for name in names):
                drop_codebook(storage, teacher)  # nothing is coded by it, and it may be another teacher's
            elif (codebook := usable_codebook(storage, teacher)) is not None:
                write_codebook(storage, codebook, teacher)
        yield Writer(storage, manifest)
