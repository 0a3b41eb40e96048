"""Read what describes a cache: manifest, domains' states, markers."""

import contextlib

import numpy as np
from numpy.typing import NDArray

from ddk_cache import codec, layout, shards
from ddk_cache.errors import CacheNotFoundError
from ddk_cache.storage import Storage


def split_arrays(manifest: layout.Manifest, split: layout.Split) -> dict[str, layout.RowArray]:
    """All arrays of a split, in the order of their checksums in the shard's marker."""
    arrays = layout.token_arrays(manifest.seq_length) | layout.label_array(manifest.seq_length)
    if manifest.has_targets(split):
        arrays |= codec.row_arrays(manifest.target, manifest.seq_length)
    return arrays


def read_manifest(storage: Storage) -> layout.Manifest | None:
    """The root's manifest; None where there is no cache."""
    where = f"{storage.url}/zarr.json"
    data = layout.parse_group(storage.read("zarr.json"), where)
    return None if data is None else layout.parse_manifest(data, where)


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


def read_state(storage: Storage, domain: str) -> layout.DomainState | None:
    """What is known of a domain; None before its tokens are written."""
    where = f"{storage.url}/{domain}/zarr.json"
    data = layout.parse_group(storage.read(f"{domain}/zarr.json"), where)
    return None if data is None else layout.parse_state(data, where)


def finished_shards(storage: Storage, domain: str, split: layout.Split) -> list[int]:
    """The numbers of the shards that have their marker, ascending."""
    prefix = layout.marker_prefix(domain, split)
    numbers = (key.removeprefix(prefix).partition("/")[0] for key in storage.sizes(prefix))
    return sorted(int(number) for number in numbers if number.isdigit())


def read_markers(
    storage: Storage, manifest: layout.Manifest, domain: str, split: layout.Split
) -> dict[int, NDArray[np.uint32]]:
    """crc32c and size in bytes of each object of a finished shard, [arrays, 2] by shard's number.

    A marker that is damaged vouches for nothing and is left out.
    """
    numbers = finished_shards(storage, domain, split)
    shape = (len(split_arrays(manifest, split)), layout.MARKER_FIELDS)
    length = shards.CHECKSUM + 4 * shape[0] * shape[1]
    ranges = [(layout.marker_key(domain, split, number), 0, length) for number in numbers]
    found: dict[int, NDArray[np.uint32]] = {}
    for number, raw in zip(numbers, storage.read_ranges(ranges), strict=True):
        with contextlib.suppress(ValueError):
            found[number] = np.frombuffer(shards.unseal(raw), "<u4").reshape(shape)
    return found


def finished_rows(
    storage: Storage, manifest: layout.Manifest, domain: str, split: layout.Split, rows: int
) -> NDArray[np.int64]:
    """The numbers of the rows in finished shards, ascending."""
    per_shard = manifest.shard_rows
    done = finished_shards(storage, domain, split)
    return np.concatenate(
        [np.empty(0, np.int64)]
        + [np.arange(shard * per_shard, min((shard + 1) * per_shard, rows)) for shard in done]
    )
