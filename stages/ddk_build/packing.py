"""Documents into rows of seq_length, and the choice of the validation rows. Pure: no clock, no chance."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ddk_build.documents import Document, Intake
from ddk_cache.layout import Split

Row = list[Document]  # what stands in a row, piece after piece

HELD_OUT = "held out for validation"  # a copy of a validation document, or one that came after the choice
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

    def add(self, piece: Document) -> Iterator[Row]:
        """Place one piece; yields the row that this fills, or the one that gives way to a new row."""
        index = bisect_left(self._open, (len(piece),))
        if index < len(self._open):
            free, number, row = self._open.pop(index)
        else:
            free, number, row = self.seq_length, self.begun, []
            self.begun += 1
            if len(self._open) == self.open_rows:
                yield self._open.pop(0)[2]
        row.append(piece)
        free -= len(piece)
        if free == 0 or len(row) == MOST_SEGMENTS:
            yield row
        else:
            insort(self._open, (free, number, row))

    def flush(self) -> Iterator[Row]:
        """Give out the open rows, oldest first."""
        yield from (row for _, _, row in sorted(self._open, key=lambda entry: entry[1]))
        self._open.clear()


def pieces(document: Document, seq_length: int) -> list[Document]:
    """Cut a document into pieces of ``seq_length`` tokens; the last may be shorter."""
    if len(document) <= seq_length:
        return [document]
    return [document[start : start + seq_length] for start in range(0, len(document), seq_length)]


def batch(rows: list[Row], seq_length: int) -> RowBatch:
    """Lay out rows as arrays."""
    tokens = np.zeros((len(rows), seq_length), np.int32)
    segments = np.zeros((len(rows), seq_length), np.uint16)
    counts = np.zeros((len(rows), seq_length), np.bool_)
    for index, row in enumerate(rows):
        lengths = [len(piece) for piece in row]
        used = sum(lengths)
        tokens[index, :used] = np.concatenate([piece.tokens for piece in row])
        counts[index, :used] = np.concatenate([piece.counts for piece in row])
        segments[index, :used] = np.repeat(np.arange(1, len(row) + 1, dtype=np.uint16), lengths)
    loss_mask = np.zeros_like(counts)
    # Padding counts for nothing, so equal segments are enough.
    loss_mask[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & counts[:, 1:]
    return RowBatch(tokens, segments, loss_mask)


def pack(documents: Iterable[Document], packer: Packer) -> Iterator[Row]:
    """All rows that the documents make, cutting what is longer than a row."""
    for document in documents:
        for piece in pieces(document, packer.seq_length):
            yield from packer.add(piece)
    yield from packer.flush()


class _HoldOut:
    """Keeps the documents of the smallest digests for validation and lets the others through.

    Of copies the length alone is kept, so memory is bounded by the validation split whatever the corpus.
    """

    def __init__(self, seq_length: int, rows: int) -> None:
        self.packer = Packer(seq_length)
        self.most_rows = rows
        self.rows: list[Row] = []
        self.chosen: list[Document] = []
        self.lengths: dict[int, list[int]] = {}  # of each document kept and its copies, by digest
        self._heap: list[tuple[int, Document]] = []  # (minus the digest, document): no two digests equal
        self._heap_tokens = 0
        self._seen_tokens = 0
        self._chosen_tokens = 0  # copies included

    def let_through(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that go to train; ``rows`` and ``chosen`` stand once it is exhausted."""
        for document in documents:
            yield from self._offer(document)
        for _, document in sorted(self._heap, key=lambda entry: -entry[0]):
            if not self._choose(document):
                yield from self._release(document)
        self.rows += self.packer.flush()

    def _offer(self, document: Document) -> Iterator[Document]:
        self._seen_tokens += len(document)
        if document.digest in self.lengths:
            self.lengths[document.digest].append(len(document))
            return
        self.lengths[document.digest] = [len(document)]
        self._heap_tokens += len(document)
        heapq.heappush(self._heap, (-document.digest, document))
        # Rows hold seq_length tokens at most, so this many tokens are sure to fill them. Two documents are
        # kept in any case: one of them is less than half of the domain.
        enough = self.most_rows * self.packer.seq_length
        while len(self._heap) > 2 and self._heap_tokens - len(self._heap[0][1]) >= enough:
            _, largest = heapq.heappop(self._heap)
            self._heap_tokens -= len(largest)
            yield from self._release(largest)

    def _choose(self, document: Document) -> bool:
        """Place a document in the validation rows, as far as they take it, if half of the domain is left."""
        tokens = sum(self.lengths[document.digest])
        if self._chosen_tokens + tokens > self._seen_tokens // 2:
            return False
        placed = False
        for piece in pieces(document, self.packer.seq_length):
            if self.packer.begun == self.most_rows and not self.packer.takes(len(piece)):
                break
            self.rows += self.packer.add(piece)
            placed = True
        if placed:
            self.chosen.append(document)
            self._chosen_tokens += tokens
        return placed

    def _release(self, document: Document) -> list[Document]:
        return [document[:length] for length in self.lengths.pop(document.digest)]


def split_rows(
    documents: Iterable[Document], *, seq_length: int, validation_rows: int, batch_rows: int, intake: Intake
) -> Iterator[tuple[Split, RowBatch]]:
    """Pack a domain's documents into rows of its two splits.

    Yields train rows as they fill, ``batch_rows`` at a time (fewer in the last batch alone), and then the
    validation rows likewise. The validation split is made of the documents of smallest digest: the same
    whatever the order of the documents, and no document, nor a copy of one, is in both splits. It has
    ``validation_rows`` rows; where the domain is small, half of its tokens or less and never more rows than
    train.

    Where ``intake.held_out`` is set, the validation split stands already: everything goes to train but
    documents whose digest is not above it. Otherwise it is set here, and at least two of ``documents`` must
    differ.
    """

    def batches(split: Split, rows: Iterable[Row]) -> Iterator[tuple[Split, RowBatch]]:
        remaining = iter(rows)
        while some := list(islice(remaining, batch_rows)):
            yield split, batch(some, seq_length)

    packer = Packer(seq_length)
    if intake.held_out is not None:
        yield from batches("train", pack(_above(intake.held_out, documents, intake), packer))
        return
    hold_out = _HoldOut(seq_length, validation_rows)
    yield from batches("train", pack(hold_out.let_through(documents), packer))
    validation = hold_out.rows[: packer.begun]
    yield from batches("validation", validation)
    intake.held_out = max(document.digest for document in hold_out.chosen)
    if copies := sum(map(len, hold_out.lengths.values())) - len(hold_out.chosen):
        _leave_out(copies, intake)
    used = sum(len(piece) for row in validation for piece in row)
    intake.left_over = sum(map(len, hold_out.chosen)) - used


def _above(digest: int, documents: Iterable[Document], intake: Intake) -> Iterator[Document]:
    for document in documents:
        if document.digest > digest:
            yield document
        else:
            _leave_out(1, intake)


def _leave_out(count: int, intake: Intake) -> None:
    intake.documents -= count
    intake.skipped[HELD_OUT] += count
