"""Documents into rows of seq_length. Pure: no clock, no chance."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from ddk_build.documents import Columns, Document, from_columns, to_columns
from ddk_build.pieces import pieces

Row = list[Document]  # what stands in a row, piece after piece

MOST_SEGMENTS = 65_535  # pieces a row: segments are uint16, and 0 is the padding


@dataclass(frozen=True)
class RowBatch:
    """Rows of one split as the cache stores them."""

    tokens: NDArray[np.int32]
    """[n, S]; 0 in the padding."""
    segments: NDArray[np.uint16]
    """[n, S]; 0 = padding, 1.. = the piece's number in its row."""
    loss_mask: NDArray[np.bool_]
    """[n, S]; the token at t+1 is of the same piece, and it counts."""


class Packer:
    """Puts pieces of at most ``seq_length`` tokens into rows, each into the fullest open row that takes it.

    ``open_rows`` bounds the search and the memory: beyond it, the fullest row is given out as it is.
    """

    def __init__(self, seq_length: int, open_rows: int = 64) -> None:
        self.seq_length = seq_length
        self.open_rows = open_rows
        self.begun = 0
        self._open: list[tuple[int, int, Row]] = []  # (free tokens, number, row), least free first

    def takes(self, length: int) -> bool:
        """Whether an open row has room for a piece of ``length`` tokens."""
        return bool(self._open) and self._open[-1][0] >= length

    def add(self, pieces: Iterable[Document]) -> list[Row]:
        """Place pieces, one after another; the rows that they fill, and those that give way to new rows."""
        out: list[Row] = []
        rows = self._open
        for piece in pieces:
            length = len(piece.tokens)
            index = bisect_left(rows, (length,))
            if index < len(rows):
                free, number, row = rows.pop(index)
            else:
                free, number, row = self.seq_length, self.begun, []
                self.begun += 1
                if len(rows) == self.open_rows:
                    out.append(rows.pop(0)[2])
            row.append(piece)
            free -= length
            if free == 0 or len(row) == MOST_SEGMENTS:
                out.append(row)
            else:
                insort(rows, (free, number, row))
        return out

    def flush(self) -> Iterator[Row]:
        """Give out the open rows, oldest first."""
        yield from (row for _, _, row in sorted(self._open, key=lambda entry: entry[1]))
        self._open.clear()

    def pack(self) -> Columns:
        """The open rows, and how many were begun."""
        rows = [row for _, _, row in self._open]
        return to_columns([piece for row in rows for piece in row]) | {
            "pieces": np.array([len(row) for row in rows], np.int64),
            "numbers": np.array([number for _, number, _ in self._open], np.int64),
            "begun": np.array([self.begun]),
        }

    def unpack(self, columns: Columns) -> None:
        """Go on where ``pack`` was."""
        placed = iter(from_columns(columns))
        rows = [list(islice(placed, count)) for count in columns["pieces"].tolist()]
        self._open = [
            (self.seq_length - sum(map(len, row)), number, row)
            for number, row in zip(columns["numbers"].tolist(), rows, strict=True)
        ]
        [self.begun] = columns["begun"].tolist()


def batch(rows: list[Row], seq_length: int) -> RowBatch:
    """Lay out rows as arrays."""
    tokens = np.zeros((len(rows), seq_length), np.int32)
    segments = np.zeros((len(rows), seq_length), np.uint16)
    counts = np.zeros((len(rows), seq_length), np.bool_)
    for index, row in enumerate(rows):
        lengths = [len(piece.tokens) for piece in row]
        used = sum(lengths)
        np.concatenate([piece.tokens for piece in row], out=tokens[index, :used])
        np.concatenate([piece.counts for piece in row], out=counts[index, :used])
        segments[index, :used] = np.repeat(np.arange(1, len(row) + 1, dtype=np.uint16), lengths)
    loss_mask = np.zeros_like(counts)
    # Padding counts for nothing, so equal segments are enough.
    loss_mask[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & counts[:, 1:]
    return RowBatch(tokens, segments, loss_mask)


def place(
    documents: Iterable[Document], packer: Packer, overlap: int = 0, left_out: Counter[str] | None = None
) -> list[Row]:
    """The rows that documents fill, one after another; what is longer than a row is cut, see ``pieces``."""
    cut = (pieces(document, packer.seq_length, overlap, left_out) for document in documents)
    return packer.add(chain.from_iterable(cut))


def pack(documents: Iterable[Document], packer: Packer) -> list[Row]:
    """All rows that the documents make."""
    return [*place(documents, packer), *packer.flush()]
