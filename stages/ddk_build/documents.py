"""A document of tokens, and the account of what has been taken from a domain."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Document:
    """One text or conversation, tokenised; or a piece of one."""

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
        return Document(
            self.tokens[span], self.counts[span], self.digest, self.head, self.questions, self.context
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
