"""Read and write the manifest of a cache and the states of its domains."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from ddk_cache.errors import CacheNotFoundError, DamagedError, VersionError
from ddk_cache.format import codec, layout, shards, zarr_documents
from ddk_cache.format.commit_record import record_size
from ddk_cache.storage.storage import Storage
from ddk_cache.util.configuration import Model, first_problem

logger = logging.getLogger(__name__)

FINGERPRINT, BUILD_ID = "fingerprint", "build_id"  # attributes that tie a domain's group to one build
Listing = defaultdict[str, set[int]]  # the shards that have an object, by array: "<domain>/<split>/<array>"


def answer_arrays(manifest: layout.Manifest, split: layout.SplitName) -> dict[str, layout.RowArray]:
    """Return the arrays of a split that a teacher's answers make, by name.

    ``label_logprob`` is exact, and 0 where a position has no label.
    """
    arrays = {"label_logprob": layout.RowArray("float32", manifest.seq_length, "pcodec")}
    if manifest.has_targets(split):
        arrays |= codec.row_arrays(manifest.target, manifest.seq_length)
    return arrays


def split_arrays(
    manifest: layout.Manifest, domain: str, split: layout.SplitName, kind: layout.Kind = layout.COMMITS
) -> dict[str, layout.RowArray]:
    """Return the arrays that commit records of a kind cover, in their order; by default all of a split."""
    arrays = manifest.token_arrays(domain)
    return arrays if kind == layout.TOKEN_COMMITS else arrays | answer_arrays(manifest, split)


def read_manifest(storage: Storage) -> layout.Manifest | None:
    """Return the root's manifest; None if there is no cache.

    Raises VersionError if this release does not read the format version, and DamagedError if the document is
    damaged, of another format, or has values of wrong types or sizes.
    """
    where = f"{storage.url}/zarr.json"
    data = zarr_documents.parse_group(storage.read("zarr.json"), where)
    if data is None:
        return None
    if data.get("format") != layout.FORMAT:
        raise DamagedError(f"{where}: is not a {layout.FORMAT} cache")
    version = data.get("version")
    if version != layout.FORMAT_VERSION:
        is_older = isinstance(version, int) and version < layout.FORMAT_VERSION
        remedy = "build the cache again into a new folder" if is_older else "upgrade ddk-cache"
        raise VersionError(
            f"{where}: has format version {version!r:.100}, and this release reads {layout.FORMAT_VERSION}: "
            f"{remedy}"
        )
    return _validated(layout.Manifest, data, f"{where}: the manifest is wrong")


def existing_manifest(storage: Storage) -> layout.Manifest:
    """Return the root's manifest; raise CacheNotFoundError if there is no cache."""
    manifest = read_manifest(storage)
    if manifest is None:
        raise CacheNotFoundError(f"{storage.url}: there is no cache here")
    return manifest


def manifest_document(manifest: layout.Manifest) -> bytes:
    """Return the root's zarr.json."""
    return zarr_documents.group(manifest.model_dump(mode="json"))


def read_state(storage: Storage, manifest: layout.Manifest, domain: str) -> layout.DomainState | None:
    """Return the state of a domain; None before its tokens are written.

    Raises DamagedError if the document is damaged, of another domain or build, or has impossible counts.
    """
    where = f"{storage.url}/{domain}/zarr.json"
    data = zarr_documents.parse_group(storage.read(f"{domain}/zarr.json"), where)
    if data is None:
        return None
    identity = data.pop(FINGERPRINT, None), data.pop(BUILD_ID, None)
    if identity != (manifest.fingerprint(domain), manifest.domain(domain).build_id):
        raise DamagedError(f"{where}: belongs to another domain, cache or build")
    state = _validated(layout.DomainState, data, f"{where}: the attributes are wrong")
    for split in layout.SPLITS:
        _check_counts(manifest, state.split(split), f"{where}: {split}")
    if not state.validation.labels:
        raise DamagedError(f"{where}: validation.labels: must be at least 1, or there is no cross-entropy")
    return state


def _validated(model: type[Model], data: dict[str, Any], problem: str) -> Model:
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise DamagedError(f"{problem}: {first_problem(error, model)}") from error


def usable_state(storage: Storage, manifest: layout.Manifest, domain: str) -> layout.DomainState | None:
    """Return the state that a build resumes from; None if it is missing, or damaged (with a warning)."""
    try:
        return read_state(storage, manifest, domain)
    except DamagedError as error:
        logger.warning("%s; the domain is tokenised again", error)
        return None


def read_build_id(storage: Storage, domain: str) -> str | None:
    """Return the build id in a domain's document, for a cache whose manifest is damaged."""
    try:
        data = zarr_documents.parse_group(storage.read(f"{domain}/zarr.json"), domain) or {}
    except DamagedError:
        return None
    return data.get(BUILD_ID)


def _check_counts(manifest: layout.Manifest, counts: layout.SplitState, where: str) -> None:
    if layout.shards(counts.rows, manifest.shard_rows) > layout.MOST_SHARDS:
        raise DamagedError(f"{where}.rows: make more than {layout.MOST_SHARDS:,} shards")
    if counts.tokens > counts.rows * manifest.seq_length:
        raise DamagedError(f"{where}.tokens: are more than {counts.rows:,} rows hold")
    if counts.labels > counts.tokens:
        raise DamagedError(f"{where}.labels: are more than its {counts.tokens:,} tokens")


def domain_documents(manifest: layout.Manifest, domain: str, state: layout.DomainState) -> dict[str, bytes]:
    """Return every zarr.json of a domain by key, in the order to write them: its state comes last."""
    documents: dict[str, bytes] = {}
    for split in layout.SPLITS:
        rows = state.split(split).rows
        shard_rows = manifest.rows_per_shard(rows)
        for name, array in split_arrays(manifest, domain, split).items():
            documents[f"{domain}/{split}/{name}/zarr.json"] = zarr_documents.row_array(
                array, rows, shard_rows
            )
        for kind in layout.KINDS:
            names = list(split_arrays(manifest, domain, split, kind))
            documents[f"{domain}/{split}/{kind}/zarr.json"] = zarr_documents.commit_array(
                layout.shards(rows, manifest.shard_rows), record_size(len(names), shard_rows), names
            )
        documents[f"{domain}/{split}/zarr.json"] = zarr_documents.group()
    identity = {FINGERPRINT: manifest.fingerprint(domain), BUILD_ID: manifest.domain(domain).build_id}
    documents[f"{domain}/zarr.json"] = zarr_documents.group(state.model_dump(mode="json") | identity)
    return documents


def finished_shards(storage: Storage, domain: str, split: layout.SplitName) -> list[int]:
    """Return the shards that have their commit record, ascending."""
    prefix = f"{domain}/{split}/{layout.COMMITS}"
    return sorted(list_shards(storage.sizes(prefix))[prefix])


def list_shards(keys: Iterable[str]) -> Listing:
    """Return the shards of each array that has an object among ``keys``."""
    listing: Listing = defaultdict(set)
    for key in keys:
        array, _, chunk = key.partition("/c/")
        if (shard := chunk.removesuffix("/0")).isdecimal():
            listing[array].add(int(shard))
    return listing


def size_limits(manifest: layout.Manifest, key: layout.ShardKey, names: Sequence[str]) -> dict[str, int]:
    """Return the most bytes that each of a shard's objects may have, by key."""
    arrays = split_arrays(manifest, key.domain, key.split)
    return {key.object(name): shards.most_object_bytes(arrays[name], manifest.shard_rows) for name in names}
