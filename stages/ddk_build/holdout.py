"""The choice of the validation rows. Pure: no clock, no chance, memory bounded by the validation split."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ddk_build.documents import Columns, Document, Intake, from_columns, to_columns
from ddk_build.ledger import Ledger, Others
from ddk_build.packing import Packer, Row, place
from ddk_build.pieces import pieces
from ddk_cache.layout import SplitName

HELD_OUT = "held out for validation"  # a copy of a validation document, of this domain or of another
RESERVE = 4  # times the validation rows that are kept to choose from: other domains train on some
SPREAD = 64  # of the validation rows, a document fills this part at most while there are others


@dataclass
class Splitting:
    """What decides a domain's rows beside its documents."""

    seq_length: int
    validation_rows: int
    """How many there are to be; less where the domain is small."""
    overlap: int = 0
    """Tokens of context in front of a piece of a long document."""
    ledger: Ledger = field(default_factory=Ledger)
    """The domain's own; brought up to date."""
    others: Others = field(default_factory=lambda: Others([]))
    """All ledgers, the domain's own among them, as they are before it is read."""
    chosen: set[int] | None = None
    """Hold out exactly these, as an earlier reading of the same source did; None: choose."""


class _HoldOut:
    """Keeps the documents of the smallest digests for validation and lets the others through.

    Of copies the length alone is kept, so memory is bounded by the validation split whatever the corpus.
    """

    def __init__(self, how: Splitting) -> None:
        self.how = how
        self.packer = Packer(how.seq_length)
        self.share = -(-how.validation_rows // SPREAD) * how.seq_length  # tokens of a document, at first
        self.rows: list[Row] = []
        self.chosen: list[tuple[Document, list[Document]]] = []  # with the pieces beyond its share
        self.lengths: dict[int, list[int]] = {}  # of each document kept and its copies, by digest
        self._heap: list[tuple[int, Document]] = []  # (minus the digest, document): no two digests equal
        self._usable = 0  # tokens of the heap, of each document its share
        self._seen_tokens = 0
        self._chosen_tokens = 0
        self._held_tokens = 0  # of the chosen documents and their copies
        # Rows hold seq_length tokens at most, so a quarter of this is sure to fill them.
        self._enough = RESERVE * how.validation_rows * how.seq_length
        self._held_out = how.ledger.held_out | how.others.held_out

    def add(self, documents: Sequence[Document], intake: Intake) -> list[Document]:
        """Take documents, one after another; those that go to train now."""
        self._seen_tokens += sum(len(document.tokens) for document in documents)
        passing = self._passing(documents)
        train: list[Document] = []
        for document, passes in zip(documents, passing, strict=True):
            if passes:
                train.append(document)
            elif document.digest in self.how.ledger.held_out:
                _leave_out([document], intake)
            else:
                train += self._to_train(self._offer(document), intake)
        return train

    def finish(self, intake: Intake) -> list[Document]:
        """Choose; the rest, which goes to train."""
        train: list[Document] = []
        for _, document in sorted(self._heap, key=lambda entry: -entry[0]):
            if not self._choose(document):
                train += self._to_train(self._release(document), intake)
        for document, rest in self.chosen:
            self._place(rest)
            copies = self.lengths[document.digest][1:]
            _leave_out([document[:length] for length in copies], intake)
        self.rows += self.packer.flush()
        return train

    def pack(self) -> Columns:
        """What is kept of the documents so far."""
        documents = [document for _, document in self._heap]
        copies = [self.lengths[document.digest] for document in documents]
        return to_columns(documents) | {
            "copies": np.array([len(lengths) for lengths in copies], np.int64),
            "copied": np.array([length for lengths in copies for length in lengths], np.int64),
            "seen_tokens": np.array([self._seen_tokens]),
        }

    def unpack(self, columns: Columns) -> None:
        """Go on where ``pack`` was."""
        documents = from_columns(columns)
        copied = iter(columns["copied"].tolist())
        self.lengths = {
            document.digest: list(islice(copied, count))
            for document, count in zip(documents, columns["copies"].tolist(), strict=True)
        }
        self._heap = [(-document.digest, document) for document in documents]
        self._usable = sum(min(len(document), self.share) for document in documents)
        [self._seen_tokens] = columns["seen_tokens"].tolist()

    def _passing(self, documents: Sequence[Document]) -> list[bool]:
        """Which documents go to train without a question, as nearly all do once enough are kept.

        Their digests are beyond all that are kept, and these only become smaller; and nobody holds them out.
        """
        if not self._is_full():
            return [False] * len(documents)
        largest, held_out = -self._heap[0][0], self._held_out
        return [document.digest > largest and document.digest not in held_out for document in documents]

    def _is_full(self) -> bool:
        """Whether enough is kept: two in any case, as one of them is less than half of the domain."""
        return len(self._heap) > 1 and self._usable >= self._enough

    def _offer(self, document: Document) -> list[Document]:
        """Keep a document of small digest; those that cannot be held out any more.

        Whatever other domains train on: so a domain that is read again gives its documents to train in the
        same order, though others have changed.
        """
        if document.digest in self.lengths:
            self.lengths[document.digest].append(len(document))
            return []
        if self._is_full() and -document.digest < self._heap[0][0]:
            return [document]  # it would come off the heap at once
        self.lengths[document.digest] = [len(document)]
        heapq.heappush(self._heap, (-document.digest, document.detached()))
        self._usable += min(len(document), self.share)
        released = []
        while len(self._heap) > 2 and self._usable - min(len(self._heap[0][1]), self.share) >= self._enough:
            _, largest = heapq.heappop(self._heap)
            self._usable -= min(len(largest), self.share)
            released += self._release(largest)
        return released

    def _choose(self, document: Document) -> bool:
        """Place the first pieces of a document in the validation rows, if they take any.

        No other domain trains on it. Half of the domain is left to train; and once an eighth is held out,
        no more documents are than it takes to fill the rows with more pieces of each.
        """
        tokens = sum(self.lengths[document.digest])
        if self.how.chosen is not None:
            if document.digest not in self.how.chosen:
                return False
        else:
            fills = self._chosen_tokens >= self.how.validation_rows * self.how.seq_length
            too_many = self._held_tokens + tokens > self._seen_tokens // (8 if fills else 2)
            if too_many or self.how.others.may_train(document.digest):
                return False
        parts = pieces(document, self.how.seq_length, self.how.overlap)
        first = max(1, self.share // self.how.seq_length)
        if not self._place(parts[:first]):
            return False
        self.chosen.append((document, parts[first:]))
        self._chosen_tokens += len(document)
        self._held_tokens += tokens
        return True

    def _place(self, parts: list[Document]) -> bool:
        """Put pieces into the rows as far as these take them; whether they took any."""
        placed = False
        for piece in parts:
            if self.packer.begun == self.how.validation_rows and not self.packer.takes(len(piece)):
                break
            self.rows += self.packer.add([piece])
            placed = True
        return placed

    def _release(self, document: Document) -> list[Document]:
        return [document[:length] for length in self.lengths.pop(document.digest)]

    def _to_train(self, documents: list[Document], intake: Intake) -> list[Document]:
        """Those that no other domain holds out."""
        held_out = self.how.others.held_out
        _leave_out([document for document in documents if document.digest in held_out], intake)
        return [document for document in documents if document.digest not in held_out]


class Splitter:
    """Packs a domain's documents, one after another, into rows of its two splits.

    The validation split is made of the documents of smallest digest that no other domain trains on: the same
    whatever the order of the documents, and no document, nor a copy of one, is in both splits, or in train
    here and in validation elsewhere. It has ``validation_rows`` rows, of at least 64 documents where there
    are so many (or as many documents as rows, where that is less); where the domain is small, half of its
    tokens or less and never more rows than train.
    """

    def __init__(self, how: Splitting, intake: Intake) -> None:
        self._how, self._intake = how, intake
        self._packer = Packer(how.seq_length)
        self._hold_out = _HoldOut(how)

    def add(self, documents: Sequence[Document]) -> list[Row]:
        """Take documents, one after another; the train rows that they fill."""
        return self._place(self._hold_out.add(documents, self._intake))

    def finish(self) -> Iterator[tuple[SplitName, Row]]:
        """The rows that are left, of train and then of validation."""
        yield from (("train", row) for row in self._place(self._hold_out.finish(self._intake)))
        yield from (("train", row) for row in self._packer.flush())
        validation = self._hold_out.rows[: self._packer.begun]
        yield from (("validation", row) for row in validation)
        chosen = [document for document, _ in self._hold_out.chosen]
        self._how.ledger.held_out |= {document.digest for document in chosen}
        used = sum(len(piece) - piece.context for row in validation for piece in row)
        self._intake.left_over += sum(map(len, chosen)) - used

    def pack(self) -> dict[str, Columns]:
        """Where it stands, the ledger and the intake aside."""
        return {"kept": self._hold_out.pack(), "open": self._packer.pack()}

    def unpack(self, found: dict[str, Columns]) -> None:
        """Go on where ``pack`` was: what comes out is the same as if there had been no break."""
        self._hold_out.unpack(found["kept"])
        self._packer.unpack(found["open"])

    def _place(self, documents: list[Document]) -> list[Row]:
        self._how.ledger.add_train(document.digest for document in documents)
        return place(documents, self._packer, self._how.overlap, self._intake.skipped)


def split_rows(
    documents: Sequence[Document], how: Splitting, intake: Intake
) -> Iterator[tuple[SplitName, Row]]:
    """All rows of a domain's documents as a ``Splitter`` makes them: those of train, then of validation."""
    splitter = Splitter(how, intake)
    yield from (("train", row) for row in splitter.add(documents))
    yield from splitter.finish()


def _leave_out(documents: list[Document], intake: Intake) -> None:
    if documents:
        intake.documents -= len(documents)
        intake.skipped[HELD_OUT] += len(documents)
