"""Open a cache: a mapping from its domains to their splits."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_cache.cache.codebooks import codebook_digest, read_codebook, read_vocabulary
from ddk_cache.cache.commits import CommitCache, CommitReader
from ddk_cache.cache.metadata import existing_manifest, finished_shards, read_state
from ddk_cache.cache.rows import html_table
from ddk_cache.cache.split import Split, SplitSource
from ddk_cache.errors import CacheError, CacheNotFoundError, ConfigError, IncompleteCacheError
from ddk_cache.format import layout
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.storage.storage import Storage

if TYPE_CHECKING:
    import zarr


class Cache(Mapping[str, "Domain"]):
    """A cache, opened for reading; a mapping from a domain's name to its two splits."""

    def __init__(self, storage: Storage, manifest: layout.Manifest, domains: Mapping[str, "Domain"]) -> None:
        self.storage = storage
        self.manifest = manifest
        self._domains = domains

    @property
    def domains(self) -> tuple[str, ...]:
        """The names, in the configuration's order."""
        return tuple(self._domains)

    @property
    def seq_length(self) -> int:
        """Tokens a row, S."""
        return self.manifest.seq_length

    @property
    def vocab_size(self) -> int:
        """Logits a position at the teacher, padding included."""
        return self.manifest.vocab_size

    @property
    def target(self) -> layout.Target:
        return self.manifest.target

    @property
    def teacher(self) -> layout.TeacherInfo:
        """The first teacher, whose tokenizer is the cache's; each domain has its own."""
        return self.manifest.teachers[0]

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of the token -> id map and the special tokens."""
        return self.manifest.tokenizer_hash

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's tokenizer by content; read on first use."""
        return read_vocabulary(self.storage, self.tokenizer_hash)

    @property
    def storages(self) -> tuple[Storage, ...]:
        """The stores that hold it: more than one if several caches were joined."""
        return (self.storage,)

    @property
    def complete(self) -> bool:
        """Whether every shard of every domain is finished."""
        return all(domain.complete for domain in self._domains.values())

    def __getitem__(self, name: str) -> "Domain":
        if name not in self._domains:
            raise KeyError(f"no domain {name!r}; there are: {', '.join(self._domains)}")
        return self._domains[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def as_zarr(self) -> "zarr.Group":
        """Open the arrays as they are stored (docs/format.md)."""
        import zarr
        from zarr.storage import ObjectStore

        return zarr.open_group(
            ObjectStore(self.storage.objects.store, read_only=True), mode="r", zarr_format=3
        )

    def __repr__(self) -> str:
        lines = [f"<Cache {self.storage.url}: {self.summary()}>"]
        return "\n".join([*lines, *(f"  {domain!r}" for domain in self._domains.values())])

    def _repr_html_(self) -> str:
        """Return a small table for notebooks."""
        header = ("domain", "teacher", "train", "validation", "teacher's cross-entropy")
        rows = (domain.cells() for domain in self._domains.values())
        return html_table(f"{self.storage.url}: {self.summary()}", header, rows)

    def summary(self) -> str:
        """Return one line on what the cache holds."""
        teachers = ", ".join(teacher.model for teacher in self.manifest.teachers)
        unfinished = "" if self.complete else ", not finished"
        return f"rows of {self.seq_length:,} tokens, {self.target.summary} of {teachers}{unfinished}"


@dataclass(frozen=True, repr=False)
class Domain:
    """One domain's splits, and the teacher's loss on it."""

    name: str
    teacher: layout.TeacherInfo
    state: layout.DomainState
    train: Split
    validation: Split

    @property
    def complete(self) -> bool:
        return self.state.complete

    @property
    def teacher_cross_entropy(self) -> float:
        """The teacher's mean loss over the validation split, in nats a label.

        Raises CacheError if the validation split is not finished.
        """
        if self.state.teacher_cross_entropy is None:
            raise CacheError(f"domain {self.name!r}: the validation split is not finished; run build again")
        return self.state.teacher_cross_entropy

    def split(self, name: layout.SplitName) -> Split:
        return self.train if name == "train" else self.validation

    def cells(self) -> tuple[str, ...]:
        """Return name, teacher, both splits and the teacher's cross-entropy as text."""
        loss = self.state.teacher_cross_entropy
        nats = "not finished" if loss is None else f"{loss:.3f} nats a label"
        return self.name, self.teacher.model, self.train.summary(), self.validation.summary(), nats

    def __repr__(self) -> str:
        name, teacher, train, validation, loss = self.cells()
        return f"<Domain {name}: train {train}; validation {validation}; {teacher} at {loss}>"


def open_cache(url: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Cache:
    """Open a cache by folder or URL.

    Parameters
    ----------
    url
        A folder, or a URL: file:// s3:// gs:// az://, or hf://OWNER/NAME of a data set on the hub.
    allow_incomplete
        Open an unfinished cache too: a train split then has the rows of its finished shards.

    Raises
    ------
    CacheNotFoundError
        The folder or URL holds no cache.
    IncompleteCacheError
        A shard is missing, and ``allow_incomplete`` is not set.
    CacheError
        The cache is damaged or of an unknown version.
    """
    try:
        storage = Storage(str(url))
    except ConfigError as error:
        raise CacheNotFoundError(str(error)) from error
    manifest = existing_manifest(storage)
    codebooks = [read_codebook(storage, index) for index in range(len(manifest.teachers))]
    digests = [None if codebook is None else codebook_digest(codebook) for codebook in codebooks]
    by_domain = {domain.name: digests[domain.teacher_index] for domain in manifest.domains}
    commits = CommitCache(CommitReader(storage, manifest, by_domain.get))
    domains: dict[str, Domain] = {}
    for source in manifest.domains:
        state = read_state(storage, manifest, source.name)
        complete = state is not None and state.complete
        if not complete and not allow_incomplete:
            raise IncompleteCacheError(
                f"{url}: domain {source.name!r} is not finished; run build again, "
                "or use what is there: allow_incomplete: true, and --allow-incomplete of export"
            )
        if state is None:
            continue
        codebook = codebooks[source.teacher_index]
        if codebook is not None and codebook.common.size != manifest.vocab_size:
            raise CacheError(f"{url}: the codebook is not one of {manifest.vocab_size} tokens")
        if complete and codebook is None and manifest.target.kind != "label":
            raise CacheError(f"{url}/{layout.codebook_groups(source.teacher_index)[0]}: is missing")
        splits = (
            _open_split(SplitSource(storage, manifest, source.name, name, commits, codebook), state)
            for name in layout.SPLITS
        )
        domains[source.name] = Domain(source.name, manifest.teachers[source.teacher_index], state, *splits)
    return Cache(storage, manifest, domains)


def _open_split(source: SplitSource, state: layout.DomainState) -> Split:
    counts, per_shard = state.split(source.name), source.manifest.shard_rows
    if not state.complete:
        return Split(source, counts, _finished(source, counts.rows))
    if counts.rows:  # a state that claims too many rows raises here
        last = layout.shards(counts.rows, per_shard) - 1
        source.commits.get(layout.ShardKey(source.domain, source.name, last))
    return Split(source, counts)


def _finished(source: SplitSource, rows: int) -> NDArray[np.int64]:
    """Return the finished shards of an unfinished split; the last may have grown since."""
    last = layout.shards(rows, source.manifest.shard_rows) - 1
    done = [shard for shard in finished_shards(source.storage, source.domain, source.name) if shard <= last]
    if done and done[-1] == last:
        try:
            record = source.commits.get(layout.ShardKey(source.domain, source.name, last))
            is_full = record.rows == layout.rows_in(rows, last, source.manifest.shard_rows)
        except CacheError:
            is_full = False
        if not is_full:
            done.pop()
    return np.array(done, np.int64)
