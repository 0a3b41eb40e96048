"""Turn a dataset's rows into tokenised documents, and count skipped rows by reason."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_build.config import DROPPABLE, DomainConfig
from ddk_build.data import chat, reasons, rows, sources
from ddk_build.data.documents import Document, IngestStatistics, Skipped, Text, TokenisedPart
from ddk_build.data.encoding import Ids, Offsets, encode
from ddk_build.data.packing.chunks import TOO_LONG
from ddk_cache.errors import ConfigError, counted, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEXTS_PER_CALL = 128  # of the tokenizer: the results of thousands do not fit into the CPU's caches

# What to do about a domain without documents, by the reason to skip its rows.
HINTS = {
    reasons.NOT_TEXT: "text_column is for strings, messages_column for conversations, tokens_column for ids",
    reasons.NO_CONTENT: "the text of a message must be under content, or under value beside ShareGPT's from",
    reasons.NOT_MESSAGES: "messages_column is for lists of {role, content}, or ShareGPT's {from, value}",
    reasons.NOT_TOKENS: "tokens_column is for lists of whole numbers",
    reasons.NO_LOSS: "only messages of the role assistant, or from gpt, carry loss, and tokens that "
    "loss_mask_column names",
    **{
        chat.dropped(field): f"use a chat template that renders them, or set allow_dropped: [{field}]"
        for field in DROPPABLE
    },
    reasons.UNMARKED: "the chat template must mark every turn, or none, to tell a completion from its prompt",
    reasons.PARTS: "content must be a text where the template knows no parts",
    reasons.NOT_UTF8: "save the files as UTF-8",
}


class DocumentMaker:
    """Makes documents of a domain's rows.

    A conversation with more than ``seq_length`` tokens is treated as ``long_conversations`` says.

    Raises ConfigError if the tokenizer has no chat template, or one that does not mark the assistant's
    tokens. The message begins with the domain's key.
    """

    def __init__(
        self,
        name: str,
        domain: DomainConfig,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        seq_length: int = sys.maxsize,
    ) -> None:
        self.name, self.domain, self.tokenizer, self.seq_length = name, domain, tokenizer, seq_length
        self._read = rows.reader(name, domain, tokenizer, seed)

    def documents(self, statistics: IngestStatistics) -> Iterator[Document]:
        """Yield the domain's documents, tokenised in this process; see ``take``."""
        parts = map(self.tokenise, sources.read(self.name, self.domain, skip=statistics.rows))
        yield from chain.from_iterable(take(self.name, self.domain, parts, statistics))

    def tokenise(self, part: sources.Part) -> TokenisedPart:
        """Return the documents of some rows, which depend on these rows alone.

        A text gets the tokenizer's special tokens and ends with its end-of-sequence token, if it has one. A
        conversation is rendered by the chat template. Tokens stay unchanged.

        Raises ConfigError if a conversation does not contain one of its turns; a token is not in the
        vocabulary.
        """
        items: list[Sequence[rows.Item]] = []
        source_rows = part.rows(self.domain)
        for index, row in enumerate(source_rows, start=part.first):
            try:
                items.append(self._read(row))
            except chat.TemplateMismatchError as error:
                raise ConfigError(f"domains.{self.name}: row {index}: {error}") from error
        made = _tokenise(list(chain.from_iterable(items)), self.tokenizer)
        documents = [[self._fitted(next(made)) for _ in row] for row in items]
        if self.domain.teacher_prefix_column is not None:
            self._add_prefixes(source_rows, documents)
        return TokenisedPart(documents)

    def _add_prefixes(
        self, source_rows: Sequence[sources.Row], items: list[list[Document | Skipped]]
    ) -> None:
        """Give documents what the teacher alone reads, or skip them if that is too long."""
        texts = [
            rows.teacher_prefix(self.domain, row)
            if row is not None and any(isinstance(item, Document) for item in row_items)
            else ""
            for row, row_items in zip(source_rows, items, strict=True)
        ]
        encoded = encode(self.tokenizer, texts, special_tokens=False)
        bos = self.tokenizer.bos_token_id
        for (ids, _), row_items in zip(encoded, items, strict=True):
            for index, item in enumerate(row_items):
                if isinstance(item, Skipped):
                    continue
                prefix = np.concatenate([[int(item.tokens[0] == bos)], ids]).astype(np.int32)
                item.teacher_prefix = prefix
                if len(prefix) >= self.seq_length:
                    row_items[index] = Skipped(reasons.LONG_PREFIX)

    def _fitted(self, document: Document | Skipped) -> Document | Skipped:
        """Apply ``long_conversations``."""
        if isinstance(document, Skipped) or document.cut_points is None or len(document) <= self.seq_length:
            return document
        if self.domain.long_conversations == "drop":
            return Skipped(TOO_LONG)
        if self.domain.long_conversations == "truncate":
            return replace(document, cut_points=np.empty(0, np.int64))
        return document


def take(
    name: str, domain: DomainConfig, parts: Iterable[TokenisedPart], statistics: IngestStatistics
) -> Iterator[list[Document]]:
    """Yield the documents of each part until ``max_tokens`` tokens have been taken.

    The last document is cut to make the count exact. ``statistics`` holds the row at which the parts begin,
    and always covers exactly what was yielded.

    Raises ConfigError if the domain has fewer than two different documents. The message begins with the
    domain's key.
    """
    is_first_pass = statistics.rows == 0
    limit = sys.maxsize if domain.max_tokens is None else domain.max_tokens
    digests: set[int] = set()
    statistics.exhausted = False
    for part in parts:
        end = statistics.rows + len(part.rows)
        taken = _take_part(name, part, limit, statistics)
        if len(digests) < 2:
            digests.update(document.digest for document in taken)
        yield taken
        if statistics.rows < end:
            break
    else:
        statistics.exhausted = True
    if is_first_pass and len(digests) < 2:
        raise ConfigError(
            f"domains.{name}: {_too_few_documents(domain.group_column, len(digests), limit, statistics)}"
        )


def _too_few_documents(group_column: str | None, count: int, limit: int, statistics: IngestStatistics) -> str:
    """Return why a domain cannot be split, and what to do."""
    read = [counted(statistics.rows, "row"), *statistics.skip_reasons()]
    copies = statistics.documents > count == 1
    same = "text" if group_column is None else f"text or {group_column}"
    hints = (
        [f"all {statistics.documents:,} documents have the same {same}: look at the column"] if copies else []
    )
    hints += [hint for reason, hint in HINTS.items() if statistics.skipped[reason]]
    if statistics.tokens >= limit:
        hints.append("raise max_tokens")
    elif statistics.rows == 1:
        hints.append("with sample_by: paragraph, or line, a text file makes more")
    problem = f"needs two different documents, one for each split, and has {count} ({'; '.join(read)})"
    return "; ".join([problem, *hints[:1]])


def _take_part(name: str, part: TokenisedPart, limit: int, statistics: IngestStatistics) -> list[Document]:
    """Return the part's documents up to the limit; the rest of the last row is never taken."""
    documents = []
    for row in part.rows:
        if statistics.tokens >= limit:
            break
        statistics.rows += 1
        for item in row:
            if isinstance(item, Skipped):
                if item.reason not in statistics.skipped:
                    example = f"row {statistics.rows - 1}" + (
                        f": {printable(item.detail)}" if item.detail else ""
                    )
                    statistics.examples[item.reason] = example
                    logger.info("domains.%s: skipping rows: %s; the first is %s", name, item.reason, example)
                statistics.skipped[item.reason] += 1
            elif statistics.tokens < limit:
                documents.append(item.shortened(limit - statistics.tokens))
                statistics.tokens += len(documents[-1].tokens)
    statistics.documents += len(documents)
    return documents


def _tokenise(
    items: Sequence[rows.Item], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Document | Skipped]:
    """Yield each item's document, or the reason to skip it."""
    texts = [item for item in items if isinstance(item, Text)]
    encoded = {}
    for kind in {_kind(text) for text in texts}:
        same = [text.text for text in texts if _kind(text) == kind]
        calls = (same[first : first + TEXTS_PER_CALL] for first in range(0, len(same), TEXTS_PER_CALL))
        encode_batch = partial(encode, tokenizer, special_tokens=kind[0], offsets=kind[1])
        encoded[kind] = chain.from_iterable(map(encode_batch, calls))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id  # each lookup takes as long as a short text
    for item in items:
        if not isinstance(item, Text):
            yield item
            continue
        document = _document(item, *next(encoded[_kind(item)]), bos, eos)
        if isinstance(document, Document):
            document.variant = item.variant
        yield document


def _kind(text: Text) -> tuple[bool, bool]:
    """Return whether the tokenizer adds special tokens, and whether offsets are needed."""
    return not text.templated, text.spans is not None


def _document(
    text: Text, ids: Ids, offsets: Offsets | None, bos: int | None, eos: int | None
) -> Document | Skipped:
    """Return a text's document with loss in its spans; ``ids`` [L] and ``offsets`` [L, 2] are its tokens'."""
    length = len(ids)
    if eos is not None and not text.templated and ids[-1:].tolist() != [eos]:
        ids = np.append(ids, np.int32(eos))
    if len(ids) < 2:
        return Skipped(reasons.ONE_TOKEN)
    prefix_length = int(ids[0] == bos)
    if text.spans is None or offsets is None:
        return Document(ids, np.ones(len(ids), np.bool_), text.digest, prefix_length)
    begins, ends = offsets.T
    # A token carries loss if a part of it is in a span, as in transformers: after "ask ", " say" is the
    # answer's. A token without width (a blank with trimmed offsets, a special token) counts by its end.
    carries_loss = np.ones(len(ids), np.bool_)
    carries_loss[:length] = _inside(ends - 1, text.spans) | (_inside(begins, text.spans) & (begins < ends))
    if eos is not None and ids[-1] == eos and not text.templated:
        carries_loss[-1] = True
    if not carries_loss[1:].any():
        return Skipped(reasons.NO_LOSS)
    prefix_length = max(prefix_length, int(np.searchsorted(begins, text.prefix_length)))
    return Document(
        ids, carries_loss, text.digest, prefix_length, np.searchsorted(begins, np.array(text.cut_points, int))
    )


def _inside(characters: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return whether each character is in one of the spans, which are in order and do not overlap; [L]."""
    edges = np.array(spans, np.int64).ravel()
    inside: NDArray[np.bool_] = np.searchsorted(edges, characters, side="right") % 2 == 1
    return inside
