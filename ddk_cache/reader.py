"""Open a cache: a mapping from its domains to their splits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_cache import layout
from ddk_cache.codebooks import codebook_digest, read_codebook, read_vocabulary
from ddk_cache.commit_reader import CommitCache, CommitReader
from ddk_cache.errors import CacheError, IncompleteCacheError
from ddk_cache.metadata import existing_manifest, finished_shards, read_state
from ddk_cache.split_reader import Rows, SplitReader, document_logprobs
from ddk_cache.storage import Storage
from ddk_cache.vocabulary import Vocabulary

if TYPE_CHECKING:
    import zarr

__all__ = ["Cache", "Domain", "Rows", "SplitReader", "document_logprobs", "open_cache"]


class Cache(Mapping[str, "Domain"]):
    """A cache, opened for reading; a mapping from a domain's name to its two splits."""

    def __init__(self, storage: Storage, manifest: layout.Manifest, domains: Mapping[str, "Domain"]) -> None:
        self.storage = storage
        self.manifest = manifest
        self._domains = domains

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in the configuration's order."""
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
        """The first; each domain has its own."""
        return self.manifest.teachers[0]

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of the token -> id map and the special tokens."""
        return self.manifest.tokenizer_hash

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's tokenizer by content; read when first asked for."""
        return read_vocabulary(self.storage, self.tokenizer_hash)

    @property
    def complete(self) -> bool:
        """Whether every shard of every domain is there."""
        return all(domain.complete for domain in self._domains.values())

    def __getitem__(self, name: str) -> "Domain":
        return self._domains[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def as_zarr(self) -> "zarr.Group":
        """The arrays as they are stored (docs/format.md), for whoever wants them raw."""
        import zarr
        from zarr.storage import ObjectStore

        return zarr.open_group(ObjectStore(self.storage.store, read_only=True), mode="r", zarr_format=3)


@dataclass(frozen=True)
class Domain:
    """One domain's splits, and how well the teacher knows it."""

    name: str
    teacher: layout.TeacherInfo
    state: layout.DomainState
    train: SplitReader
    validation: SplitReader

    @property
    def complete(self) -> bool:
        return self.state.complete

    @property
    def teacher_cross_entropy(self) -> float:
        """The teacher's mean loss over the validation split, in nats a label.

        Raises
        ------
        CacheError
            The validation split is not finished.
        """
        if self.state.teacher_cross_entropy is None:
            raise CacheError(f"domain {self.name!r}: the validation split is not finished; run build again")
        return self.state.teacher_cross_entropy

    def split(self, name: layout.SplitName) -> SplitReader:
        return self.train if name == "train" else self.validation


def open_cache(url: str, *, allow_incomplete: bool = False) -> Cache:
    """Open a cache by folder or URL.

    Parameters
    ----------
    url
        A folder or file:// s3:// gs:// az://.
    allow_incomplete
        Take an unfinished cache too: a train split then has the rows of its finished shards.

    Raises
    ------
    CacheNotFoundError
        There is no cache there.
    IncompleteCacheError
        A shard is missing, and ``allow_incomplete`` is not set.
    CacheError
        The cache is damaged or of a version not known here.
    """
    storage = Storage(str(url))
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
                "or set allow_incomplete: true to use what is there"
            )
        if state is None:
            continue
        codebook = codebooks[source.teacher_index]
        if codebook is not None and codebook.common.size != manifest.vocab_size:
            raise CacheError(f"{url}: the codebook is not one of {manifest.vocab_size} tokens")
        if complete and codebook is None and manifest.target.kind != "label":
            raise CacheError(f"{url}/{layout.codebook_groups(source.teacher_index)[0]}: is missing")
        splits: dict[layout.SplitName, SplitReader] = {}
        for name in layout.SPLITS:
            total = state.split(name).rows
            finished = None
            if not complete:
                finished = _finished(storage, commits, manifest, source.name, name, total)
            elif total:  # a state that claims too many rows is refused here
                commits.get(source.name, name, [layout.shards(total, manifest.shard_rows) - 1])
            splits[name] = SplitReader(
                storage, manifest, source.name, name, total, commits, codebook, finished
            )
        domains[source.name] = Domain(
            source.name, manifest.teachers[source.teacher_index], state, splits["train"], splits["validation"]
        )
    return Cache(storage, manifest, domains)


def _finished(
    storage: Storage,
    commits: CommitCache,
    manifest: layout.Manifest,
    domain: str,
    split: layout.SplitName,
    total: int,
) -> NDArray[np.int64]:
    """The finished shards of an unfinished split; the last one may have grown since."""
    count = layout.shards(total, manifest.shard_rows)
    done = [shard for shard in finished_shards(storage, domain, split) if shard < count]
    if done and done[-1] == count - 1:
        try:
            record = commits.get(domain, split, [count - 1])[count - 1]
            is_whole = record.rows == layout.rows_in(total, count - 1, manifest.shard_rows)
        except CacheError:
            is_whole = False
        if not is_whole:
            done.pop()
    return np.array(done, np.int64)
