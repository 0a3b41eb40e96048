"""A document of tokens, and the account of what has been taken from a domain."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Document:
    """One text or conversation, tokenised."""

    tokens: NDArray[np.int32]
    """[L]"""
    counts: NDArray[np.bool_]
    """[L]; this token carries loss where it is a label: all of a text, the assistant's part of a chat."""
    digest: int
    """64 bits of the content and the seed: equal for copies, and what decides the split."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, span: slice) -> "Document":
        return Document(self.tokens[span], self.counts[span], self.digest)


@dataclass
class Intake:
    """What has been taken from a domain, brought up to date as it happens.

    Handed in again with a higher ``max_tokens``, it says where to go on.
    """

    rows: int = 0
    """Rows of the dataset that were read: ``documents`` and what was skipped."""
    documents: int = 0
    tokens: int = 0
    """Tokens counted against ``max_tokens``, held-out copies included."""
    exhausted: bool = False
    """The dataset ended before ``max_tokens`` was reached."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows that are in neither split, by reason."""
    held_out: int | None = None
    """The largest digest in the validation split, once it is chosen."""
    left_over: int = 0
    """Tokens of held-out documents for which the validation rows had no room."""
