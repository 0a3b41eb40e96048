"""An index of a domain's documents by split, small enough to be stored with the cache.

No document that trains in one domain validates in another. So a document is held out only if no other domain
trains on it, and goes to train only if no other domain holds it out. The held-out set is exact. The train
bitmap may have false positives, which keep a document from being held out, and has no false negatives.
"""

import zlib
from collections.abc import Iterable

import numpy as np

# 8 MiB for a domain of any size: 15 billion tokens in documents of 500 tokens set a third of the bits.
BITS = 1 << 26


class DocumentIndex:
    """A domain's documents by digest: a set of those held out, and a bitmap over those in train."""

    def __init__(self, held_out: Iterable[int] = (), train: bytes | None = None) -> None:
        self.held_out = set(held_out)
        self._train = bytearray(BITS // 8) if train is None else bytearray(train)

    def add_train(self, digests: Iterable[int]) -> None:
        """Record documents that go to train."""
        for digest in digests:
            bit = digest % BITS
            self._train[bit >> 3] |= 1 << (bit & 7)

    def may_train(self, digest: int) -> bool:
        """Return whether the document may be in train."""
        bit = digest % BITS
        return bool(self._train[bit >> 3] >> (bit & 7) & 1)

    def to_bytes(self) -> bytes:
        """Return the count of held-out digests, the digests in order, and the bitmap; deflated."""
        held_out = np.sort(np.array(list(self.held_out), "<u8"))
        return zlib.compress(len(held_out).to_bytes(8, "little") + held_out.tobytes() + bytes(self._train), 1)

    @classmethod
    def from_bytes(cls, data: bytes | None) -> "DocumentIndex | None":
        """Return the index of ``to_bytes``; None if it is missing or damaged."""
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(data or b"", BITS // 8 + (1 << 27))  # 16 million held-out documents
        except zlib.error:
            return None
        size = 8 + 8 * int.from_bytes(raw[:8], "little")
        if not inflate.eof or len(raw) != size + BITS // 8:
            return None
        return cls(np.frombuffer(raw[8:size], "<u8").tolist(), raw[size:])
