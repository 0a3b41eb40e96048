"""A document of tokens, and the account of what has been taken from a domain."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]  # documents one after another, by field


@dataclass(slots=True)  # frozen, each would take four times as long to make
class Document:
    """One text or conversation, tokenised; or a piece of one. Nothing in it changes."""

    tokens: NDArray[np.int32]
    """[L]"""
    counts: NDArray[np.bool_]
    """[L]; this token carries loss where it is a label: all of a text, the assistant's part of a chat."""
    digest: int
    """64 bits of the content and the seed: equal for copies, and what decides the split."""
    head: int = 0
    """Tokens in front that stand before every later piece too: the BOS token, a chat's system message."""
    questions: NDArray[np.int64] | None = None
    """Where alone a later piece may begin: at a question, so that no answer stands without its own; in
    order. None: anywhere."""
    context: int = 0
    """Of a piece, the tokens in front that an earlier piece has too. They carry no loss."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, span: slice) -> "Document":
        """The first tokens, which is all that a limit leaves of a document."""
        assert not span.start
        if span.stop >= len(self):
            return self
        return Document(
            self.tokens[span], self.counts[span], self.digest, self.head, self.questions, self.context
        )

    def detached(self) -> "Document":
        """The same in memory of its own: a view of a part's columns keeps all of the part."""
        questions = None if self.questions is None else self.questions.copy()
        return Document(
            self.tokens.copy(), self.counts.copy(), self.digest, self.head, questions, self.context
        )


@dataclass
class Intake:
    """What has been taken from a domain, brought up to date as it happens.

    Handed in again with a higher ``max_tokens``, it says where to go on.
    """

    rows: int = 0
    """Rows of the dataset that were read."""
    documents: int = 0
    """Documents taken, both splits."""
    tokens: int = 0
    """Tokens counted against ``max_tokens``, held-out copies included; context that is repeated is not."""
    exhausted: bool = False
    """The dataset ended before ``max_tokens`` was reached."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What is in neither split, by reason."""
    left_over: int = 0
    """Tokens of held-out documents for which the validation rows had no room."""


@dataclass(slots=True)
class Found:
    """What became of some rows of a dataset."""

    rows: list[list[str | None]]
    """Of each row what became of its documents: None where one was made, or the reason for none."""
    columns: Columns
    """The documents that were made, in order; see ``from_columns``."""


def to_columns(documents: Sequence[Document]) -> Columns:
    """Documents as a few arrays: what passes from one process to another, and what is kept on disk."""
    questions = [document.questions for document in documents]
    return {
        "lengths": np.array([len(document) for document in documents], np.int64),
        "tokens": np.concatenate([np.empty(0, np.int32), *(document.tokens for document in documents)]),
        "counts": np.concatenate([np.empty(0, np.bool_), *(document.counts for document in documents)]),
        "digests": np.array([document.digest for document in documents], np.uint64),
        "heads": np.array([document.head for document in documents], np.int64),
        "contexts": np.array([document.context for document in documents], np.int64),
        "asked": np.array([-1 if found is None else len(found) for found in questions], np.int64),
        "questions": np.concatenate(
            [np.empty(0, np.int64), *(found for found in questions if found is not None)]
        ),
    }


def whole_texts(ids: Sequence[Sequence[int]], digests: Sequence[int], begin: int | None) -> Columns:
    """Documents of token ids that all carry loss, at least one each; ``begin`` is the BOS token."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
    zeros = np.zeros(len(ids), np.int64)
    return {
        "lengths": lengths,
        "tokens": tokens,
        "counts": np.ones(len(tokens), np.bool_),
        "digests": np.array(digests, np.uint64),
        "heads": (tokens[np.cumsum(lengths) - lengths] == begin).astype(np.int64),
        "contexts": zeros,
        "asked": zeros - 1,
        "questions": zeros[:0],
    }


def from_columns(columns: Mapping[str, NDArray[Any]]) -> list[Document]:
    """The inverse of ``to_columns``."""
    ends, asked = np.cumsum(columns["lengths"]).tolist(), columns["asked"].tolist()
    behind = np.cumsum(columns["asked"].clip(0)).tolist()
    facts = zip(
        columns["lengths"].tolist(),
        ends,
        columns["digests"].tolist(),
        columns["heads"].tolist(),
        columns["contexts"].tolist(),
        asked,
        behind,
        strict=True,
    )
    return [
        Document(
            columns["tokens"][end - length : end],
            columns["counts"][end - length : end],
            digest,
            head,
            None if number < 0 else columns["questions"][last - number : last],
            context,
        )
        for length, end, digest, head, context, number, last in facts
    ]
