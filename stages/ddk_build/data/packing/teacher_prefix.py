"""What the teacher alone reads in front of the documents of a row, as a row of numbers. Pure.

A document's prefix is an array: 1 if it stands behind the document's first token, a BOS, else 0; then its
tokens. A row has its documents' prefixes one after another, each behind its length; 0 stands for a prefix
that is the same as the document's before.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ddk_build.data.documents import Document

Int32 = NDArray[np.int32]


def encode(row: Sequence[Document]) -> Int32:
    """Return the numbers of a row's documents, which have prefixes."""
    parts: list[Int32] = [np.empty(0, np.int32)]
    before: Int32 | None = None
    for document in row:
        prefix = document.teacher_prefix
        assert prefix is not None
        is_same = before is not None and np.array_equal(prefix, before)
        parts += [np.zeros(1, np.int32)] if is_same else [np.array([len(prefix)], np.int32), prefix]
        before = prefix
    return np.concatenate(parts)


def decode(numbers: NDArray[np.integer], count: int) -> Iterator[Int32]:
    """Yield the prefixes of the first ``count`` documents of a row."""
    at, prefix = 0, np.empty(0, np.int32)
    for _ in range(count):
        length = int(numbers[at])
        if length:
            prefix = numbers[at + 1 : at + 1 + length].astype(np.int32)
        at += 1 + length
        yield prefix


def in_front(prefix: Int32, document: Int32) -> Int32:
    """Return what the teacher reads: the document with its prefix."""
    behind = int(prefix[0])
    return np.concatenate([document[:behind], prefix[1:], document[behind:]])
