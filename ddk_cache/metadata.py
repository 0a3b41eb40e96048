"""The zarr.json documents of a cache: what makes every array open in plain zarr.

They are written out here, not taken from zarr, so that they do not change with zarr's release.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ddk_cache.layout import MANIFEST_KEY, MARKER_FIELDS, RowArray
from ddk_cache.shards import PCODEC_LEVEL, ZSTD_LEVEL

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}


def _compressor(array: RowArray) -> list[dict[str, Any]]:
    if array.compressor == "zstd":
        return [_BYTES, {"name": "numcodecs.zstd", "configuration": {"level": ZSTD_LEVEL}}]
    configuration = {"level": PCODEC_LEVEL, "equal_pages_up_to": array.page}
    return [{"name": "numcodecs.pcodec", "configuration": configuration}]


def group(attributes: Mapping[str, Any] | None = None) -> bytes:
    """A group's zarr.json; ``attributes`` become the project's own attribute."""
    own = {} if attributes is None else {MANIFEST_KEY: attributes}
    return _json({"zarr_format": 3, "node_type": "group", "attributes": own})


def row_array(array: RowArray, rows: int, shard_rows: int) -> bytes:
    """The zarr.json of an array over rows: one row a chunk, ``shard_rows`` chunks a shard, crc32c each."""
    sharding = {
        "chunk_shape": [1, array.width],
        "codecs": [*_compressor(array), _CRC32C],
        "index_codecs": [_BYTES, _CRC32C],
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _array((rows, array.width), (shard_rows, array.width), array.dtype, codecs)


def marker_array(shards: int, arrays: Sequence[str]) -> bytes:
    """The zarr.json of a split's markers [shards, arrays, 2]: one chunk a shard; names its columns."""
    shape = (shards, len(arrays), MARKER_FIELDS)
    return _array(shape, (1, *shape[1:]), "uint32", [_BYTES, _CRC32C], {"arrays": list(arrays)})


def _array(
    shape: Sequence[int],
    chunk: Sequence[int],
    dtype: str,
    codecs: Sequence[Mapping[str, Any]],
    attributes: Mapping[str, Any] | None = None,
) -> bytes:
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": list(codecs),
            "attributes": dict(attributes or {}),
        }
    )


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()
