"""Check every byte of a cache against its commit records, and its rows for consistency."""

import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from ddk_cache.cache.codebooks import check_group, read_codebook, read_vocabulary
from ddk_cache.cache.metadata import (
    domain_documents,
    existing_manifest,
    list_shards,
    manifest_document,
    read_state,
    split_arrays,
)
from ddk_cache.cache.verify_shard import Counts, Damage, ShardCheck, ShardResult
from ddk_cache.errors import CacheError, ConfigError, counted
from ddk_cache.format import layout
from ddk_cache.format.layout import COMMITS, TOKEN_COMMITS, ShardKey, SplitName
from ddk_cache.storage.lock import locked
from ddk_cache.storage.storage import Storage
from ddk_cache.util.processes import follow_parent

READERS = 8  # shards that a process checks at once: most of them wait for the store, or for the interpreter
MOST_MEMORY = 1 << 30  # bytes that they may take; at least one shard
AT_ONCE = 16  # shards in one task of a process


@dataclass(frozen=True)
class Problem:
    """A damaged, missing, foreign or inconsistent part of a cache."""

    location: str
    """Domain, split and shard, or the document's key."""
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


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
        codebook = None
        with suppress(CacheError):  # _verify_tables reports it
            codebook = read_codebook(storage, source.teacher_index)
        self.shards = ShardCheck(storage, manifest, source.name, state, codebook)
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
        sizes = self.storage.sizes(f"{self.name}/{split}")
        end = 1 + max(set().union(*list_shards(sizes).values()), default=-1)  # of those with any object
        existing, totals, unanswered = min(total, end), np.zeros(4), 0
        for shard, result in enumerate(self._check_all(split, existing, sizes, processes)):
            advance(result.bytes)
            totals += result.counts
            if result.damage == "unanswered" and not self.state.complete:
                unanswered += 1
            elif result.reason:
                key = ShardKey(self.name, split, shard)
                yield Problem(str(key), result.reason)
                self.bad[key] = result.damage
        if existing < total:
            key = ShardKey(self.name, split, existing)
            others = f" and all others up to {total - 1}" if existing < total - 1 else ""
            yield Problem(f"{key}{others}", "has no objects")
            self.bad[key] = "tokens"
        if unanswered:
            yield Problem(
                f"{self.name}/{split}", f"{counted(unanswered, 'shard')} not answered yet: run build"
            )
        yield from self._count_problems(split, totals)

    def _count_problems(self, split: SplitName, totals: Counts) -> Iterator[Problem]:
        expected = self.state.split(split)
        rows, tokens, labels = map(int, totals[:3])
        if rows != expected.rows:
            return
        if (tokens, labels) != (expected.tokens, expected.labels):
            yield Problem(f"{self.name}/{split}", "the counts in the attributes are wrong")
            self.corrected[split] = expected.model_copy(update={"tokens": tokens, "labels": labels})
        if split == "validation" and self.state.teacher_cross_entropy is not None:
            loss = totals[3] / max(labels, 1)
            if not math.isclose(loss, self.state.teacher_cross_entropy, rel_tol=1e-9):
                yield Problem(self.name, "the teacher's cross-entropy in the attributes is wrong")

    def _check_all(
        self, split: SplitName, total: int, sizes: Mapping[str, int], processes: int
    ) -> Iterator[ShardResult]:
        keys = [ShardKey(self.name, split, shard) for shard in range(total)]
        names = [*split_arrays(self.manifest, self.name, split), COMMITS]
        parts = [
            {key: {name: sizes[name] for name in map(key.object, names) if name in sizes} for key in part}
            for part in (keys[first : first + AT_ONCE] for first in range(0, total, AT_ONCE))
        ]
        check = partial(_check_some, self.shards, min(READERS, MOST_MEMORY // self.shards.most_memory(split)))
        if processes == 1 or len(parts) <= processes:
            for part in parts:
                yield from check(part)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=follow_parent) as pool:
            for results in pool.map(check, parts):
                yield from results

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


def _check_some(
    shards: ShardCheck, readers: int, part: Mapping[ShardKey, Mapping[str, int]]
) -> list[ShardResult]:
    """Check some shards, each with the sizes of its objects."""
    with ThreadPoolExecutor(max(1, readers)) as pool:
        return list(pool.map(shards.check, part, part.values()))
