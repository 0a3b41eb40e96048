"""A shard object of zarr v3's sharding codec: chunks one after another, then their index and its crc32c.

zarr reads and writes the same bytes; bypassing it saves about a millisecond a chunk. Every inner chunk is
one row: an array of ``width`` numbers, compressed, followed by its crc32c (4 bytes, little-endian).
"""

from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pcodec import standalone as pcodec

from ddk_cache.format.layout import RowArray

PCODEC_LEVEL = 8
ZSTD_LEVEL = 3

INDEX_ENTRY = 16  # bytes: offset and length, uint64 each
CHECKSUM = 4  # bytes
MISSING = 2**64 - 1  # zarr's offset and length of a chunk that was never written


def compressor_options(array: RowArray) -> dict[str, int]:
    """Return the options of an array's compressor, which its zarr.json names too."""
    if array.compressor == "zstd":
        return {"level": ZSTD_LEVEL}
    return {"level": PCODEC_LEVEL, "equal_pages_up_to": array.page}


def _compressor(array: RowArray) -> Any:
    return {"zstd": Zstd, "pcodec": PCodec}[array.compressor](**compressor_options(array))


def encode(rows: NDArray[Any], array: RowArray, shard_rows: int) -> bytes:
    """Compress ``rows`` [n <= shard_rows, width] into one shard object; the same rows give the same bytes."""
    return join(encode_rows(rows, array), shard_rows)


def encode_rows(rows: NDArray[Any], array: RowArray) -> list[bytes]:
    """Compress ``rows`` [n, width] into one chunk each."""
    assert rows.shape[1:] == (array.width,)
    compressor = _compressor(array)
    return [
        add_checksum(compressor.encode(np.ascontiguousarray(row)))
        for row in rows.astype(array.dtype, copy=False)
    ]


def join(chunks: Sequence[bytes], shard_rows: int) -> bytes:
    """Return the shard object of these chunks."""
    assert len(chunks) <= shard_rows
    lengths = np.array([len(chunk) for chunk in chunks], np.uint64)
    index = np.full((shard_rows, 2), MISSING, "<u8")
    index[: len(chunks), 0] = np.cumsum(lengths) - lengths
    index[: len(chunks), 1] = lengths
    return b"".join([*chunks, add_checksum(index.tobytes())])


def index_size(shard_rows: int) -> int:
    """Return the bytes of the index at a shard's end."""
    return shard_rows * INDEX_ENTRY + CHECKSUM


def chunk_lengths(data: bytes, shard_rows: int) -> NDArray[np.int64]:
    """Return each chunk's length in bytes [shard_rows] from a shard object; 0 where a chunk is missing.

    Raises ValueError if the index is damaged or the chunks do not fill the object one after another.
    """
    size = index_size(shard_rows)
    return parse_index(data[-size:], shard_rows, len(data) - size)


def parse_index(index: bytes, shard_rows: int, chunk_bytes: int) -> NDArray[np.int64]:
    """Return the chunks' lengths [shard_rows] from the index of an object with ``chunk_bytes`` of chunks."""
    spans = np.frombuffer(remove_checksum(index), "<u8")
    if spans.size != 2 * shard_rows:
        raise ValueError("the index is cut short")
    offsets, lengths = np.where(spans == MISSING, 0, spans).reshape(shard_rows, 2).T
    if lengths.max() > chunk_bytes:  # so the sum below cannot overflow
        raise ValueError("the index names a chunk that is larger than the object")
    ends = np.cumsum(lengths)
    if ends[-1] != chunk_bytes or not np.array_equal(offsets, np.where(lengths > 0, ends - lengths, 0)):
        raise ValueError("the index does not name the object's chunks one after another")
    return lengths.astype(np.int64)


def most_bytes(array: RowArray) -> int:
    """Return the most bytes that a chunk of an array can have, however badly it compresses."""
    return 2 * array.width * np.dtype(array.dtype).itemsize + 4096


def most_object_bytes(array: RowArray, shard_rows: int) -> int:
    """Return the most bytes that a shard object of an array can have."""
    return shard_rows * most_bytes(array) + index_size(shard_rows)


def decode_into(row: NDArray[Any], chunk: bytes, array: RowArray, crc: int | None = None) -> None:
    """Decompress one chunk into ``row`` [width], which is all the memory that it takes.

    Raises ValueError if the bytes are damaged or their checksum is not ``crc``.
    """
    if crc is not None and stored_checksum(chunk) != crc:
        raise ValueError("a row differs from its commit record")
    body = remove_checksum(chunk)
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
    """Return the bytes that a zstd frame claims to expand to; None if it does not say (RFC 8878, 3.1.1)."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("is not a zstd frame")
    descriptor = frame[4]
    is_single = bool(descriptor & 0x20)
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    length = (int(is_single), 2, 4, 8)[descriptor >> 6]
    if not length:
        return None
    return int.from_bytes(frame[start : start + length], "little") + 256 * (length == 2)


def decode(data: bytes, array: RowArray, shard_rows: int) -> NDArray[Any]:
    """Decompress a shard object: [shard_rows, width].

    Raises ValueError if the bytes are damaged or truncated.
    """
    return decode_chunks(data, array, chunk_lengths(data, shard_rows))


def decode_chunks(
    data: bytes, array: RowArray, lengths: NDArray[np.integer], first: int = 0, count: int | None = None
) -> NDArray[Any]:
    """Decompress ``count`` rows from row ``first`` on, of chunks one after another: [count, width].

    Raises ValueError if the bytes are damaged or truncated.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    spans = np.stack([ends - lengths, ends], axis=1)[first:][:count].tolist()
    rows = np.empty((len(spans), array.width), array.dtype)
    for row, (start, end) in zip(rows, spans, strict=True):
        decode_into(row, data[start:end], array)
    return rows


def decode_covered(
    data: bytes, array: RowArray, lengths: NDArray[np.integer], crcs: NDArray[np.integer]
) -> NDArray[Any]:
    """Decompress rows up to the first that differs from its commit record: [n, width]."""
    rows = np.empty((len(lengths), array.width), array.dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    spans = zip((ends - lengths).tolist(), ends.tolist(), crcs.tolist(), strict=True)
    for row, (start, end, crc) in enumerate(spans):
        try:
            decode_into(rows[row], data[start:end], array, crc)
        except ValueError:
            return rows[:row]
    return rows


def stored_checksums(data: bytes, ends: NDArray[np.int64]) -> list[int]:
    """Return the crc32c of each chunk, one after another up to ``ends``, without checking it."""
    view = memoryview(data)  # slices of it are no copies
    return [stored_checksum(view[:end]) for end in ends.tolist()]


def stored_checksum(chunk: bytes | memoryview) -> int:
    """Return the crc32c that a chunk ends with, without checking it."""
    return int.from_bytes(chunk[-CHECKSUM:], "little")


def add_checksum(body: bytes) -> bytes:
    """Append the crc32c, as zarr's codec does."""
    body = bytes(body)
    return body + int(google_crc32c.value(body)).to_bytes(CHECKSUM, "little")


def remove_checksum(data: bytes) -> bytes:
    """Return ``data`` without its crc32c; raise ValueError if that does not match."""
    body = data[:-CHECKSUM]
    if len(data) < CHECKSUM or google_crc32c.value(body) != stored_checksum(data):
        raise ValueError("the checksum does not match")
    return body
