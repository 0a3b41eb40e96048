"""Pack documents into rows of ``seq_length`` tokens. Pure: no clock, no randomness."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.data.documents import ColumnarDocuments, Document
from ddk_build.data.packing import teacher_prefix
from ddk_build.data.packing.chunks import chunk_document
from ddk_cache.format.layout import PREFIX_ROWS
from ddk_cache.format.writer_logprob import encode

Row = list[Document]
"""The chunks of a row, one after another."""
Arrays = dict[str, NDArray[Any]]

MOST_SEGMENTS = 65_535  # chunks in a row: segments are uint16, and 0 is the padding


class Packer:
    """Puts chunks of at most ``seq_length`` tokens into rows, each into the fullest row with room for it.

    ``open_rows`` bounds the search and the memory: to open one more, the fullest row is closed.
    """

    def __init__(self, seq_length: int, open_rows: int = 64) -> None:
        self.seq_length, self.open_rows = seq_length, open_rows
        self.opened = 0
        """Rows opened so far."""
        self._open: list[tuple[int, int, Row]] = []  # (free tokens, row index, row), least free first

    def has_room(self, length: int) -> bool:
        """Return whether an open row has room for a chunk of ``length`` tokens."""
        return bool(self._open) and self._open[-1][0] >= length

    def add(self, chunks: Iterable[Document]) -> list[Row]:
        """Place chunks one after another; return the rows that this closes."""
        closed: list[Row] = []
        for chunk in chunks:
            length = len(chunk.tokens)
            fullest = bisect_left(self._open, (length,))
            if fullest < len(self._open):
                free, index, row = self._open.pop(fullest)
            else:
                free, index, row = self.seq_length, self.opened, []
                self.opened += 1
                if len(self._open) == self.open_rows:
                    closed.append(self._open.pop(0)[2])
            row.append(chunk)
            free -= length
            if free == 0 or len(row) == MOST_SEGMENTS or self._prefixes_are_full(row):
                closed.append(row)
            else:
                insort(self._open, (free, index, row))
        return closed

    def _prefixes_are_full(self, row: Row) -> bool:
        """Return whether another prefix, of at most a row's tokens, might have no room."""
        most = (PREFIX_ROWS - 1) * self.seq_length
        return row[0].teacher_prefix is not None and len(teacher_prefix.encode(row)) > most

    def flush(self) -> Iterator[Row]:
        """Yield the open rows in the order they were opened, and close them."""
        yield from (row for _, _, row in sorted(self._open, key=lambda entry: entry[1]))
        self._open.clear()

    def state(self) -> Arrays:
        """Return the open rows as arrays, for a checkpoint."""
        rows = [row for _, _, row in self._open]
        return vars(ColumnarDocuments.of(list(chain.from_iterable(rows)))) | {
            "chunk_counts": np.array([len(row) for row in rows], np.int64),
            "row_indices": np.array([index for _, index, _ in self._open], np.int64),
            "opened": np.array([self.opened]),
        }

    def restore(self, state: Arrays) -> None:
        """Resume from ``state``."""
        counts, indices, [self.opened] = (
            state.pop(name).tolist() for name in ("chunk_counts", "row_indices", "opened")
        )
        chunks = iter(ColumnarDocuments(**state).to_documents())
        rows = [list(islice(chunks, count)) for count in counts]
        self._open = [
            (self.seq_length - sum(map(len, row)), index, row)
            for index, row in zip(indices, rows, strict=True)
        ]


def to_arrays(
    rows: Sequence[Row], seq_length: int, *, writer_logprob: bool = False, has_prefix: bool = False
) -> Arrays:
    """Return rows as the cache stores them, [n, S] each.

    ``tokens`` int32, 0 in the padding; ``segments`` uint16, 0 in the padding, else a row's chunks from 1;
    ``loss_mask`` bool, whether the token at t+1 is in the same chunk and carries loss; on request
    ``writer_logprob`` uint16, that of the token at t+1 in steps below 0, 0 where it carries no loss; and
    ``teacher_prefix`` uint32 [n, PREFIX_ROWS S], see the module of that name.
    """
    shape = len(rows), seq_length
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.uint16)
    carries_loss, written = np.zeros(shape, np.bool_), np.zeros(shape if writer_logprob else 0, np.float32)
    for index, row in enumerate(rows):
        lengths = [len(chunk.tokens) for chunk in row]
        used = sum(lengths)
        np.concatenate([chunk.tokens for chunk in row], out=tokens[index, :used])
        np.concatenate([chunk.carries_loss for chunk in row], out=carries_loss[index, :used])
        segments[index, :used] = np.repeat(np.arange(1, len(row) + 1, dtype=np.uint16), lengths)
        if writer_logprob:
            logprobs = [chunk.writer_logprob for chunk in row if chunk.writer_logprob is not None]
            np.concatenate(logprobs, out=written[index, :used])
    loss_mask = np.zeros_like(carries_loss)
    # Padding carries no loss, so equal segments are enough.
    loss_mask[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & carries_loss[:, 1:]
    arrays: Arrays = {"tokens": tokens, "segments": segments, "loss_mask": loss_mask}
    if writer_logprob:
        arrays["writer_logprob"] = encode(np.where(loss_mask, np.roll(written, -1, axis=1), 0))
    if has_prefix:
        arrays["teacher_prefix"] = np.zeros((len(rows), PREFIX_ROWS * seq_length), np.uint32)
        for numbers, row in zip(arrays["teacher_prefix"], rows, strict=True):
            encoded = teacher_prefix.encode(row)
            numbers[: len(encoded)] = encoded
    return arrays


def add_documents(
    packer: Packer, documents: Iterable[Document], overlap: int = 0, skipped: Counter[str] | None = None
) -> list[Row]:
    """Chunk and place documents one after another; return the rows that this closes."""
    chunks = (chunk_document(document, packer.seq_length, overlap, skipped) for document in documents)
    return packer.add(chain.from_iterable(chunks))
