"""Which documents of a domain stand in which split, small enough to be kept with the cache.

No document that trains in one domain validates in another, or the other way round. So before a document
is held out all other domains are asked whether they train on it, and before one goes to train whether they
hold it out. The second answer is exact. The first may be yes by mistake: then the document is not held
out, which harms nobody; it is never no by mistake.
"""

import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# 8 MiB a domain whatever its size: of 15 billion tokens in documents of 500 tokens, a third of the bits.
BITS = 1 << 26


class Ledger:
    """A domain's documents by digest: those held out, and a bitmap over those in train."""

    def __init__(self, held_out: Iterable[int] = (), train: bytes | None = None) -> None:
        self.held_out = set(held_out)
        self._train = bytearray(BITS // 8) if train is None else bytearray(train)

    def copy(self) -> "Ledger":
        """What is known now; it does not follow what is added."""
        return Ledger(self.held_out, bytes(self._train))

    def add_train(self, digests: Iterable[int]) -> None:
        for digest in digests:
            bit = digest % BITS
            self._train[bit >> 3] |= 1 << (bit & 7)

    @property
    def train(self) -> NDArray[np.uint8]:
        """The bitmap, [BITS // 8]; it follows what is added."""
        return np.frombuffer(self._train, np.uint8)

    def pack(self) -> bytes:
        """Everything: the number of held-out digests, these in order, the bitmap; deflated."""
        held = np.sort(np.array(list(self.held_out), "<u8"))
        return zlib.compress(len(held).to_bytes(8, "little") + held.tobytes() + bytes(self._train), 1)

    @classmethod
    def unpack(cls, data: bytes) -> "Ledger | None":
        """What was packed; None where it is damaged."""
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(data, BITS // 8 + (1 << 27))  # 16 million held-out documents
        except zlib.error:
            return None
        size = 8 + 8 * int.from_bytes(raw[:8], "little")
        if not inflate.eof or len(raw) != size + BITS // 8:
            return None
        return cls(np.frombuffer(raw[8:size], "<u8").tolist(), raw[size:])


class Others:
    """What the ledgers of all domains say when a domain is read: taken once, as they are then."""

    def __init__(self, ledgers: Iterable[Ledger]) -> None:
        self.held_out: set[int] = set()
        self._train = np.zeros(BITS // 8, np.uint8)
        for ledger in ledgers:
            self.held_out |= ledger.held_out
            self._train |= ledger.train

    def may_train(self, digest: int) -> bool:
        """Whether a domain may have the document in its train rows."""
        bit = digest % BITS
        return bool(self._train[bit >> 3] >> (bit & 7) & 1)
