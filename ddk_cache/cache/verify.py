"""Check every byte of a cache against its commit records, and its rows for consistency."""

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.codebooks import check_group, codebook_digest, read_codebook, read_vocabulary
from ddk_cache.cache.commits import CommitReader
from ddk_cache.cache.metadata import (
    domain_documents,
    existing_manifest,
    list_shards,
    manifest_document,
    read_state,
    size_limits,
    split_arrays,
)
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format import codec, layout, shards
from ddk_cache.format.codebook import Codebook
from ddk_cache.format.commit_record import DIGEST, CommitRecord, describe
from ddk_cache.format.layout import COMMITS, TOKEN_COMMITS, Kind, ShardKey, SplitName
from ddk_cache.format.validate import check_rows
from ddk_cache.storage.lock import locked
from ddk_cache.storage.storage import Storage
from ddk_cache.util.processes import follow_parent

READERS = 8  # shards in a process's memory at once: most of them wait for the store, or for the interpreter
AT_ONCE = 16  # shards in one task of a process
ENTRIES_AT_ONCE = 1 << 20  # entries that a reader decodes at a time, 30 bytes each; at least one row
Counts = NDArray[np.float64]  # [4]: rows, tokens, labels, and the sum of the labels' losses in nats


@dataclass(frozen=True)
class Problem:
    """A damaged, missing, foreign or inconsistent part of a cache."""

    location: str
    """Domain, split and shard, or the document's key."""
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


Damage = Literal["tokens", "answers", "record", "codebook"]
"""What is damaged: tokens, whose record is dropped as well; answers; the record of all arrays; or nothing but
the codebook, which is lost or not the one that encoded the shard."""


@dataclass(frozen=True)
class _ShardResult:
    bytes: int
    """Bytes read."""
    counts: Counts
    reason: str | None = None
    """None if the shard is intact."""
    damage: Damage = "answers"


class _BadShard(ValueError):
    def __init__(self, reason: str, damage: Damage) -> None:
        super().__init__(reason)
        self.damage: Damage = damage


def verify(
    url: str, advance: Callable[[int], object] = lambda _: None, processes: int = 1
) -> Iterator[Problem]:
    """Read every byte and yield each damaged, missing, foreign or inconsistent part.

    A bad shard loses its commit record and its domain is marked incomplete, so training refuses it and the
    next build writes it again. Wrong counts are corrected. Both need the cache's lock, for which it waits as
    a build does; where it cannot write, that is a problem too.

    Parameters
    ----------
    advance
        Called with the number of bytes read.
    processes
        Share the shards of a domain that has more than AT_ONCE for each of them. They are spawned, so a
        script that asks for several must be importable.
    """
    storage = Storage(url)
    manifest = existing_manifest(storage)
    if storage.read("zarr.json") != manifest_document(manifest):
        yield Problem("zarr.json", "differs from what build writes; build writes it again")
    yield from _verify_tables(storage, manifest)
    for source in manifest.domains:
        try:
            state = read_state(storage, manifest, source.name)
        except CacheError as error:
            yield Problem(f"{source.name}/zarr.json", f"{error}; build tokenises the domain again")
            continue
        if state is None:
            yield Problem(source.name, "is not tokenised yet")
            continue
        yield from _DomainCheck(storage, manifest, source, state).problems(advance, processes)


def _verify_tables(storage: Storage, manifest: layout.Manifest) -> Iterator[Problem]:
    groups = [layout.VOCABULARY]
    if manifest.target.kind != "label":
        for teacher_index in sorted({domain.teacher_index for domain in manifest.domains}):
            copies = layout.codebook_groups(teacher_index)
            groups += copies
            if len({storage.read(f"{group}/zarr.json") for group in copies}) > 1:
                yield Problem(copies[0], f"differs from its copy {copies[1]}")
    for group in groups:
        for reason in check_group(storage, group):
            yield Problem(group, reason)
    try:
        read_vocabulary(storage, manifest.tokenizer_hash)
    except CacheError:
        yield Problem(layout.VOCABULARY, "does not match the manifest's tokenizer_hash")


class _DomainCheck:
    """Checks one domain."""

    def __init__(
        self,
        storage: Storage,
        manifest: layout.Manifest,
        source: layout.DomainSource,
        state: layout.DomainState,
    ) -> None:
        self.storage, self.manifest, self.name, self.state = storage, manifest, source.name, state
        self.codebook: Codebook | None = None
        with suppress(CacheError):  # _verify_tables reports it
            self.codebook = read_codebook(storage, source.teacher_index)
        digest = codebook_digest(self.codebook) if self.codebook else None
        self.commits = CommitReader(storage, manifest, {source.name: digest}.get)
        self.row_entries = manifest.seq_length * max(1, manifest.target.width)
        self.bad: dict[ShardKey, Damage] = {}
        self.corrected: dict[str, layout.SplitState] = {}  # splits whose counts are wrong

    def problems(self, advance: Callable[[int], object], processes: int) -> Iterator[Problem]:
        """Yield the domain's problems, then drop the records of bad shards."""
        for key, expected in domain_documents(self.manifest, self.name, self.state).items():
            raw = self.storage.read(key)
            if raw != expected:
                reason = "is missing" if raw is None else "differs from what build writes"
                yield Problem(key, f"{reason}; build writes it again")
        for split in layout.SPLITS:
            yield from self._split_problems(split, advance, processes)
        if self._fits_no_codebook():
            group = layout.codebook_groups(self.manifest.domain(self.name).teacher_index)[0]
            yield Problem(group, f"did not encode {self.name}: put it back, or build again with --yes")
        if self.bad or self.corrected:
            yield from self._revoke()

    def _fits_no_codebook(self) -> bool:
        """Return whether no record fits the codebook, which is then lost or of another build."""
        splits = filter(self.manifest.has_targets, layout.SPLITS)
        rows = [self.state.split(split).rows for split in splits]
        shards = sum(layout.shards(count, self.manifest.shard_rows) for count in rows)
        damages = [damage for key, damage in self.bad.items() if self.manifest.has_targets(key.split)]
        return "codebook" in damages and shards == damages.count("codebook") + damages.count("record")

    def _split_problems(
        self, split: SplitName, advance: Callable[[int], object], processes: int
    ) -> Iterator[Problem]:
        total = layout.shards(self.state.split(split).rows, self.manifest.shard_rows)
        existing, counted = min(total, self._end(split)), np.zeros(4)
        for shard, result in enumerate(self._check_all(split, existing, processes)):
            advance(result.bytes)
            counted += result.counts
            if result.reason:
                key = ShardKey(self.name, split, shard)
                yield Problem(str(key), result.reason)
                self.bad[key] = result.damage
        if existing < total:
            key = ShardKey(self.name, split, existing)
            others = f" and all others up to {total - 1}" if existing < total - 1 else ""
            yield Problem(f"{key}{others}", "has no objects")
            self.bad[key] = "tokens"
        yield from self._count_problems(split, counted)

    def _end(self, split: SplitName) -> int:
        """Return the index after that of the last shard that has any object."""
        listing = list_shards(self.storage.sizes(f"{self.name}/{split}"))
        return 1 + max(set().union(*listing.values()), default=-1)

    def _count_problems(self, split: SplitName, counted: Counts) -> Iterator[Problem]:
        expected = self.state.split(split)
        rows, tokens, labels = map(int, counted[:3])
        if rows != expected.rows:
            return
        if (tokens, labels) != (expected.tokens, expected.labels):
            yield Problem(f"{self.name}/{split}", "the counts in the attributes are wrong")
            self.corrected[split] = expected.model_copy(update={"tokens": tokens, "labels": labels})
        if split == "validation" and self.state.teacher_cross_entropy is not None:
            loss = counted[3] / max(labels, 1)
            if not math.isclose(loss, self.state.teacher_cross_entropy, rel_tol=1e-9):
                yield Problem(self.name, "the teacher's cross-entropy in the attributes is wrong")

    def _check_all(self, split: SplitName, total: int, processes: int) -> Iterator[_ShardResult]:
        parts = [range(first, min(first + AT_ONCE, total)) for first in range(0, total, AT_ONCE)]
        if processes == 1 or len(parts) <= processes:
            for part in parts:
                yield from self._check_some(split, part)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=follow_parent) as pool:
            for results in pool.map(partial(self._check_some, split), parts):
                yield from results

    def _check_some(self, split: SplitName, part: range) -> list[_ShardResult]:
        # Fewer at once where one row takes much memory.
        readers = max(1, min(READERS, READERS * ENTRIES_AT_ONCE // self.row_entries))
        with ThreadPoolExecutor(readers) as pool:
            return list(pool.map(lambda shard: self._check(ShardKey(self.name, split, shard)), part))

    def _check(self, key: ShardKey) -> _ShardResult:
        names = list(split_arrays(self.manifest, self.name, key.split))
        read = self.storage.read_all(size_limits(self.manifest, key, names))
        size = sum(len(data or b"") for data in read)
        objects: dict[str, bytes] = {}
        try:
            for name, data in zip(names, read, strict=True):
                if data is None:
                    reason = f"{name} is missing, or larger than it can be"
                    raise _BadShard(reason, self._damage(name))
                objects[name] = data
            record = self._check_commits(key, objects)
            return _ShardResult(size, self._check_rows(key.split, record, objects))
        except ValueError as error:
            damage = error.damage if isinstance(error, _BadShard) else "tokens"
            return _ShardResult(size, np.zeros(4), str(error), damage)

    def _damage(self, array: str) -> Damage:
        return "tokens" if array in self.manifest.token_arrays(self.name) else "answers"

    def _check_commits(self, key: ShardKey, objects: dict[str, bytes]) -> CommitRecord:
        """Return a shard's commit record if its objects match it; raises ValueError."""
        tokens = self._read_commit(key, TOKEN_COMMITS)
        try:
            record = self._read_commit(key, COMMITS)
        except _BadShard as error:
            if error.damage == "record" and self._has_other_digest(key, tokens, objects):
                error.damage = "codebook"
            raise
        if not record.has_prefix(tokens):
            raise _BadShard("its two commit records differ in its tokens", "answers")
        for (name, data), entry in zip(objects.items(), record.arrays, strict=True):
            if len(data) != entry["size"]:
                reason = f"{name} has {len(data)} bytes, not {entry['size']}"
            elif sha256(data).digest() != bytes(entry["sha256"]):
                reason = f"{name} is damaged or belongs to another shard"
            else:
                continue
            raise _BadShard(reason, self._damage(name))
        described = describe(list(objects.values()), record.rows, record.shard_rows)
        if not np.array_equal(described.arrays, record.arrays):
            raise _BadShard("its commit record differs from its own objects", "answers")
        return record

    def _has_other_digest(self, key: ShardKey, tokens: CommitRecord, objects: dict[str, bytes]) -> bool:
        """Return whether a shard's record covers its objects, under a digest that no damage explains."""
        try:
            described = describe(list(objects.values()), tokens.rows, tokens.shard_rows)
        except ValueError:
            return False
        expected = described.serialise(self.commits.identity(key, COMMITS))
        (stored,) = self.storage.read_all({key.object(COMMITS): len(expected)})
        if stored is None or len(stored) < len(expected):
            return False
        is_equal = np.frombuffer(stored, np.uint8) == np.frombuffer(expected, np.uint8)
        # Two digests have a byte or two in common by chance; a flipped bit leaves the others.
        return bool(is_equal[:-DIGEST].all() and np.count_nonzero(is_equal[-DIGEST:]) < DIGEST // 2)

    def _read_commit(self, key: ShardKey, kind: Kind) -> CommitRecord:
        (record,) = self.commits.read([key], kind)
        if isinstance(record, CacheError):
            reason = str(record).removeprefix(f"{self.storage.url}/")
            raise _BadShard(reason, "tokens" if kind == TOKEN_COMMITS else "record")
        total = self.state.split(key.split).rows
        expected = layout.rows_in(total, key.shard, self.manifest.shard_rows)
        if (record.rows, record.shard_rows) != (expected, self.manifest.rows_per_shard(total)):
            reason = f"has {record.rows} rows in a shard of {record.shard_rows}, not {expected}"
            raise _BadShard(reason, "tokens" if kind == TOKEN_COMMITS else "answers")
        return record

    def _check_rows(self, split: SplitName, record: CommitRecord, objects: dict[str, bytes]) -> Counts:
        """Decode everything and check that the rows are consistent; raises ValueError."""
        manifest, arrays = self.manifest, split_arrays(self.manifest, self.name, split)
        counted, step = np.zeros(4), max(1, ENTRIES_AT_ONCE // self.row_entries)
        for first in range(0, record.rows, step):
            count = min(step, record.rows - first)
            values = {
                name: shards.decode(objects[name], array, record.shard_rows, first, count)
                for name, array in arrays.items()
            }
            check_rows(values, manifest.vocab_size)
            if manifest.has_targets(split) and self.codebook is not None:
                codec.decode(values, self.codebook, manifest.target)
            tokens, labels = (np.count_nonzero(values[name]) for name in ("segments", "loss_mask"))
            loss = -values["label_logprob"].sum(dtype=np.float64)
            counted += np.array([count, tokens, labels, loss])
        return counted

    def _revoke(self) -> Iterator[Problem]:
        """Drop the records of bad shards, correct counts and mark the domain incomplete."""
        try:
            with locked(self.storage.url) as held:
                if read_state(held, self.manifest, self.name) != self.state:
                    yield Problem(self.name, "a build has resumed meanwhile: verify again")
                    return
                is_codebook_lost = self._fits_no_codebook()
                for key, damage in self.bad.items():
                    if not (is_codebook_lost and damage == "codebook"):  # a shard that is intact with it
                        held.delete(key.object(COMMITS))
                    if damage == "tokens":
                        held.delete(key.object(TOKEN_COMMITS))
                if self.state.complete or self.corrected:
                    state = self.state.model_copy(update={"complete": False, **self.corrected})
                    documents = domain_documents(self.manifest, self.name, state)
                    held.write(f"{self.name}/zarr.json", documents[f"{self.name}/zarr.json"])
        except (CacheError, ConfigError) as error:  # as of a store that is read-only, or that a build uses
            yield Problem(self.name, f"is not marked as unfinished, so build will not repair it: {error}")
