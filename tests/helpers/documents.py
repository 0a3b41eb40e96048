"""Documents made of numbers, and the chunks of the rows that they fill."""

from collections.abc import Iterable, Sequence

import numpy as np

from ddk_build.data.documents import Document
from ddk_build.data.packing import RowBatch

Chunk = tuple[int, ...]


def make_documents(lengths: Sequence[int], seed: int = 0) -> list[Document]:
    """Documents of the given lengths, every token of all of them another number, from 1 on."""
    random = np.random.default_rng(seed)
    digests = random.permutation(max(len(lengths), 1)) * 1000
    starts = np.cumsum([1, *lengths])
    return [
        Document(np.arange(start, start + length, dtype=np.int32), random.random(length) < 0.7, int(digest))
        for start, length, digest in zip(starts, lengths, digests, strict=False)
    ]


def segments(batches: Iterable[RowBatch]) -> list[Chunk]:
    """Return the tokens of every segment, row by row."""
    return [
        tuple(tokens[numbers == number].tolist())
        for rows in batches
        for tokens, numbers in zip(rows.tokens, rows.segments, strict=True)
        for number in range(1, int(numbers.max()) + 1)
    ]


def count_rows(batches: Iterable[RowBatch]) -> int:
    return sum(len(rows.tokens) for rows in batches)


def all_chunks(documents: Iterable[Document], seq_length: int) -> list[Chunk]:
    return [
        tuple(document.tokens[start : start + seq_length].tolist())
        for document in documents
        for start in range(0, len(document), seq_length)
    ]
