"""What may change between two builds of one cache, and what may not."""

import logging
import os
from pathlib import Path
from typing import Any

from ddk_cache import layout
from ddk_cache.configuration import flat
from ddk_cache.errors import CacheError, CacheNotFoundError, ConfigError
from ddk_cache.lock import LOCK_KEY, LockedStorage
from ddk_cache.records import read_manifest, read_state, usable_state
from ddk_cache.storage import Storage

logger = logging.getLogger(__name__)


def manifest_differences(there: layout.Manifest, wanted: layout.Manifest) -> list[str]:
    """What keeps a cache from being extended to ``wanted``, as "key: in the cache -> wanted"."""
    exempt = {"domains", "teachers", "version"}
    before = flat(there.model_dump(exclude=exempt)) | _teacher_keys("teacher", there.teachers[0])
    after = flat(wanted.model_dump(exclude=exempt)) | _teacher_keys("teacher", wanted.teachers[0])
    for domain in there.domains:
        match = next((other for other in wanted.domains if other.name == domain.name), None)
        key = f"domains.{domain.name}"
        if match is None:
            before[key], after[key] = "in the cache", "missing"
            continue
        before |= flat(domain.source, f"{key}.")
        after |= flat(match.source, f"{key}.")
        if domain.teacher or match.teacher:
            before |= _teacher_keys(f"{key}.teacher", there.teacher_of(domain.name))
            after |= _teacher_keys(f"{key}.teacher", wanted.teacher_of(domain.name))
        if _limit(match.max_tokens) < _limit(domain.max_tokens):
            before[f"{key}.max_tokens"], after[f"{key}.max_tokens"] = domain.max_tokens, match.max_tokens
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _teacher_keys(prefix: str, teacher: layout.TeacherInfo) -> dict[str, Any]:
    """What of a teacher decides the numbers, key by key."""
    found = teacher.model_dump(exclude={"engine_version"})
    arguments = found.pop("engine_args")
    return flat(found, f"{prefix}.") | flat(arguments, f"{prefix}.engine_args.")


def _limit(max_tokens: int | None) -> float:
    return float("inf") if max_tokens is None else max_tokens


def check_place(url: str, manifest: layout.Manifest) -> None:
    """Whether ``open_writer`` would create or go on with the cache; nothing is written.

    Raises
    ------
    ConfigError
        The cache there was built with another configuration; the message lists what differs.
    CacheError
        The place cannot be reached or, where it is a folder, not be written.
    """
    try:
        storage = Storage(url)
    except CacheNotFoundError:
        place = Path(url.removeprefix("file://")).absolute()
        there = next(path for path in (place, *place.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise CacheError(f"{url}: {there} is no folder that can be written to") from None
        return
    check_configuration(storage, manifest)


def check_configuration(storage: Storage, manifest: layout.Manifest) -> layout.Manifest | None:
    """The manifest there, if it can be read; ConfigError where it cannot become ``manifest``."""
    try:
        there = read_manifest(storage)
    except CacheError as error:
        _check_domains(storage, manifest, error)
        return None
    if there is None:
        _check_free(storage.url)
        return None
    if there.version < manifest.version:
        raise ConfigError(
            f"{storage.url}: has format version {there.version}, which is read but not extended: "
            "build into a new cache"
        )
    # A domain without its tokens binds nobody: what kept its source from being read can be mended.
    bound = tuple(d for d in there.domains if storage.read(f"{d.name}/zarr.json") is not None)
    differences = manifest_differences(there.model_copy(update={"domains": bound}), manifest)
    if bound and differences:
        raise ConfigError(f"{storage.url}: was built with another configuration: {'; '.join(differences)}")
    return there


def keep_splits(
    storage: LockedStorage, there: layout.Manifest | None, manifest: layout.Manifest
) -> layout.Manifest:
    """``manifest`` with the ``splits`` that the one ``there`` has of domains which stay as they are.

    A state that is not the one told of is taken away, and its domain is tokenised again. ``Writer.finish``
    writes what is missing, so a kill leaves less told, and nothing wrong.
    """
    if there is None:
        return manifest
    kept: dict[tuple[str, int | None], str] = {}
    for before in there.domains:
        if before.splits is None:
            continue
        if usable_state(storage, there, before.name) is not None:
            kept[before.name, before.max_tokens] = before.splits
        else:
            storage.delete(f"{before.name}/zarr.json")
    domains = (d.model_copy(update={"splits": kept.get((d.name, d.max_tokens))}) for d in manifest.domains)
    return manifest.model_copy(update={"domains": tuple(domains)})


def _check_free(url: str) -> None:
    """Raise ConfigError where a folder holds somebody's files, but for hidden ones and a card."""
    folder = Path(url.removeprefix("file://"))
    if not folder.is_dir():  # an object store
        return
    found = {path.name for path in folder.iterdir()} - {"README.md", LOCK_KEY}
    others = sorted(name for name in found if not name.startswith("."))
    if others and not any(name.startswith("ddk.") for name in others):
        raise ConfigError(
            f"cache: {url} holds what is no cache, such as {others[0]}: name a new or an empty folder"
        )


def _check_domains(storage: Storage, manifest: layout.Manifest, damage: CacheError) -> None:
    """Without a manifest, the domains' own documents say whether they are those of ``manifest``.

    Raises
    ------
    CacheError
        They are not, or there are none.
    """
    try:
        states = [read_state(storage, manifest, domain.name) for domain in manifest.domains]
    except CacheError as error:
        raise CacheError(f"{damage}; and {error}: build into a new cache") from damage
    if not any(states):
        raise CacheError(f"{damage}: build into a new cache") from damage
    logger.warning("%s; it is written anew", damage)
