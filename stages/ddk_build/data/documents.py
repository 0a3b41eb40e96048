"""Tokenised documents, each alone or as columns, and the statistics of a domain's ingestion."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)  # frozen, each would take four times as long to make
class Document:
    """A tokenised text or conversation, or a chunk of it. Treated as immutable."""

    tokens: NDArray[np.int32]
    """[L]"""
    carries_loss: NDArray[np.bool_]
    """[L]; whether the token counts as a label: all of a text, the assistant's turns of a chat."""
    digest: int
    """64 bits of the content or of the row's group, and the seed: decides the split, equal for copies."""
    prefix_length: int = 0
    """Leading tokens that every later chunk repeats: the BOS token, a chat's system message."""
    cut_points: NDArray[np.int64] | None = None
    """Token positions where a later chunk may begin, ascending; None: anywhere. A conversation is cut only
    before a question, so that its answer stays with it."""
    context_length: int = 0
    """Leading tokens of a chunk that repeat an earlier chunk. They carry no loss."""
    writer_logprob: NDArray[np.float32] | None = None
    """[L]; of each token that carries loss, in nats, by the model that wrote it."""
    variant: int = 0
    """In a group of rows, the digest of the content: documents of one digest and variant are copies."""
    teacher_prefix: NDArray[np.int32] | None = None
    """[1 + P]; what the teacher alone reads: see ``packing.teacher_prefix``."""

    def __len__(self) -> int:
        return len(self.tokens)

    def shortened(self, length: int) -> "Document":
        """Return the first ``length`` tokens."""
        if length >= len(self.tokens):
            return self
        written = None if self.writer_logprob is None else self.writer_logprob[:length]
        tokens, carries_loss = self.tokens[:length], self.carries_loss[:length]
        return replace(self, tokens=tokens, carries_loss=carries_loss, writer_logprob=written)

    def detached(self) -> "Document":
        """Return a copy with its own memory; a view of columns keeps all of the columns alive."""
        return ColumnarDocuments.of([self]).to_documents()[0]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a row, or a document of it, was skipped."""

    reason: str
    detail: str = ""
    """What is wrong with this row, where rows with the same reason differ."""


@dataclass(slots=True)
class Text:
    """A text for the tokenizer. All offsets are in characters."""

    text: str
    digest: int
    """As the document's."""
    spans: Sequence[tuple[int, int]] | None = None
    """The parts that carry loss, each by its first character and the first after it; None: all of it."""
    cut_points: Sequence[int] = ()
    """Where a chunk of a long conversation may begin: the user speaks after the assistant."""
    prefix_length: int = 0
    """End of the system message, which is repeated in front of every chunk."""
    templated: bool = False
    """The chat template has added the special tokens already."""
    variant: int = 0
    """As the document's."""


@dataclass(frozen=True)
class ColumnarDocuments:
    """D documents as a few arrays, for other processes and for ingest checkpoints."""

    digests: NDArray[np.uint64]
    """[2, D]; digests, variants."""
    sizes: NDArray[np.int64]
    """[5, D]; tokens, of them prefix and context; cut points and tokens of the teacher's prefix, -1: None."""
    tokens: NDArray[np.int32]
    """[T]; all documents, concatenated, as in what follows."""
    carries_loss: NDArray[np.bool_]
    """[T]"""
    cut_points: NDArray[np.int64]
    """[C]"""
    writer_logprobs: NDArray[np.float32]
    """[T], or [0] where the documents have none; all of a domain's have them, or none has."""
    teacher_prefixes: NDArray[np.int32]
    """[P]"""

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "ColumnarDocuments":
        """Return the columns of ``documents``."""
        cuts = [document.cut_points for document in documents]
        prefixes = [document.teacher_prefix for document in documents]
        counts = ([-1 if some is None else len(some) for some in optional] for optional in (cuts, prefixes))
        sizes = [
            [len(document) for document in documents],
            [document.prefix_length for document in documents],
            [document.context_length for document in documents],
            *counts,
        ]
        return cls(
            np.array([[d.digest for d in documents], [d.variant for d in documents]], np.uint64),
            np.array(sizes, np.int64),
            _concatenated(np.int32, [d.tokens for d in documents]),
            _concatenated(np.bool_, [d.carries_loss for d in documents]),
            _concatenated(np.int64, cuts),
            _concatenated(np.float32, [d.writer_logprob for d in documents]),
            _concatenated(np.int32, prefixes),
        )

    def to_documents(self) -> list[Document]:
        """Return the documents, as views of the columns."""
        documents, end, last_cut, last_prefix = [], 0, 0, 0
        columns = *self.digests.tolist(), *self.sizes.tolist()
        for digest, variant, length, prefix, context, cuts, of_teacher in zip(*columns, strict=True):
            span, end = slice(end, end + length), end + length
            cut_points = None if cuts < 0 else self.cut_points[last_cut : last_cut + cuts]
            teacher = None if of_teacher < 0 else self.teacher_prefixes[last_prefix:][:of_teacher]
            last_cut, last_prefix = last_cut + max(cuts, 0), last_prefix + max(of_teacher, 0)
            written = self.writer_logprobs[span] if len(self.writer_logprobs) else None
            text = self.tokens[span], self.carries_loss[span]
            documents.append(Document(*text, digest, prefix, cut_points, context, written, variant, teacher))
        return documents


def _concatenated(dtype: type, arrays: Iterable[NDArray[Any] | None]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *(array for array in arrays if array is not None)])


@dataclass(frozen=True)
class TokenisedPart:
    """Some rows of a dataset: each row's documents, or the reasons to skip them."""

    rows: list[list[Document | Skipped]]

    @property
    def documents(self) -> list[Document]:
        """The documents of all rows."""
        return [item for item in chain.from_iterable(self.rows) if isinstance(item, Document)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the documents as columns, which is ten times faster."""
        reasons = [[item if isinstance(item, Skipped) else None for item in row] for row in self.rows]
        return _unpickle_part, (reasons, ColumnarDocuments.of(self.documents))


def _unpickle_part(reasons: list[list[Skipped | None]], columns: ColumnarDocuments) -> TokenisedPart:
    documents = iter(columns.to_documents())
    return TokenisedPart([[next(documents) if item is None else item for item in row] for row in reasons])


@dataclass
class IngestStatistics:
    """What has been ingested from a domain: updated in place, and where the next source pass resumes."""

    rows: int = 0
    """Rows of the dataset that were read."""
    documents: int = 0
    """Documents taken, both splits."""
    tokens: int = 0
    """Tokens counted against ``max_tokens``: with held-out copies, without repeated context."""
    exhausted: bool = False
    """The dataset ended before ``max_tokens`` was reached."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Counts of what is in neither split, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first row that was skipped for a reason: its index, and what is wrong with it."""
    left_over: int = 0
    """Tokens of held-out documents that did not fit into the validation rows."""

    def skip_reasons(self) -> list[str]:
        """Return a phrase for each reason to skip: its count, and its first row."""
        examples = self.examples
        return [
            f"{count:,} {reason}" + (f", first {examples[reason]}" if reason in examples else "")
            for reason, count in self.skipped.items()
        ]


def digest_of(content: bytes, seed: int) -> int:
    """Return a document's digest."""
    digest = hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")
