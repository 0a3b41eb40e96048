"""A shard object of zarr v3's sharding codec: chunks one after another, then their index and its crc32c.

zarr reads and writes the same bytes; going past it spares about a millisecond a chunk. Every inner chunk
is one row: an array of ``width`` numbers, compressed, followed by its crc32c (4 bytes, little-endian).
"""

import contextlib
import struct
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from ddk_cache.layout import RowArray

PCODEC_LEVEL = 8
ZSTD_LEVEL = 3

INDEX_ENTRY = 16  # bytes: offset and length, uint64 each
CHECKSUM = 4  # bytes
MISSING = 2**64 - 1  # zarr's offset and length of a chunk that was never written


def _compressor(array: RowArray) -> Any:
    if array.compressor == "zstd":
        return Zstd(level=ZSTD_LEVEL)
    return PCodec(level=PCODEC_LEVEL, equal_pages_up_to=array.page)


def checksum(data: bytes) -> int:
    """crc32c of an object, as the markers keep it."""
    return int(google_crc32c.value(data))


def pack(rows: NDArray[Any], array: RowArray, shard_rows: int) -> bytes:
    """Compress ``rows`` [n <= shard_rows, width] into one shard object; the same rows give the same bytes."""
    assert rows.shape[1:] == (array.width,)
    assert len(rows) <= shard_rows
    compressor = _compressor(array)
    chunks = [
        seal(compressor.encode(np.ascontiguousarray(row))) for row in rows.astype(array.dtype, copy=False)
    ]
    lengths = np.array([len(chunk) for chunk in chunks], np.uint64)
    index = np.full((shard_rows, 2), MISSING, "<u8")
    index[: len(chunks), 0] = np.cumsum(lengths) - lengths
    index[: len(chunks), 1] = lengths
    return b"".join([*chunks, seal(index.tobytes())])


def tail_length(shard_rows: int) -> int:
    """Bytes of the index at a shard's end."""
    return shard_rows * INDEX_ENTRY + CHECKSUM


def parse_index(tail: bytes, shard_rows: int) -> NDArray[np.uint64]:
    """First and last-plus-one byte of each chunk, uint64 [shard_rows, 2]; both 0 where there is none.

    Raises
    ------
    ValueError
        The index is cut short or damaged.
    """
    index = np.frombuffer(unseal(tail), "<u8")
    if index.size != shard_rows * 2:
        raise ValueError("the index is cut short")
    index = index.reshape(shard_rows, 2)
    missing = index == MISSING
    spans = np.where(missing, 0, index)
    return np.stack([spans[:, 0], spans.sum(axis=1)], axis=1)


def unpack_row(chunk: bytes, array: RowArray) -> NDArray[Any]:
    """Decompress one row: [width].

    Raises
    ------
    ValueError
        The bytes are damaged.
    """
    body = unseal(chunk)
    try:
        row = np.frombuffer(_compressor(array).decode(body), array.dtype)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"cannot be decompressed: {error}") from error
    if row.shape != (array.width,):
        raise ValueError(f"holds {row.size} numbers, not {array.width}")
    return row


def unpack(data: bytes, array: RowArray, rows: int, shard_rows: int) -> NDArray[Any]:
    """Decompress the first ``rows`` rows of a whole shard object: [rows, width].

    Raises
    ------
    ValueError
        The bytes are damaged or cut short.
    """
    index = parse_index(data[-tail_length(shard_rows) :], shard_rows)
    return np.stack([unpack_row(data[int(start) : int(end)], array) for start, end in index[:rows]])


def unpack_healthy(data: bytes, array: RowArray, shard_rows: int) -> NDArray[Any]:
    """The first rows of a shard object that are whole: [n, width], n = 0 where nothing is."""
    whole: list[NDArray[Any]] = []
    with contextlib.suppress(ValueError):
        for start, end in parse_index(data[-tail_length(shard_rows) :], shard_rows):
            whole.append(unpack_row(data[int(start) : int(end)], array))
    return np.stack(whole) if whole else np.empty((0, array.width), array.dtype)


def seal(body: bytes) -> bytes:
    """Add the crc32c, as zarr's codec does."""
    body = bytes(body)
    return body + struct.pack("<I", checksum(body))


def unseal(sealed: bytes) -> bytes:
    """Check the crc32c and take it off.

    Raises
    ------
    ValueError
        It does not match.
    """
    body, seal = sealed[:-CHECKSUM], sealed[-CHECKSUM:]
    if len(seal) < CHECKSUM or struct.pack("<I", checksum(body)) != seal:
        raise ValueError("the checksum does not match")
    return body
