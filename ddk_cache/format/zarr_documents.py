"""The zarr.json documents of a cache: they make every array open in plain zarr.

They are written out here, not taken from zarr, so that they do not change with zarr's release. A group's
own attribute ends with the sha256 of its content, so that a flipped bit is detected.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ddk_cache.errors import DamagedError
from ddk_cache.format.layout import ATTRIBUTE, RowArray, digest
from ddk_cache.format.shards import compressor_options

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}


def group(attributes: Mapping[str, Any] | None = None) -> bytes:
    """Return a group's zarr.json; ``attributes`` become the cache's own attribute, with their digest."""
    content = {} if attributes is None else {ATTRIBUTE: {**attributes, "sha256": digest(attributes)}}
    return _json({"zarr_format": 3, "node_type": "group", "attributes": content})


def parse_group(raw: bytes | None, where: str) -> dict[str, Any] | None:
    """Return the cache's attribute of a zarr v3 group without its digest; None if ``raw`` is None.

    Raises DamagedError if the document is not a group of a cache, or its digest does not match.
    """
    if raw is None:
        return None
    try:
        document = json.loads(raw)
        if document["zarr_format"] != 3 or document["node_type"] != "group":
            raise DamagedError(f"{where}: is not a zarr v3 group")
        content = document["attributes"][ATTRIBUTE]
        if not isinstance(content, dict):
            raise DamagedError(f"{where}: the attribute {ATTRIBUTE!r} must be an object")
        expected = content.pop("sha256", digest(content))  # version 1, which is refused later, had none
        if digest(content) != expected:
            raise DamagedError(f"{where}: is damaged: its sha256 does not match its content")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{where}: is damaged: it cannot be read as a document of a cache") from error
    return content


def row_array(array: RowArray, rows: int, shard_rows: int) -> bytes:
    """Return the zarr.json of an array over rows: one row a chunk, ``shard_rows`` chunks a shard."""
    compressor = {"name": f"numcodecs.{array.compressor}", "configuration": compressor_options(array)}
    serializer = [] if array.compressor == "pcodec" else [_BYTES]  # pcodec compresses numbers, not bytes
    sharding = {
        "chunk_shape": [1, array.width],
        "codecs": [*serializer, compressor, _CRC32C],
        "index_codecs": [_BYTES, _CRC32C],
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _array((rows, array.width), (shard_rows, array.width), array.dtype, codecs)


def commit_array(shards: int, size: int, arrays: Sequence[str]) -> bytes:
    """Return the zarr.json of commit records, uint8 [shards, size]; it names the arrays that they cover."""
    return _array((shards, size), (1, size), "uint8", [{"name": "bytes"}], {"arrays": list(arrays)})


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
