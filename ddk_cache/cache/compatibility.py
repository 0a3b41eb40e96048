"""Decide whether a build can resume or extend an existing cache."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddk_cache.cache.metadata import read_build_id, read_manifest, read_state
from ddk_cache.errors import CacheError, CacheNotFoundError, ConfigError, DamagedError
from ddk_cache.format import layout
from ddk_cache.storage.lock import LOCK_KEY, LockedStorage
from ddk_cache.storage.storage import Storage
from ddk_cache.util import durable
from ddk_cache.util.configuration import differences, flat

logger = logging.getLogger(__name__)


def manifest_differences(existing: layout.Manifest, requested: layout.Manifest) -> list[str]:
    """Return each conflicting key as "key: value in the cache -> value in the configuration"."""
    exempt = {"domains", "teachers", "version"}
    before = flat(existing.model_dump(exclude=exempt)) | _teacher_keys("teacher", existing.teachers[0])
    after = flat(requested.model_dump(exclude=exempt)) | _teacher_keys("teacher", requested.teachers[0])
    for domain in existing.domains:
        match = next((other for other in requested.domains if other.name == domain.name), None)
        key = f"domains.{domain.name}"
        if match is None:
            before[key], after[key] = "in the cache", "missing"
            continue
        before |= flat(domain.source, f"{key}.")
        after |= flat(match.source, f"{key}.")
        if domain.teacher_index or match.teacher_index:
            before |= _teacher_keys(f"{key}.teacher", existing.teacher_of(domain.name))
            after |= _teacher_keys(f"{key}.teacher", requested.teacher_of(domain.name))
        if _limit(match.max_tokens) < _limit(domain.max_tokens):
            before[f"{key}.max_tokens"], after[f"{key}.max_tokens"] = domain.max_tokens, match.max_tokens
    return differences(before, after)


def _teacher_keys(prefix: str, teacher: layout.TeacherInfo) -> dict[str, Any]:
    """Return the settings that determine a teacher's answers, by dotted key."""
    content = teacher.settings
    arguments = content.pop("engine_args")
    return flat(content, f"{prefix}.") | flat(arguments, f"{prefix}.engine_args.")


def _limit(max_tokens: int | None) -> float:
    return float("inf") if max_tokens is None else max_tokens


def check_cache(url: str, manifest: layout.Manifest) -> None:
    """Check that ``open_writer`` would create or resume the cache; write nothing.

    Raises ConfigError, which lists what differs, if it was built with another configuration, or if it is on
    the hub, and CacheError if it cannot be reached or, where it is a folder, not be written.
    """
    with suppress(CacheNotFoundError):  # without a valid token it writes nothing, but refuses the hub
        check_configuration(LockedStorage(url, write_token=""), manifest)
    path = url.removeprefix("file://")
    if "://" in path:
        return
    folder = durable.nearest_folder(Path(path))
    try:
        durable.check_writable(folder)
    except OSError:
        raise CacheError(f"{url}: {folder} is not a folder that can be written to") from None


def check_configuration(storage: Storage, requested: layout.Manifest) -> layout.Manifest:
    """Return ``requested`` with the build ids of the domains that the cache has already.

    Raises ConfigError if the cache cannot become the requested one, or the folder holds something else, and
    CacheError if it has another format version, or its manifest is lost and its domains are others.
    """
    try:
        existing = read_manifest(storage)
    except DamagedError as error:
        return _recover_manifest(storage, requested, error)
    if existing is None:
        _check_free(storage.url)
        return requested
    # A domain without a state may still change: the user may have corrected its source.
    bound = tuple(d for d in existing.domains if storage.read(f"{d.name}/zarr.json") is not None)
    conflicts = manifest_differences(existing.model_copy(update={"domains": bound}), requested)
    if bound and conflicts:
        raise ConfigError(f"{storage.url}: was built with another configuration: {'; '.join(conflicts)}")
    # A domain without objects gets a new build id: a stale copy must not pass for the new domain.
    names = {domain.name for domain in bound}
    begun = (d for d in existing.domains if d.name in names or storage.sizes(d.name))
    build_ids = {domain.name: domain.build_id for domain in begun}
    return _with_build_ids(requested, build_ids.get)


def _recover_manifest(storage: Storage, requested: layout.Manifest, damage: CacheError) -> layout.Manifest:
    """Return the manifest of a cache that has lost it, if its domains' documents are those of ``requested``.

    Raises CacheError if they are not, or there are none.
    """
    manifest = _with_build_ids(requested, lambda name: read_build_id(storage, name))
    try:
        states = [read_state(storage, manifest, domain.name) for domain in manifest.domains]
    except CacheError as error:
        raise CacheError(f"{damage}; and {error}: build into a new cache") from damage
    if not any(states):
        raise CacheError(f"{damage}: build into a new cache") from damage
    logger.warning("%s; it is written again", damage)
    return manifest


def _with_build_ids(manifest: layout.Manifest, build_id: Callable[[str], str | None]) -> layout.Manifest:
    domains = (d.model_copy(update={"build_id": build_id(d.name) or d.build_id}) for d in manifest.domains)
    return manifest.model_copy(update={"domains": tuple(domains)})


def _check_free(url: str) -> None:
    """Raise ConfigError if a folder has foreign files, other than hidden ones and a card."""
    folder = Path(url.removeprefix("file://"))
    if not folder.is_dir():  # an object store
        return
    names = {path.name for path in folder.iterdir()} - {"README.md", LOCK_KEY}
    others = sorted(name for name in names if not name.startswith("."))
    if others and not any(name.startswith("ddk.") for name in others):
        raise ConfigError(
            f"cache: {url} is not a cache but holds other files, such as {others[0]}: "
            "name a new or an empty folder"
        )
