"""Several caches as one, for a student that is trained from all of them."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Protocol

from ddk_cache.cache.reader import Cache, Domain
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import DomainSource, Manifest, Target
from ddk_cache.storage.storage import Storage


def join(caches: Sequence[Cache]) -> Cache:
    """Return one cache with the domains of all, in order; a single cache is returned as it is.

    Its tokenizer is the largest, which has every token of the others under the same id.

    Raises ConfigError, with the reason, for caches that do not belong together: of other tokenizers, row
    lengths or kinds of targets, or with a domain of the same name.
    """
    if len(caches) == 1:
        return caches[0]
    for one, other in combinations(caches, 2):
        if problem := conflict(one, other):
            raise ConfigError(f"cache: {other.storage.url} does not go with {one.storage.url}: {problem}")
    largest = max(caches, key=lambda cache: len(cache.vocabulary.ids))
    for cache in caches:
        if conflicts := cache.vocabulary.conflicts(largest.vocabulary):
            raise ConfigError(
                f"cache: {cache.storage.url} does not go with {largest.storage.url}: "
                f"another tokenizer: {'; '.join(conflicts)}"
            )
    return _Joined(caches, largest)


class HasRows(Protocol):
    """A cache, or the configuration of its build."""

    @property
    def seq_length(self) -> int: ...

    @property
    def target(self) -> Target: ...


def conflict(one: HasRows, other: HasRows) -> str | None:
    """Return why no student can be trained on both, or None; labels alone go with every target."""
    if one.seq_length != other.seq_length:
        return f"rows of {other.seq_length} and {one.seq_length} tokens"
    for key in () if "label" in (one.target.kind, other.target.kind) else ("kind", "temperature"):
        here, there = getattr(one.target, key), getattr(other.target, key)
        if here != there:
            return f"target.{key} {there} and {here}"
    return None


class _Joined(Cache):
    def __init__(self, caches: Sequence[Cache], largest: Cache) -> None:
        domains: dict[str, Domain] = {}
        for cache in caches:
            if twice := sorted(domains.keys() & cache.keys()):
                raise ConfigError(
                    f"cache: {cache.storage.url} and a cache before it both have a domain {twice[0]!r}; a "
                    "domain has one cache: build one of them under another name"
                )
            domains |= cache
        others = (cache.manifest for cache in caches if cache is not largest)
        super().__init__(largest.storage, _manifest([largest.manifest, *others]), domains)
        self._caches = caches

    @property
    def storages(self) -> tuple[Storage, ...]:
        return tuple(cache.storage for cache in self._caches)


def _manifest(manifests: Sequence[Manifest]) -> Manifest:
    """Return the first manifest, with the teachers and domains of all; its tokenizer is the first's."""
    teachers = [teacher for manifest in manifests for teacher in manifest.teachers]
    changes = {
        "teachers": tuple(teachers),
        "domains": tuple(_domains(manifests)),
        "vocab_size": max(manifest.vocab_size for manifest in manifests),
        "validation_targets": all(manifest.has_targets("validation") for manifest in manifests),
        "target": max((manifest.target for manifest in manifests), key=lambda target: target.width),
    }
    return manifests[0].model_copy(update=changes)


def _domains(manifests: Sequence[Manifest]) -> Iterator[DomainSource]:
    before = 0
    for manifest in manifests:
        for domain in manifest.domains:
            yield domain.model_copy(update={"teacher_index": before + domain.teacher_index})
        before += len(manifest.teachers)
