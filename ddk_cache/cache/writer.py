"""Write a cache: tokens first, then the teacher's answers shard by shard; a commit record ends each shard.

A build may be killed at any step. The shards that have a commit record are complete; all others are written
again, with the same bytes. A shard has two records: one for its tokens, one for all of its arrays.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.codebooks import (
    codebook_digest,
    drop_codebook,
    usable_codebook,
    write_codebook,
    write_vocabulary,
)
from ddk_cache.cache.commits import Arrays, CommitStore
from ddk_cache.cache.compatibility import check_configuration
from ddk_cache.cache.metadata import (
    answer_arrays,
    domain_documents,
    manifest_document,
    usable_state,
)
from ddk_cache.errors import CacheError, TooLargeError
from ddk_cache.format import layout, shards
from ddk_cache.format.codebook import Codebook
from ddk_cache.format.commit_record import CommitRecord, describe
from ddk_cache.format.layout import COMMITS, TOKEN_COMMITS, Kind, ShardKey, SplitName
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.storage.lock import Holder, LockedStorage, locked

EncodedRows = dict[str, list[bytes]]  # each row's chunk, by array

MOST_BLOB_BYTES = 1 << 32


class Writer:
    """Writes the cache of one build; made by ``open_writer``."""

    def __init__(self, storage: LockedStorage, manifest: layout.Manifest) -> None:
        self.manifest = manifest
        self._storage = storage
        # Cached: no other process changes them while the lock is held.
        self._states: dict[str, layout.DomainState | None] = {}
        self._commits = CommitStore(storage, manifest, self.state)

    @property
    def holder(self) -> Holder:
        """The holder of the lock, in the process that took it; it grants and revokes write tokens."""
        assert isinstance(self._storage, Holder)
        return self._storage

    @property
    def url(self) -> str:
        return self._storage.url

    def state(self, domain: str) -> layout.DomainState | None:
        """Return the state of a domain; None if its tokens are not written or it is damaged."""
        if domain not in self._states:
            self._states[domain] = usable_state(self._storage, self.manifest, domain)
        return self._states[domain]

    def existing_state(self, domain: str) -> layout.DomainState:
        """Return the state of a tokenised domain."""
        state = self.state(domain)
        assert state is not None
        return state

    def split_state(self, domain: str, split: SplitName) -> layout.SplitState:
        """Return the size of a split of a tokenised domain."""
        return self.existing_state(domain).split(split)

    def set_state(self, domain: str, state: layout.DomainState) -> None:
        """Write the documents of a domain's arrays for the rows of ``state``, then the state."""
        self._storage.update(domain_documents(self.manifest, domain, state))
        self._states[domain] = state

    def read_blob(self, domain: str, name: str) -> bytes | None:
        """Return a blob of the build; None if it is missing or too large."""
        with suppress(TooLargeError):
            return self._storage.read(layout.blob_key(domain, name), MOST_BLOB_BYTES)
        return None

    def write_blob(self, domain: str, name: str, data: bytes | None) -> None:
        """Store a blob for the build beside a domain; None deletes it."""
        key = layout.blob_key(domain, name)
        if data is None:
            self._storage.delete(key)
        else:
            self._storage.write(key, data)

    def write_tokens(
        self, domain: str, split: SplitName, shard: int, rows: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a shard's token arrays, [n, S] each by name; only the last shard may have fewer rows.

        Existing tokens and their answers stay unchanged; a shard that has grown has to be answered again.

        Raises CacheError if the domain's state covers other tokens: the source has changed.
        """
        key = ShardKey(domain, split, shard)
        count = len(rows["tokens"])
        shard_rows = self.manifest.rows_per_shard(shard * self.manifest.shard_rows + count)
        arrays = self.manifest.token_arrays(domain)
        encoded = {name: shards.encode(rows[name], array, shard_rows) for name, array in arrays.items()}
        new = describe(list(encoded.values()), count, shard_rows)
        objects = {key.object(name): data for name, data in encoded.items()}
        old = self._commits.get(key, TOKEN_COMMITS)
        if old is not None:
            if old.has_prefix(new):
                self._storage.update(objects)  # an object may have been lost
                self._commits.invalidate_listing(domain)
                return
            if self._has_equal_tokens(key, old, new, rows):
                return
        self._commits.drop(key, COMMITS, TOKEN_COMMITS)
        self._storage.write_all(objects)
        self._commits.put(key, TOKEN_COMMITS, new)

    def _has_equal_tokens(
        self, key: ShardKey, old: CommitRecord, new: CommitRecord, rows: Mapping[str, NDArray[Any]]
    ) -> bool:
        """Return whether the shard has these tokens, encoded differently, as by another release of pcodec.

        Raises CacheError if the rows that the domain's state covers have other tokens.
        """
        state = self.state(key.domain)
        if state is None:
            return False
        total = state.split(key.split).rows
        covered = min(layout.rows_in(total, key.shard, self.manifest.shard_rows), old.rows)
        if old.same_rows(new, covered):  # and more rows follow
            return False
        stored = self._commits.read_covered(key, TOKEN_COMMITS)
        count = min(len(stored["tokens"]), covered)
        if any(not np.array_equal(values[:count], rows[name][:count]) for name, values in stored.items()):
            raise CacheError(
                f"{self._storage.url}: the source of domain {key.domain!r} has changed since the cache was "
                f"built: build into a new cache, or remove the folder {key.domain} to build the domain again"
            )
        return count == covered == old.rows == new.rows

    def read_tokens(self, domain: str, split: SplitName, shard: int) -> Arrays:
        """Return a shard's token arrays, [n, S] each by name.

        Raises CacheError if they are damaged or missing, and drops their records: the next build writes them.
        """
        key = ShardKey(domain, split, shard)
        tokens = self._commits.read_covered(key, TOKEN_COMMITS)
        if len(tokens["tokens"]) < max(self.rows(*key), 1):
            self._commits.drop(key, COMMITS, TOKEN_COMMITS)
            raise CacheError(f"{self._storage.url}: the tokens of {key} are damaged: run build again")
        return tokens

    def encode_rows(self, split: SplitName, answers: Mapping[str, NDArray[Any]]) -> EncodedRows:
        """Encode answers, [n, width] each by name, as chunks; writes nothing."""
        return {
            name: shards.encode_rows(answers[name], a)
            for name, a in answer_arrays(self.manifest, split).items()
        }

    def write_answers(self, domain: str, split: SplitName, shard: int, answers: EncodedRows) -> None:
        """Write a shard's answers, then the commit record of the shard.

        Raises CacheError if the tokens that they answer no longer exist.
        """
        key = ShardKey(domain, split, shard)
        tokens = self._commits.get(key, TOKEN_COMMITS)
        if tokens is None or tokens.rows != len(answers["label_logprob"]):
            raise CacheError(f"{self._storage.url}: the tokens of {key} are missing: run build again")
        names = answer_arrays(self.manifest, split)
        objects = {name: shards.join(answers[name], tokens.shard_rows) for name in names}
        described = describe(list(objects.values()), tokens.rows, tokens.shard_rows)
        record = CommitRecord(tokens.rows, np.concatenate([tokens.arrays, described.arrays]))
        # One record must never cover a mixture of old and new arrays.
        self._commits.drop(key, COMMITS)
        self._storage.write_all({key.object(name): data for name, data in objects.items()})
        self._commits.put(key, COMMITS, record)

    def unfinished(self, domain: str, split: SplitName) -> list[int]:
        """Return the shards that lack the object of an array or a commit record, from one listing.

        Reading and ``verify`` detect damaged or foreign records; ``verify`` drops them.
        """
        shards = range(layout.shards(self.split_state(domain, split).rows, self.manifest.shard_rows))
        if self.manifest.has_targets(split) and self._commits.codebook_digest(domain) is None:
            return list(shards)
        done = self._committed(domain, split, COMMITS, TOKEN_COMMITS)
        return [shard for shard in shards if shard not in done]

    def has_tokens(self, domain: str) -> bool:
        """Return whether all unfinished shards have token records; the tokens are not read."""
        return all(
            self._committed(domain, split, TOKEN_COMMITS).issuperset(self.unfinished(domain, split))
            for split in layout.SPLITS
        )

    def _committed(self, domain: str, split: SplitName, *kinds: Kind) -> set[int]:
        """Return the shards with records of these kinds; without the last if it has grown since."""
        done = self._commits.committed(domain, split, *kinds)
        rows = self.split_state(domain, split).rows
        last = ShardKey(domain, split, layout.shards(rows, self.manifest.shard_rows) - 1)
        if last.shard in done and not self._commits.covers_all_rows(last, kinds[0]):
            done.remove(last.shard)
        return done

    def finalize_domain(self, domain: str) -> layout.DomainState:
        """Record the teacher's cross-entropy once validation is finished, and whether the domain is complete.

        The cross-entropy is the mean over the validation split's labels, in nats and float64.

        Raises CacheError if a validation shard is damaged, and drops its record: the next build answers it.
        """
        self._commits.invalidate_listing(domain)  # other processes may have answered
        state = self.existing_state(domain)
        loss = None if self.unfinished(domain, "validation") else self._teacher_cross_entropy(domain)
        finalized = state.model_copy(
            update={
                "complete": loss is not None and not self.unfinished(domain, "train"),
                "teacher_cross_entropy": loss,
            }
        )
        self.set_state(domain, finalized)
        return finalized

    def _teacher_cross_entropy(self, domain: str) -> float:
        state, total = self.split_state(domain, "validation"), 0.0
        for shard in range(layout.shards(state.rows, self.manifest.shard_rows)):
            key = ShardKey(domain, "validation", shard)
            labels = self._commits.read_covered(key, COMMITS, ["label_logprob"])["label_logprob"]
            if len(labels) < self.rows(*key):
                self._commits.drop(key, COMMITS)
                raise CacheError(f"{self._storage.url}: {key} is damaged: run build again")
            total -= float(labels.sum(dtype=np.float64))
        return total / state.labels

    def codebook(self, teacher_index: int = 0) -> Codebook | None:
        """Return a teacher's codebook; None if it is missing or both copies are damaged.

        A new fit may differ, so the shards that the old codebook encoded have to be answered again.
        """
        return usable_codebook(self._storage, teacher_index)

    def set_codebook(self, codebook: Codebook, teacher_index: int = 0) -> None:
        """Write a teacher's codebook, which never changes; drop what a lost codebook encoded."""
        existing = self.codebook(teacher_index)
        assert existing is None or codebook_digest(existing) == codebook_digest(codebook)
        if existing is None:
            self._commits.drop_coded(teacher_index)
        write_codebook(self._storage, codebook, teacher_index)

    def encoded_otherwise(self, teacher_index: int) -> list[ShardKey]:
        """Return a teacher's answered shards if none fits its codebook, which is lost or of another build."""
        return self._commits.encoded_otherwise(teacher_index)

    def discard_answers(self, teacher_index: int) -> None:
        """Drop a teacher's codebook and the records of all shards that need it."""
        self._commits.drop_coded(teacher_index)
        drop_codebook(self._storage, teacher_index)

    def rows(self, domain: str, split: SplitName, shard: int) -> int:
        """Return the rows of a shard."""
        return layout.rows_in(self.split_state(domain, split).rows, shard, self.manifest.shard_rows)

    def tokens(self, key: tuple[str, SplitName, int]) -> int:
        """Estimate a shard's tokens, without padding, from the split's mean per row."""
        state = self.split_state(*key[:2])
        return round(state.tokens * self.rows(*key) / max(state.rows, 1))


@contextmanager
def open_writer(url: str, manifest: layout.Manifest, vocabulary: Vocabulary) -> Iterator[Writer]:
    """Create the cache, or resume the one that exists, while holding its lock.

    Domains may have been added and max_tokens raised since; the manifest on disk then follows. Damaged
    documents are written again.

    Raises ConfigError, which lists what differs, if it was built with another configuration, and CacheError
    if another build is at work, or the cache cannot be written.
    """
    with locked(url) as storage:
        storage.objects.remove_staged()
        manifest = check_configuration(storage, manifest)
        write_vocabulary(storage, vocabulary)
        storage.update({"zarr.json": manifest_document(manifest)})
        for teacher_index in range(len(manifest.teachers)):
            domains = manifest.domains_of(teacher_index)
            if not any(storage.read(f"{domain}/zarr.json") for domain in domains):
                drop_codebook(storage, teacher_index)  # it encodes nothing, and may be another teacher's
            elif (codebook := usable_codebook(storage, teacher_index)) is not None:
                write_codebook(storage, codebook, teacher_index)
        yield Writer(storage, manifest)
