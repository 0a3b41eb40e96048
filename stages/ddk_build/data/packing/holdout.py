"""Choose the validation rows. Pure: no clock, no randomness, memory bounded by the validation split.

A document's digest decides its split, so its copies go to the same one, and so do the rows of a group. The
documents with the smallest digests are candidates; one with a digest above the threshold goes to train at
once. When the source ends, the candidates are held out in the order of their digests until they fill the
validation rows, and the others go to train. The candidates depend on the domain alone; only the last step
uses the other domains' indexes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter

import numpy as np

from ddk_build.config import BuildConfig
from ddk_build.data.documents import ColumnarDocuments, Document, IngestStatistics
from ddk_build.data.packing.chunks import chunk_document
from ddk_build.data.packing.document_index import DocumentIndex
from ddk_build.data.packing.packer import Arrays, Packer, Row, add_documents
from ddk_cache.format.layout import SplitName

HELD_OUT = "held out for validation"  # a copy of a validation document, of this domain or of another
BOUND = 1 / 20  # of a domain's rows, unless validation_rows is set
MOST_HELD_OUT = 1 / 2  # of a domain's tokens
MOST_FOR_SPREAD = 1 / 8  # of a domain's tokens, once the held-out documents could fill the rows
SPREAD = 64  # documents in the validation rows, where there are so many
RESERVE = 4  # candidates for each validation row: other domains train on some
TRIM_AT = 1.25  # times the candidates that are needed: one sort then serves many documents


@dataclass(frozen=True)
class SplitSettings:
    """What decides a domain's rows beside its documents."""

    seq_length: int
    validation_rows: int
    """How many to make; a small domain has fewer."""
    bounded: bool = False
    """At most BOUND of the domain's rows, at least one."""
    overlap: int = 0
    """Tokens of context in front of a chunk of a long document."""
    chosen: frozenset[int] | None = None
    """Digests that an earlier pass over the source held out, to repeat it; None: choose."""

    @classmethod
    def of(cls, config: BuildConfig) -> "SplitSettings":
        """Return the settings of a build's domains."""
        is_bounded = config.validation_rows is None
        return cls(config.seq_length, config.most_validation_rows, is_bounded, config.context)

    @property
    def capacity(self) -> int:
        """Tokens of all validation rows."""
        return self.validation_rows * self.seq_length

    @property
    def share(self) -> int:
        """Most tokens of one document in the validation rows, while other documents can fill them."""
        return max(1, -(-self.validation_rows // SPREAD)) * self.seq_length

    def of_domain(self, tokens: int) -> "SplitSettings":
        """Return the settings with the validation rows of a domain of ``tokens`` tokens."""
        rows = max(1, int(BOUND * tokens / self.seq_length)) if self.bounded else self.validation_rows
        return replace(self, validation_rows=min(rows, self.validation_rows))


class Candidates:
    """The documents with the smallest digests: of at least two, and enough to fill the rows RESERVE times.

    The documents of a digest count with at most its share.
    """

    def __init__(self, settings: SplitSettings) -> None:
        self.threshold = (1 << 64) - 1
        """No document with a larger digest can become a candidate."""
        self.by_digest: dict[int, dict[int, Document]] = {}
        """The candidates, by digest and variant."""
        self.copies: Counter[tuple[int, int]] = Counter()
        """How many more there are of each, by digest and variant."""
        self._share, self._needed = settings.share, RESERVE * settings.capacity
        self._tokens = 0
        self._lengths = Counter[int]()  # of each digest's documents together, without copies

    def offer(self, document: Document) -> list[Document]:
        """Add a document; return those that are no longer candidates."""
        variants = self.by_digest.setdefault(document.digest, {})
        if document.variant in variants:
            self.copies[document.digest, document.variant] += 1
            return []
        before = self._counted(document.digest)
        variants[document.variant] = document.detached()
        self._lengths[document.digest] += len(document)
        self._tokens += self._counted(document.digest) - before
        return self.trim() if self._tokens > TRIM_AT * self._needed else []

    def trim(self) -> list[Document]:
        """Keep the candidates that are needed; return the others."""
        digests, self._tokens = sorted(self.by_digest), 0
        for count, digest in enumerate(digests, start=1):
            self._tokens += self._counted(digest)
            if self._tokens >= self._needed and count > 1:
                self.threshold = digest
                return self.release(digests[count:])
        return []

    def _counted(self, digest: int) -> int:
        return min(self._lengths[digest], self._share)

    def release(self, digests: Iterable[int]) -> list[Document]:
        """Remove candidates; return them, each with its copies."""
        removed = list[Document]()
        for digest in digests:
            removed += self.by_digest.pop(digest).values()
            del self._lengths[digest]
        copied = ([d] * (1 + self.copies.pop((d.digest, d.variant), 0)) for d in removed)
        return [*chain.from_iterable(copied)]

    def all(self) -> list[Document]:
        """Return the candidates."""
        return [document for variants in self.by_digest.values() for document in variants.values()]

    def state(self) -> Arrays:
        """Return the candidates as arrays, for a checkpoint."""
        return vars(ColumnarDocuments.of(self.all())) | {
            "threshold": np.array([self.threshold], np.uint64),
            "copies": np.array([self.copies[d.digest, d.variant] for d in self.all()], np.int64),
        }

    def restore(self, state: Arrays) -> None:
        """Resume from ``state``."""
        [self.threshold], copies = (state.pop(name).tolist() for name in ("threshold", "copies"))
        for document, count in zip(ColumnarDocuments(**state).to_documents(), copies, strict=True):
            self.by_digest.setdefault(document.digest, {})[document.variant] = document
            self.copies[document.digest, document.variant] = count
            self._lengths[document.digest] += len(document)
        self._tokens = sum(map(self._counted, self.by_digest))


class Splitter:
    """Packs a domain's documents, one after another, into rows of its two splits.

    The validation split has ``validation_rows`` rows, of SPREAD documents or more if the domain has as many.
    It never has more rows than train, or more than MOST_HELD_OUT of the domain's tokens, and does not depend
    on the documents' order. No document or copy is in both splits, or in train here and in validation in
    another domain. ``index``, the domain's, is updated; ``others`` are the other domains' indexes.
    """

    def __init__(
        self,
        settings: SplitSettings,
        statistics: IngestStatistics,
        index: DocumentIndex,
        others: Iterable[DocumentIndex] = (),
    ) -> None:
        self._settings, self._statistics = settings, statistics
        self._index, self._others = index, list(others)
        self._held_here = frozenset(index.held_out)
        self._held_elsewhere = frozenset[int]().union(*(other.held_out for other in self._others))
        self._candidates = Candidates(settings)
        self._packer = Packer(settings.seq_length)
        self._tokens = 0  # of all documents

    def add(self, documents: Sequence[Document]) -> list[Row]:
        """Take documents; return the train rows that they complete."""
        self._tokens += sum(len(document.tokens) for document in documents)
        train: list[Document] = []
        for document in documents:
            if document.digest in self._held_here:
                self._skip(1)
            elif document.digest > self._candidates.threshold:
                train.append(document)
            else:
                train += self._candidates.offer(document)
        return self._train(train)

    def finish(self) -> Iterator[tuple[SplitName, Row]]:
        """Yield the remaining rows, train before validation."""
        train = self._train(self._candidates.trim())  # first, because the choice uses the index
        validation = self._validation_rows(self._settings.of_domain(self._tokens))
        held_out = {chunk.digest for row in validation for chunk in row}
        others = self._candidates.by_digest.keys() - held_out
        train += self._train(self._candidates.release(sorted(others)))
        yield from (("train", row) for row in chain(train, self._packer.flush()))
        validation = validation[: self._packer.opened]
        yield from (("validation", row) for row in validation)
        self._index.held_out |= held_out
        placed = sum(len(chunk) - chunk.context_length for row in validation for chunk in row)
        self._statistics.left_over += sum(map(len, self._candidates.all())) - placed
        self._skip(self._candidates.copies.total())

    def _validation_rows(self, how: SplitSettings) -> list[Row]:
        """Return the held-out rows: of each digest its share first, then further chunks that have room."""
        turns: list[tuple[int, Document]] = []
        tokens = tokens_with_copies = share_tokens = 0
        for digest, variants in sorted(self._candidates.by_digest.items()):
            if share_tokens >= how.capacity:
                break
            documents, copies = list(variants.values()), self._candidates.copies
            with_copies = sum(len(d) * (1 + copies[digest, d.variant]) for d in documents)
            most = MOST_FOR_SPREAD if tokens >= how.capacity else MOST_HELD_OUT
            if how.chosen is not None:
                is_left_out = digest not in how.chosen
            else:
                is_too_much = tokens_with_copies + with_copies > most * self._tokens
                is_left_out = is_too_much or any(i.may_train(digest) for i in (self._index, *self._others))
            if is_left_out:
                continue
            begin = 0
            for document in documents:
                for chunk in chunk_document(document, how.seq_length, how.overlap):
                    turns.append((begin // how.share, chunk))
                    begin += len(chunk)
            if begin:
                tokens += sum(map(len, documents))
                tokens_with_copies += with_copies
                share_tokens += min(begin, how.share)
        packer, rows = Packer(how.seq_length), list[Row]()
        for _, chunk in sorted(turns, key=itemgetter(0)):
            if packer.opened < how.validation_rows or packer.has_room(len(chunk)):
                rows += packer.add([chunk])
        return [*rows, *packer.flush()]

    def _train(self, documents: list[Document]) -> list[Row]:
        """Place documents in train rows; skip those that another domain holds out."""
        kept = [document for document in documents if document.digest not in self._held_elsewhere]
        self._skip(len(documents) - len(kept))
        self._index.add_train(document.digest for document in kept)
        return add_documents(self._packer, kept, self._settings.overlap, self._statistics.skipped)

    def _skip(self, count: int) -> None:
        if count:
            self._statistics.documents -= count
            self._statistics.skipped[HELD_OUT] += count

    def state(self) -> dict[str, Arrays]:
        """Return the candidates and the open rows as arrays, for a checkpoint."""
        candidates = self._candidates.state() | {"tokens_read": np.array([self._tokens])}
        return {"candidates": candidates, "open rows": self._packer.state()}

    def restore(self, state: dict[str, Arrays]) -> None:
        """Resume from ``state``."""
        [self._tokens] = state["candidates"].pop("tokens_read").tolist()
        self._candidates.restore(state["candidates"])
        self._packer.restore(state["open rows"])
