"""Cut a document that is longer than a row into chunks that the teacher can answer. Pure."""

from collections import Counter

import numpy as np

from ddk_build.data.documents import Document

TOO_LONG = "longer than a row"
UNANSWERED = "tokens of conversations without their question in the row"


def chunk_document(
    document: Document, seq_length: int, overlap: int = 0, skipped: Counter[str] | None = None
) -> list[Document]:
    """Cut a document into chunks of at most ``seq_length`` tokens; a shorter document is its only chunk.

    A text is cut anywhere. Each later chunk begins with the document's prefix (the BOS token: models trained
    with one depend on it, see docs/data.md) and ``overlap`` tokens of the chunk before. These carry no
    loss, so every token is a label once. A token after nothing but a BOS is no label: nothing predicts it.

    A document with cut points is cut only there; a chunk takes as many whole exchanges as fit. The end of an
    exchange longer than a row is skipped, because its question is not in the row; its tokens with loss are
    added to ``skipped``.
    """
    if len(document.tokens) <= seq_length:
        return [document]
    if document.cut_points is not None:
        return _chunk_conversation(document, seq_length, Counter() if skipped is None else skipped)
    prefix = min(document.prefix_length, seq_length // 2)
    chunks = [_chunk(document, 0, 0, seq_length)]
    start = seq_length
    while start < len(document):
        begin = max(start - overlap, prefix)
        end = start + seq_length - prefix - (start - begin)
        chunks.append(_chunk(document, prefix, begin, end, start))
        start = end
    return chunks


def _chunk(document: Document, prefix: int, begin: int, end: int, start: int | None = None) -> Document:
    """Return the first ``prefix`` tokens and those in [begin, end), of which [begin, start) is context."""
    start = begin if start is None else start
    tokens = np.concatenate([document.tokens[:prefix], document.tokens[begin:end]])
    carries_loss = np.concatenate([document.carries_loss[:prefix], document.carries_loss[begin:end]])
    context = prefix + start - begin
    carries_loss[:context] = False
    if prefix == context > 0:
        carries_loss[prefix : prefix + 1] = False
    written = document.writer_logprob
    if written is not None:
        written = np.concatenate([written[:prefix], written[begin:end]])
    return Document(
        tokens,
        carries_loss,
        document.digest,
        context_length=context,
        writer_logprob=written,
        teacher_prefix=document.teacher_prefix,
    )


def _chunk_conversation(document: Document, seq_length: int, skipped: Counter[str]) -> list[Document]:
    assert document.cut_points is not None
    prefix = min(document.prefix_length, seq_length // 2)
    edges = np.unique([0, *document.cut_points, len(document)])
    edges = edges[(edges == 0) | (edges > prefix) & (edges <= len(document))]
    chunks, index = [], 0
    while index < len(edges) - 1:
        begin = int(edges[index])
        repeated = prefix if begin else 0
        fitting = int(np.searchsorted(edges, begin + seq_length - repeated, side="right")) - 1
        index = max(fitting, index + 1)
        exchange_end = int(edges[index])
        end = min(exchange_end, begin + seq_length - repeated)
        if unanswered := int(document.carries_loss[end:exchange_end].sum()):
            skipped[UNANSWERED] += unanswered
        chunk = _chunk(document, repeated, begin, end)
        if chunk.carries_loss[1:].any():
            chunks.append(chunk)
    return chunks
