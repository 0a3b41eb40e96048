"""The markers of format version 1, which ``verify`` still reads: crc32c and size of each object."""

from collections.abc import Sequence

import numpy as np

from ddk_cache import layout, shards
from ddk_cache.storage import Storage


def old_problem(
    storage: Storage,
    manifest: layout.Manifest,
    domain: str,
    split: layout.SplitName,
    shard: int,
    objects: Sequence[bytes],
) -> str | None:
    """What a shard's marker says against its objects, uint32 [arrays, 2], in one line."""
    raw = storage.read(f"{layout.marker_prefix(domain, split)}{shard}/0/0")
    try:
        marker = np.frombuffer(shards.unseal(raw or b""), "<u4").reshape(len(objects), 2)
    except ValueError:
        return "its marker is missing or damaged"
    if marker.tolist() != [[shards.checksum(data), len(data)] for data in objects]:
        return "is damaged"
    return None
