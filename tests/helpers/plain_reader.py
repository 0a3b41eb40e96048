"""docs/format.md as a reader: numpy, pcodec and zstandard, without zarr, numcodecs or ddk_cache.

It checks nothing: it shows that the page is enough to read a cache by.
"""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray
from pcodec import standalone

MISSING = 2**64 - 1
Array = NDArray[Any]


class Position(NamedTuple):
    """What the teacher says of the token after a position, best entry first."""

    ids: list[int]
    logprobs: list[float]
    tail_logprob: float


def attribute(folder: Path) -> dict[str, Any]:
    """Return the cache's attribute of a group: the manifest, a domain's state or a list of tables."""
    content: dict[str, Any] = json.loads((folder / "zarr.json").read_text("utf-8"))["attributes"]["ddk_cache"]
    return content


def read_chunk(array: Path, row: int) -> Array:
    """Return a row of an array over rows, [width]."""
    document = json.loads((array / "zarr.json").read_text("utf-8"))
    dtype, per_shard = document["data_type"], document["chunk_grid"]["configuration"]["chunk_shape"][0]
    sharding = document["codecs"][0]["configuration"]
    shard, inner = divmod(row, per_shard)
    data = (array / "c" / str(shard) / "0").read_bytes()
    # The index ends the object: offset and length of each chunk, then four bytes of crc32c.
    offset, length = struct.unpack_from("<QQ", data, len(data) - 4 - 16 * (per_shard - inner))
    if offset == MISSING:
        return np.zeros(sharding["chunk_shape"][1], dtype)
    body = data[offset : offset + length - 4]  # crc32c again
    if sharding["codecs"][0]["name"] == "numcodecs.pcodec":
        return np.asarray(standalone.simple_decompress(body))
    return np.frombuffer(zstandard.decompress(body), dtype)


def read_table(group: Path, name: str) -> Array:
    """Return a table of a codebook or of the vocabulary, in its shape."""
    shape = attribute(group)[name]["shape"]
    rows = shape[0] if len(shape) == 2 else 1
    return np.stack([read_chunk(group / name, row) for row in range(rows)]).reshape(shape)


class Reader:
    """A cache's targets, row by row."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, attribute(folder)

    def array(self, domain: str, split: str, name: str, row: int) -> Array:
        """``tokens``, ``segments``, ``loss_mask``, ``writer_logprob`` or ``label_logprob`` of a row, [S]."""
        return read_chunk(self.folder / domain / split / name, row)

    def targets(self, domain: str, split: str, row: int) -> list[Position]:
        """Return the entries of each position of a row, by the page's steps."""
        target, length = self.manifest["target"], self.manifest["seq_length"]
        is_sampled = target["kind"] == "sampled"
        teacher = next(d["teacher_index"] for d in self.manifest["domains"] if d["name"] == domain)
        codebook = self.folder / (f"ddk.codebook-{teacher}" if teacher else "ddk.codebook")
        step = float(read_table(codebook, "step")[0])
        common, rankings = read_table(codebook, "common"), read_table(codebook, "rankings")
        entries = self.array(domain, split, "entries", row).astype(int)
        ranking = self.array(domain, split, "rankings", row)
        tail = None if is_sampled else self.array(domain, split, "tail", row).astype(int)

        # 1. Lay out: rank after rank, each over the positions that have an entry of it.
        gaps, codes = (iter(self.array(domain, split, name, row).tolist()) for name in ("gaps", "codes"))
        gap, code = np.zeros((2, length, target["samples" if is_sampled else "top_k"]), np.int64)
        for rank in range(entries.max()):
            for position in np.flatnonzero(entries > rank):
                gap[position, rank] = next(gaps) if rank else 0
                code[position, rank] = next(codes)

        positions = []
        for position, n in enumerate(entries.tolist()):
            if n == 0:
                positions.append(Position([], [], -np.inf))
                continue
            level = gap[position, :n].cumsum()  # 2.
            for rank in range(1, n):  # 3.
                if gap[position, rank] == 0:
                    code[position, rank] += code[position, rank - 1]
            likeliest = rankings[ranking[position]]  # 4.
            most = len(likeliest)
            ids = [int(likeliest[x] if x < most else common[x - most]) for x in code[position, :n]]
            if tail is None:  # 5b.
                best = (target["samples"] + level.sum()) / n
                logprobs, rest = np.log((best - level) / target["samples"]), -np.inf
            else:  # 5a.
                logs = -step * level
                rest = -step * (level[-1] + tail[position] - 32768) if tail[position] else -np.inf
                total = np.log(np.exp(logs).sum() + np.exp(rest))
                logprobs, rest = logs - total, rest - total
            positions.append(Position(ids, logprobs.tolist(), float(rest)))
        return positions
