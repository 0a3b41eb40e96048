"""Datasets into documents of tokens. Every row gives documents or is counted with the reason why not."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_build import chat, rows, sources
from ddk_build.config import DomainConfig
from ddk_build.documents import Columns, Document, Found, Intake, from_columns, to_columns, whole_texts
from ddk_build.encoding import Ids, Offsets, encode, encode_with_offsets
from ddk_build.pieces import TOO_LONG
from ddk_cache.errors import ConfigError, counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALL = 128  # texts that the tokenizer is given at once: of thousands it fills more memory than caches hold

# What to do about a domain of which nothing is left, by why its rows gave nothing.
HINTS = {
    rows.NOT_TEXT: "text_column is for strings, messages_column for conversations, tokens_column for tokens",
    rows.NO_CONTENT: "what a message says must stand under content, or value beside ShareGPT's from",
    rows.NOT_MESSAGES: "messages_column is for lists of {role, content}, or ShareGPT's {from, value}",
    rows.NOT_TOKENS: "tokens_column is for lists of whole numbers",
    rows.NO_LOSS: "only messages of the role assistant, or from gpt, carry loss, and tokens that "
    "loss_mask_column names",
    rows.PARTS: "content must be a text where the template knows no parts",
    rows.NOT_UTF8: "save the files as UTF-8",
}


def documents(
    name: str,
    domain: DomainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    intake: Intake,
    seq_length: int = sys.maxsize,
) -> Iterator[Document]:
    """Yield the domain's documents, tokenised in this process; see ``taken``."""
    make = Maker(name, domain, tokenizer, seed, seq_length)
    found = map(make.documents, sources.read(name, domain, skip=intake.rows))
    yield from chain.from_iterable(taken(name, domain, found, intake))


class Maker:
    """Makes documents of a domain's rows.

    Of conversations with more than ``seq_length`` tokens what ``long_conversations`` says is taken.

    Raises
    ------
    ConfigError
        In one line that names the domain: the tokenizer has no chat template, or one in which the
        assistant's tokens cannot be told.
    """

    def __init__(
        self,
        name: str,
        domain: DomainConfig,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        seq_length: int,
    ) -> None:
        self.name, self.domain, self.tokenizer, self.seq_length = name, domain, tokenizer, seq_length
        self._read = rows.reader(name, domain, tokenizer, seed)

    def documents(self, part: sources.Part) -> Found:
        """The documents of some rows, each row by itself; it does not matter what was made before.

        A text gets the tokenizer's special tokens and ends with its end-of-sequence token, where it has one;
        a conversation is what the chat template makes of it; tokens are taken as they are.

        Raises
        ------
        ConfigError
            A turn cannot be found in its conversation; a token is not in the vocabulary.
        """
        items: list[list[rows.Item]] = []
        for number, row in enumerate(part.rows(self.domain), start=part.first):
            try:
                items.append(self._read(row))
            except chat.TemplateMismatchError as error:
                raise ConfigError(f"domains.{self.name}: row {number}: {error}") from error
        flat = list(chain.from_iterable(items))
        if all(isinstance(item, str) or _is_plain(item) for item in flat):
            reasons, columns = _plain(flat, self.tokenizer)
        else:
            made = [self._fitting(document) for document in _spanned(flat, self.tokenizer)]
            reasons = [document if isinstance(document, str) else None for document in made]
            columns = to_columns([document for document in made if not isinstance(document, str)])
        left = iter(reasons)
        return Found([list(islice(left, len(row))) for row in items], columns)

    def _fitting(self, document: Document | str) -> Document | str:
        if isinstance(document, str) or document.questions is None:
            return document
        return _long(document, self.domain, self.seq_length)


def taken(
    name: str, domain: DomainConfig, found: Iterable[Found], intake: Intake
) -> Iterator[list[Document]]:
    """Yield the documents of each part until ``max_tokens`` tokens have been taken.

    The last document is shortened so that the number is exact. ``intake`` says where the parts begin; it is
    up to date with what was yielded.

    Raises
    ------
    ConfigError
        In one line that names the domain: it has fewer than two different documents.
    """
    begins = intake.rows == 0
    limit = sys.maxsize if domain.max_tokens is None else domain.max_tokens
    different: set[int] = set()
    intake.exhausted = False
    for part in found:
        end = intake.rows + len(part.rows)
        documents = _within(part, limit, intake)
        if len(different) < 2:
            different.update(document.digest for document in documents)
        yield documents
        if intake.rows < end:
            break
    else:
        intake.exhausted = True
    if begins and len(different) < 2:
        seen = [
            counted(intake.rows, "row"),
            *(f"{count} {reason}" for reason, count in intake.skipped.items()),
        ]
        hints = [f"; {hint}" for reason, hint in HINTS.items() if intake.skipped[reason]]
        if intake.tokens >= limit:
            hints.append("; raise max_tokens")
        elif intake.rows == 1:
            hints.append("; with sample_by: paragraph, or line, a text file makes more")
        raise ConfigError(
            f"domains.{name}: needs two different documents, one for each split, and has {len(different)} "
            f"({', '.join(seen)}){''.join(hints[:1])}"
        )


def _within(part: Found, limit: int, intake: Intake) -> list[Document]:
    """The part's documents as far as the limit goes; what a row has beyond it is never taken."""
    found, tokens = from_columns(part.columns), int(part.columns["lengths"].sum())
    if intake.tokens + tokens < limit:
        reasons, documents = list(chain.from_iterable(part.rows)), found
        intake.rows += len(part.rows)
    else:
        reasons, documents = [], []
        made = iter(found)
        room = limit - intake.tokens
        for row in part.rows:
            if room < 1:
                break
            intake.rows += 1
            for reason in row:
                if reason is not None:
                    reasons.append(reason)
                elif room:
                    documents.append(next(made)[:room])
                    room -= len(documents[-1])
        tokens = limit - intake.tokens - room
    intake.skipped.update(reason for reason in reasons if reason is not None)
    intake.documents += len(documents)
    intake.tokens += tokens
    return documents


def _long(document: Document, domain: DomainConfig, seq_length: int) -> Document | str:
    """A conversation, as ``long_conversations`` wants it."""
    if len(document) <= seq_length or domain.long_conversations == "cut":
        return document
    if domain.long_conversations == "drop":
        return TOO_LONG
    return replace(document, questions=np.empty(0, np.int64))


def _is_plain(item: rows.Item) -> bool:
    return isinstance(item, rows.Text) and item.spans is None


def _plain(
    items: Sequence[rows.Item], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[str | None], Columns]:
    """Texts all of which carry loss: of each the reason why it is no document, or None; and the documents.

    Of short ones there are many: nothing is made for each that can be made for all.
    """
    texts = [item.text for item in items if isinstance(item, rows.Text)]
    encoded = chain.from_iterable(encode(tokenizer, some, special_tokens=True) for some in _calls(texts))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id  # each takes as long as a short text
    reasons: list[str | None] = []
    kept, digests = [], []
    for item in items:
        if not isinstance(item, rows.Text):
            reasons.append(str(item))
            continue
        tokens = next(encoded)
        if end is not None and tokens[-1:] != [end]:
            tokens.append(end)
        reasons.append(rows.ONE_TOKEN if len(tokens) < 2 else None)
        if len(tokens) > 1:
            kept.append(tokens)
            digests.append(item.digest)
    return reasons, whole_texts(kept, digests, begin)


def _spanned(items: Sequence[rows.Item], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Document | str]:
    """A document for each item, in order; the reason why not where that is given, or found here."""
    encoded = {}
    for templated in (False, True):
        texts = [item.text for item in items if isinstance(item, rows.Text) and item.templated == templated]
        calls = map(partial(encode_with_offsets, tokenizer, special_tokens=not templated), _calls(texts))
        encoded[templated] = chain.from_iterable(calls)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for item in items:
        if isinstance(item, rows.Text):
            yield _document(item, *next(encoded[item.templated]), begin, end)
        else:
            yield item


def _calls(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[first : first + CALL] for first in range(0, len(texts), CALL))


def _document(
    text: rows.Text, ids: Ids, offsets: Offsets, begin: int | None, end: int | None
) -> Document | str:
    """``begin`` and ``end``: the tokenizer's BOS and EOS."""
    assert text.spans is not None
    if text.templated:
        end = None  # that is the template's to say
    if end is not None:
        if ids[-1:].tolist() != [end]:
            ids = np.append(ids, np.int32(end))
        offsets = np.concatenate([offsets[: len(ids) - 1], [[len(text.text)] * 2]])
    if len(ids) < 2:
        return rows.ONE_TOKEN
    begins, after = offsets.T
    # Half of a token is enough, as in transformers: of "ask " and "say" the token " say" is the answer's. One
    # without a width has its end alone: a blank, where the tokenizer trims places, or none of the text.
    counts = _inside(after - 1, text.spans) | (_inside(begins, text.spans) & (begins < after))
    if end is not None:
        counts[-1] = True
    if not counts[1:].any():
        return rows.NO_LOSS
    head = max(int(ids[0] == begin), int(np.searchsorted(begins, text.prefix_length)))
    return Document(
        ids,
        counts,
        text.digest,
        head,
        np.searchsorted(begins, np.array(text.cut_points, int)),
    )


def _inside(places: NDArray[np.int64], spans: Sequence[chat.Span]) -> NDArray[np.bool_]:
    """[L]; whether the place is inside one of the spans, which are in order and do not overlap."""
    edges = np.array(spans, np.int64).ravel()
    inside: NDArray[np.bool_] = np.searchsorted(edges, places, side="right") % 2 == 1
    return inside
