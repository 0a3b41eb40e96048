"""Read what describes a cache: manifest, domains' states, markers."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ddk_cache import codec, layout, markers, metadata, shards
from ddk_cache.configuration import first_problem
from ddk_cache.errors import CacheError, CacheNotFoundError, UnreachableError
from ddk_cache.storage import Storage

logger = logging.getLogger(__name__)

BINDING = "binding"  # in a domain's attribute: whose state it is


def split_arrays(manifest: layout.Manifest, split: layout.SplitName) -> dict[str, layout.RowArray]:
    """All arrays of a split, in the order of their records in the shard's marker."""
    arrays = layout.token_arrays(manifest.seq_length) | layout.label_array(manifest.seq_length)
    if manifest.has_targets(split):
        arrays |= codec.row_arrays(manifest.target, manifest.seq_length)
    return arrays


def vouched_arrays(
    manifest: layout.Manifest, split: layout.SplitName, kind: str = layout.MARKERS
) -> dict[str, layout.RowArray]:
    """What the markers of that kind vouch for."""
    if kind == layout.TOKEN_MARKERS:
        return layout.token_arrays(manifest.seq_length)
    return split_arrays(manifest, split)


def parse_manifest(data: Mapping[str, Any], where: str) -> layout.Manifest:
    """Validate the root's attribute.

    Raises
    ------
    CacheError
        In one line: another format, a version this release does not know, wrong types or sizes.
    """
    if data.get("format") != layout.FORMAT:
        raise CacheError(f"{where}: is not a {layout.FORMAT} cache")
    version = data.get("version")
    if version not in (1, layout.FORMAT_VERSION):
        raise CacheError(
            f"{where}: has format version {version!r}; this release reads 1 and {layout.FORMAT_VERSION}: "
            "install a release of ddk-cache that knows it"
        )
    if version == 1:
        data = {key: value for key, value in data.items() if key != "teacher"} | {
            "teachers": [data.get("teacher")]
        }
    try:
        return layout.Manifest.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise CacheError(
            f"{where}: the manifest is wrong: {first_problem(error, layout.Manifest)}"
        ) from error


def read_manifest(storage: Storage) -> layout.Manifest | None:
    """The root's manifest; None where there is no cache."""
    where = f"{storage.url}/zarr.json"
    data = metadata.parse_group(storage.read("zarr.json"), where)
    return None if data is None else parse_manifest(data, where)


def existing_manifest(storage: Storage) -> layout.Manifest:
    """The root's manifest.

    Raises
    ------
    CacheNotFoundError
        There is no cache there.
    """
    manifest = read_manifest(storage)
    if manifest is None:
        raise CacheNotFoundError(f"{storage.url}: there is no cache here")
    return manifest


def manifest_document(manifest: layout.Manifest) -> bytes:
    """The root's zarr.json."""
    own = manifest.model_dump(mode="json")
    for domain in own["domains"]:
        if domain["splits"] is None:
            del domain["splits"]
    return metadata.group(own)


def read_state(storage: Storage, manifest: layout.Manifest, domain: str) -> layout.DomainState | None:
    """What is known of a domain; None before its tokens are written.

    Raises
    ------
    CacheError
        The document is damaged, belongs to another domain or cache, or has counts that cannot be.
    """
    where = f"{storage.url}/{domain}/zarr.json"
    data = metadata.parse_group(storage.read(f"{domain}/zarr.json"), where)
    if data is None:
        return None
    if manifest.version > 1 and data.pop(BINDING, None) != manifest.binding(domain):
        raise CacheError(f"{where}: belongs to another domain or another cache")
    try:
        state = layout.DomainState.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise CacheError(
            f"{where}: the attributes are wrong: {first_problem(error, layout.DomainState)}"
        ) from error
    if manifest.domain(domain).splits not in (None, state.splits):
        raise CacheError(f"{where}: is another build's than the one that the manifest tells of")
    for split in layout.SPLITS:
        _check_counts(manifest, state.split(split), f"{where}: {split}")
    if not state.validation.labels:
        raise CacheError(f"{where}: validation.labels: without one there is no cross-entropy")
    return state


def usable_state(storage: Storage, manifest: layout.Manifest, domain: str) -> layout.DomainState | None:
    """What a build goes on from; None before the domain's tokens are written, and, with a warning, where its
    document is damaged."""
    try:
        return read_state(storage, manifest, domain)
    except UnreachableError:
        raise
    except CacheError as error:
        logger.warning("%s; the domain is tokenised again", error)
        return None


def _check_counts(manifest: layout.Manifest, counts: layout.SplitState, where: str) -> None:
    """Raise CacheError where no split can have such counts."""
    if layout.shards(counts.rows, manifest.shard_rows) > layout.MOST_SHARDS:
        raise CacheError(f"{where}.rows: make more than {layout.MOST_SHARDS:,} shards")
    if counts.tokens > counts.rows * manifest.seq_length:
        raise CacheError(f"{where}.tokens: are more than {counts.rows:,} rows hold")
    if counts.labels > counts.tokens:
        raise CacheError(f"{where}.labels: are more than its {counts.tokens:,} tokens")


def domain_documents(manifest: layout.Manifest, domain: str, state: layout.DomainState) -> dict[str, bytes]:
    """Every zarr.json of a domain by key, in the order to write them: the one with its state last."""
    found: dict[str, bytes] = {}
    for split in layout.SPLITS:
        rows, arrays = state.split(split).rows, split_arrays(manifest, split)
        for name, array in arrays.items():
            found[f"{domain}/{split}/{name}/zarr.json"] = metadata.row_array(array, rows, manifest.shard_rows)
        for kind in (layout.TOKEN_MARKERS, layout.MARKERS):
            names = list(vouched_arrays(manifest, split, kind))
            size = markers.size(len(names), manifest.shard_rows)
            document = metadata.marker_array(layout.shards(rows, manifest.shard_rows), size, names)
            found[f"{domain}/{split}/{kind}/zarr.json"] = document
        if state.split(split).token_seals is not None:
            document = metadata.seal_array(layout.shards(rows, manifest.shard_rows), markers.SEAL)
            found[f"{domain}/{split}/{layout.TOKEN_SEALS}/zarr.json"] = document
        found[f"{domain}/{split}/zarr.json"] = metadata.group()
    own = state.model_dump(mode="json") | {BINDING: manifest.binding(domain)}
    for split in layout.SPLITS:
        if own[split]["token_seals"] is None:
            del own[split]["token_seals"]
    found[f"{domain}/zarr.json"] = metadata.group(own)
    return found


def finished_shards(
    storage: Storage, domain: str, split: layout.SplitName, kind: str = layout.MARKERS
) -> list[int]:
    """The numbers of the shards that have their marker, ascending."""
    prefix = layout.marker_prefix(domain, split, kind)
    return shard_numbers(storage.sizes(prefix.rstrip("/")), prefix)


def shard_numbers(keys: Iterable[str], prefix: str) -> list[int]:
    """The shards' numbers in the keys that begin with ``prefix``, ascending."""
    numbers = (key.removeprefix(prefix).partition("/")[0] for key in keys if key.startswith(prefix))
    return sorted(int(number) for number in numbers if number.isdigit())


def shard_limits(
    manifest: layout.Manifest, domain: str, split: layout.SplitName, shard: int, names: Sequence[str]
) -> dict[str, int]:
    """The most bytes that each of a shard's objects may have, by key."""
    arrays, rows = split_arrays(manifest, split), manifest.shard_rows
    return {
        layout.shard_key(domain, split, name, shard): shards.most_object_bytes(arrays[name], rows)
        for name in names
    }


def rows_in(total: int, shard: int, shard_rows: int) -> int:
    """Rows of a shard of a split of ``total`` rows; 0 beyond its end."""
    return max(0, min(shard_rows, total - shard * shard_rows))


def read_markers(
    storage: Storage,
    manifest: layout.Manifest,
    domain: str,
    split: layout.SplitName,
    numbers: Sequence[int],
    codebook: str | None,
    kind: str = layout.MARKERS,
) -> list[markers.Marker | CacheError]:
    """The markers of the numbered shards; why there is none where one is missing, damaged or misplaced."""
    arrays = len(vouched_arrays(manifest, split, kind))
    size = markers.size(arrays, manifest.shard_rows)
    if kind == layout.TOKEN_MARKERS or not manifest.has_targets(split):
        codebook = None  # they do not depend on it
    keys = [layout.marker_key(domain, split, number, kind) for number in numbers]
    found: list[markers.Marker | CacheError] = []
    for number, key, data in zip(numbers, keys, _read_heads(storage, keys, size), strict=True):
        place = markers.place(manifest, domain, split, number, codebook)
        try:
            found.append(
                data
                if isinstance(data, CacheError)
                else markers.parse(data, place, arrays, manifest.shard_rows)
            )
        except ValueError as error:
            found.append(CacheError(f"{storage.url}/{key}: {error}"))
    return found


def _read_heads(storage: Storage, keys: Sequence[str], size: int) -> list[bytes | CacheError]:
    """The objects' first bytes, asked for at once; one by one, and whole, where that fails."""
    if len(keys) == 1:
        try:
            return [storage.read(keys[0], size) or CacheError(f"{storage.url}/{keys[0]}: is missing")]
        except CacheError as error:
            return [error]
    try:
        return list(storage.read_ranges([(key, 0, size) for key in keys]))
    except CacheError:
        return [found for key in keys for found in _read_heads(storage, [key], size)]
