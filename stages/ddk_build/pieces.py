"""A document that is longer than a row, cut into pieces that the teacher can answer. Pure."""

from collections import Counter

import numpy as np

from ddk_build.documents import Document

TOO_LONG = "longer than a row"
UNANSWERED = "tokens of conversations without their question in the row"


def pieces(
    document: Document, seq_length: int, overlap: int = 0, left_out: Counter[str] | None = None
) -> list[Document]:
    """Cut a document into pieces of at most ``seq_length`` tokens; what fits is one piece as it is.

    A text is cut anywhere. Each later piece begins with the document's head (the BOS token: models trained
    with one depend on it, see docs/context.md) and ``overlap`` tokens of the piece before, which carry no
    loss: every token is a label once. The first token behind a BOS alone is none: nobody can know it.

    A document with ``questions`` is cut in front of a question, as many whole exchanges to a piece as fit.
    What is left of an exchange longer than a row stands without its question: it is left out, its tokens
    with loss are added to ``left_out``.
    """
    if len(document.tokens) <= seq_length:
        return [document]
    if document.questions is not None:
        return _exchanges(document, seq_length, Counter() if left_out is None else left_out)
    head = min(document.head, seq_length // 2)
    found = [_piece(document, 0, 0, seq_length)]
    start = seq_length
    while start < len(document):
        begin = max(start - overlap, head)
        end = start + seq_length - head - (start - begin)
        found.append(_piece(document, head, begin, end, start))
        start = end
    return found


def _piece(document: Document, head: int, begin: int, end: int, start: int | None = None) -> Document:
    """The first ``head`` tokens and those from ``begin`` to ``end``; new are those from ``start``."""
    start = begin if start is None else start
    counts = np.concatenate([document.counts[:head], document.counts[begin:end]])
    context = head + start - begin
    counts[:context] = False
    if head and context == head:
        counts[head : head + 1] = False
    tokens = np.concatenate([document.tokens[:head], document.tokens[begin:end]])
    return Document(tokens, counts, document.digest, context=context)


def _exchanges(document: Document, seq_length: int, left_out: Counter[str]) -> list[Document]:
    assert document.questions is not None
    head = min(document.head, seq_length // 2)
    inner = document.questions[(document.questions > head) & (document.questions < len(document))]
    edges = np.unique(np.concatenate([[0], inner, [len(document)]]))
    found, index = [], 0
    while index < len(edges) - 1:
        begin = int(edges[index])
        before = head if begin else 0
        fits = int(np.searchsorted(edges, begin + seq_length - before, side="right")) - 1
        index = max(fits, index + 1)
        whole = int(edges[index])
        end = min(whole, begin + seq_length - before)
        left_out[UNANSWERED] += int(document.counts[end:whole].sum())
        piece = _piece(document, before, begin, end)
        if piece.counts[1:].any():
            found.append(piece)
    return found
