"""A shard object of zarr v3's sharding codec: chunks one after another, then their index and its crc32c.

zarr reads and writes the same bytes; going past it spares about a millisecond a chunk. Every inner chunk
is one row: an array of ``width`` numbers, compressed, followed by its crc32c (4 bytes, little-endian).
"""

import contextlib
import struct
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pcodec import standalone as pcodec

from ddk_cache.layout import RowArray

PCODEC_LEVEL = 8
ZSTD_LEVEL = 3

INDEX_ENTRY = 16  # bytes: offset and length, uint64 each
CHECKSUM = 4  # bytes
MOST_CHUNK_BYTES = 1 << 31
MISSING = 2**64 - 1  # zarr's offset and length of a chunk that was never written


def _compressor(array: RowArray) -> Any:
    if array.compressor == "zstd":
        return Zstd(level=ZSTD_LEVEL)
    return PCodec(level=PCODEC_LEVEL, equal_pages_up_to=array.page)


def checksum(data: bytes) -> int:
    """crc32c."""
    return int(google_crc32c.value(data))


def pack(rows: NDArray[Any], array: RowArray, shard_rows: int) -> bytes:
    """Compress ``rows`` [n <= shard_rows, width] into one shard object; the same rows give the same bytes."""
    return join(pack_rows(rows, array), shard_rows)


def pack_rows(rows: NDArray[Any], array: RowArray) -> list[bytes]:
    """Compress ``rows`` [n, width] into a chunk each."""
    assert rows.shape[1:] == (array.width,)
    compressor = _compressor(array)
    return [
        seal(compressor.encode(np.ascontiguousarray(row))) for row in rows.astype(array.dtype, copy=False)
    ]


def join(chunks: Sequence[bytes], shard_rows: int) -> bytes:
    """The shard object of its rows' chunks."""
    assert len(chunks) <= shard_rows
    lengths = np.array([len(chunk) for chunk in chunks], np.uint64)
    index = np.full((shard_rows, 2), MISSING, "<u8")
    index[: len(chunks), 0] = np.cumsum(lengths) - lengths
    index[: len(chunks), 1] = lengths
    return b"".join([*chunks, seal(index.tobytes())])


def tail_length(shard_rows: int) -> int:
    """Bytes of the index at a shard's end."""
    return shard_rows * INDEX_ENTRY + CHECKSUM


def chunk_lengths(tail: bytes, shard_rows: int) -> NDArray[np.int64]:
    """Each chunk's length in bytes [shard_rows] from a shard's index; 0 where there is none.

    Raises
    ------
    ValueError
        The index is cut short or damaged, or the chunks do not stand one after another.
    """
    index = np.frombuffer(unseal(tail), "<u8")
    if index.size != shard_rows * 2:
        raise ValueError("the index is cut short")
    offsets, lengths = np.where(index == MISSING, 0, index).reshape(shard_rows, 2).T
    if lengths.max() > MOST_CHUNK_BYTES:
        raise ValueError("the index names a chunk that is too large")
    ends = np.cumsum(lengths)
    if not np.array_equal(offsets, np.where(lengths > 0, ends - lengths, 0)):
        raise ValueError("the index does not name the chunks one after another")
    return lengths.astype(np.int64)


def most_bytes(array: RowArray) -> int:
    """No chunk of that array is longer, however badly it compresses."""
    return 2 * array.width * array.numpy_dtype.itemsize + 4096


def most_object_bytes(array: RowArray, shard_rows: int) -> int:
    """No shard object of that array is larger."""
    return shard_rows * most_bytes(array) + tail_length(shard_rows)


def unpack_row(chunk: bytes, array: RowArray) -> NDArray[Any]:
    """Decompress one row: [width]; no more memory is taken than that.

    Raises
    ------
    ValueError
        The bytes are damaged.
    """
    row = np.empty(array.width, array.dtype)
    unpack_into(row, chunk, array)
    return row


def unpack_into(row: NDArray[Any], chunk: bytes, array: RowArray, crc: int | None = None) -> None:
    """Decompress one row into ``row`` [width].

    Raises
    ------
    ValueError
        The bytes are damaged, or not those that ``crc`` speaks of.
    """
    if crc is not None and seal_of(chunk) != crc:
        raise ValueError("a row is another than the marker vouches for")
    body = unseal(chunk)
    try:
        if array.compressor == "zstd":
            if (claimed := zstd_content_size(body)) != row.nbytes:
                raise ValueError(f"expands to {claimed} bytes, not {row.nbytes}")
            Zstd().decode(body, row)
            return
        progress = pcodec.simple_decompress_into(body, row)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"cannot be decompressed: {error}") from error
    if progress.n_processed != array.width or not progress.finished:
        raise ValueError(f"does not hold {array.width} numbers")


def zstd_content_size(frame: bytes) -> int | None:
    """The bytes that a zstd frame says it expands to; None where it does not say (RFC 8878, 3.1.1)."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("is no zstd frame")
    descriptor = frame[4]
    is_single = bool(descriptor & 0x20)
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    length = (int(is_single), 2, 4, 8)[descriptor >> 6]
    if not length:
        return None
    return int.from_bytes(frame[start : start + length], "little") + 256 * (length == 2)


def unpack(data: bytes, array: RowArray, rows: int, shard_rows: int, first: int = 0) -> NDArray[Any]:
    """Decompress ``rows`` rows of a whole shard object, from row ``first`` on: [rows, width].

    Raises
    ------
    ValueError
        The bytes are damaged or cut short.
    """
    lengths = chunk_lengths(data[-tail_length(shard_rows) :], shard_rows)
    ends = np.cumsum(lengths)
    if ends[-1] + tail_length(shard_rows) != len(data):
        raise ValueError("has bytes that are no row's")
    spans = np.stack([ends - lengths, ends], axis=1)[first : first + rows].tolist()
    return np.stack([unpack_row(data[start:end], array) for start, end in spans])


def unpack_vouched(
    data: bytes, array: RowArray, lengths: NDArray[np.integer], crcs: NDArray[np.integer]
) -> NDArray[Any]:
    """The first rows of a shard object that are as vouched for: [n, width], n = 0 where none is."""
    whole: list[NDArray[Any]] = []
    start = 0
    with contextlib.suppress(ValueError):
        for length, crc in zip(lengths.tolist(), crcs.tolist(), strict=True):
            chunk = data[start : start + length]
            if seal_of(chunk) != crc:
                break
            whole.append(unpack_row(chunk, array))
            start += length
    return np.stack(whole) if whole else np.empty((0, array.width), array.dtype)


def seal_of(chunk: bytes | memoryview) -> int:
    """The crc32c that a chunk, or anything sealed, ends with; not checked."""
    return int.from_bytes(chunk[-CHECKSUM:], "little")


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
