"""Several caches as one, for a student that is trained from all of them."""

from collections.abc import Iterator, Sequence

from ddk_cache.cache.reader import Cache, Domain
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import DomainSource, Manifest
from ddk_cache.storage.storage import Storage


def join(caches: Sequence[Cache]) -> Cache:
    """Return one cache with the domains of all, in order; a single cache is returned as it is.

    Raises ConfigError, with the reason, for caches that do not belong together: of other tokenizers, row
    lengths or kinds of targets, or with a domain of the same name.
    """
    first, *others = caches
    for cache in others:
        _check(first, cache)
    with_entries = [cache for cache in caches if cache.target.kind != "label"]
    for cache in with_entries[1:]:
        _check_targets(with_entries[0], cache)
    return _Joined(caches) if others else first


class _Joined(Cache):
    def __init__(self, caches: Sequence[Cache]) -> None:
        domains: dict[str, Domain] = {}
        for cache in caches:
            if twice := sorted(domains.keys() & cache.keys()):
                raise ConfigError(
                    f"cache: {cache.storage.url} and a cache before it both have a domain {twice[0]!r}; a "
                    "domain has one cache: build one of them under another name"
                )
            domains |= cache
        super().__init__(caches[0].storage, _manifest([cache.manifest for cache in caches]), domains)
        self._caches = caches

    @property
    def storages(self) -> tuple[Storage, ...]:
        return tuple(cache.storage for cache in self._caches)


def _manifest(manifests: Sequence[Manifest]) -> Manifest:
    """Return the first manifest, with the teachers and domains of all."""
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


def _check(first: Cache, other: Cache) -> None:
    if conflicts := first.vocabulary.conflicts(other.vocabulary):
        raise _conflict(first, other, f"another tokenizer: {'; '.join(conflicts)}")
    if first.seq_length != other.seq_length:
        raise _conflict(first, other, f"rows of {other.seq_length} and {first.seq_length} tokens")


def _check_targets(first: Cache, other: Cache) -> None:
    for key in ("kind", "temperature"):
        here, there = getattr(first.target, key), getattr(other.target, key)
        if here != there:
            raise _conflict(first, other, f"target.{key} {there} and {here}")


def _conflict(first: Cache, other: Cache, what: str) -> ConfigError:
    return ConfigError(f"cache: {other.storage.url} does not go with {first.storage.url}: {what}")
