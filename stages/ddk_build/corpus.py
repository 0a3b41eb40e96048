"""Datasets into documents of tokens. Every row gives a document or is counted with the reason why not."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddk_build import chat, sources
from ddk_build.config import DomainConfig
from ddk_build.documents import Document, Intake
from ddk_cache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Why a row gives no document.
NULL = "null"
EMPTY = "empty"
NOT_TEXT = "not a string"
NOT_UTF8 = "not valid UTF-8"
ONE_TOKEN = "one token"
NOT_MESSAGES = "not a list of messages with roles"
NOT_TOOLS = "tools are not a list"
REFUSED = "refused by the chat template"
ASSISTANT_FIRST = "begins with the assistant, which the chat template does not foresee"
NO_ASSISTANT = "no assistant token"


@dataclass(frozen=True, slots=True)
class _Text:
    """What the tokenizer is given for a row."""

    text: str
    digest: int
    spans: Sequence[chat.Span] = ()
    """The assistant's parts of a conversation, in characters."""


def documents(
    name: str, domain: DomainConfig, tokenizer: "PreTrainedTokenizerBase", *, seed: int, intake: Intake
) -> Iterator[Document]:
    """Yield the domain's documents in the dataset's order until ``max_tokens`` tokens have been taken.

    The last document is shortened so that the number is exact. ``intake`` says where to begin and is kept
    up to date with every document. A text gets the tokenizer's special tokens and ends with its
    end-of-sequence token, where it has one; a conversation is what the chat template makes of it.

    Raises
    ------
    ConfigError
        In one line that names the domain: the source cannot be read or has no such column; the tokenizer
        has no chat template, or one in which the assistant's tokens cannot be told; a domain has fewer than
        two different documents.
    """
    begins = intake.rows == 0
    different: set[int] = set()
    for document in _take(name, domain, tokenizer, seed, intake):
        if len(different) < 2:
            different.add(document.digest)
        yield document
    if begins and len(different) < 2:
        found = [f"{intake.rows} rows", *(f"{count} {reason}" for reason, count in intake.skipped.items())]
        hint = "; with sample_by: paragraph, or line, a text file makes more" if intake.rows == 1 else ""
        raise ConfigError(
            f"domains.{name}: needs two different documents, one for each split, and has {len(different)} "
            f"({', '.join(found)}){hint}"
        )


def _take(
    name: str, domain: DomainConfig, tokenizer: "PreTrainedTokenizerBase", seed: int, intake: Intake
) -> Iterator[Document]:
    is_chat = domain.messages_column is not None
    if is_chat and (tokenizer.chat_template is None or not tokenizer.is_fast):
        lacks = "no chat template" if tokenizer.chat_template is None else "no fast version"
        raise ConfigError(f"domains.{name}.messages_column: the teacher's tokenizer has {lacks}")
    columns = [domain.messages_column, "tools"] if domain.messages_column else [domain.text_column]
    limit = sys.maxsize if domain.max_tokens is None else domain.max_tokens
    intake.exhausted = False
    for rows in sources.read(name, domain, columns, skip=intake.rows):
        texts: list[_Text | str] = []
        for number, row in enumerate(rows, start=intake.rows):
            try:
                texts.append(
                    _chat(row, columns[0], tokenizer, seed) if is_chat else _text(row, columns[0], seed)
                )
            except chat.TemplateMismatchError as error:
                raise ConfigError(f"domains.{name}: row {number}: {error}") from error
        for document in _tokenise(texts, tokenizer, is_chat):
            room = limit - intake.tokens
            if room <= 0:
                return
            intake.rows += 1
            if isinstance(document, str):
                intake.skipped[document] += 1
                continue
            if len(document) > room:
                document = document[:room]
            intake.documents += 1
            intake.tokens += len(document)
            yield document
    intake.exhausted = True


def _text(row: sources.Row, column: str, seed: int) -> _Text | str:
    if row is None:
        return NOT_UTF8
    text = row[column]
    if text is None:
        return NULL
    if not isinstance(text, str):
        return NOT_TEXT
    if not text or text.isspace():
        return EMPTY
    return _digested(text, text, seed)


def _chat(row: sources.Row, column: str, tokenizer: "PreTrainedTokenizerBase", seed: int) -> _Text | str:
    from jinja2 import TemplateError

    if row is None:
        return NOT_UTF8
    messages, tools = _without_nulls(row[column]), row.get("tools")
    if messages is None:
        return NULL
    if messages == []:
        return EMPTY
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        return NOT_MESSAGES
    try:
        tools = _without_nulls(json.loads(tools) if isinstance(tools, str) else tools) or None
    except ValueError:
        return NOT_TOOLS
    if not isinstance(tools, list | None):
        return NOT_TOOLS
    try:
        text, spans = chat.render(tokenizer, messages, tools)
    except (TemplateError, TypeError):  # a template that adds text to a missing content raises TypeError
        return REFUSED
    except chat.TemplateMismatchError:
        if messages[0]["role"] == "assistant":
            return ASSISTANT_FIRST
        raise
    # The text is not what is digested: some templates put the date into it.
    return _digested(text, json.dumps([messages, tools], sort_keys=True, ensure_ascii=False), seed, spans)


def _without_nulls(value: Any) -> Any:
    """Drop the keys that Arrow added to make all rows alike; templates ask whether a key is there."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(held) for key, held in value.items() if held is not None or key == "content"
        }
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _digested(text: str, content: str, seed: int, spans: Sequence[chat.Span] = ()) -> _Text | str:
    try:
        digest = hashlib.blake2b(content.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    except UnicodeEncodeError:  # half of a surrogate pair
        return NOT_UTF8
    return _Text(text, int.from_bytes(digest, "little"), spans)


def _tokenise(
    texts: Sequence[_Text | str], tokenizer: "PreTrainedTokenizerBase", is_chat: bool
) -> Iterator[Document | str]:
    """A document for each text, in order; the reason why not where that is given, or found here."""
    usable = [text.text for text in texts if isinstance(text, _Text)]
    if not usable:
        yield from (text for text in texts if isinstance(text, str))
        return
    encoded = tokenizer(
        usable,
        add_special_tokens=not is_chat,  # the template has them
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=is_chat,
        verbose=False,  # no warning that a text is longer than the model's window
    )
    end = tokenizer.eos_token_id
    index = 0
    for text in texts:
        if isinstance(text, str):
            yield text
            continue
        ids = encoded["input_ids"][index]
        if not is_chat and end is not None and ids[-1:] != [end]:
            ids.append(end)
        tokens = np.array(ids, np.int32)
        if is_chat:
            counts = _inside(encoded["offset_mapping"][index], text.spans)
        else:
            counts = np.ones(len(tokens), np.bool_)
        index += 1
        if len(tokens) < 2:
            yield ONE_TOKEN
        elif is_chat and not counts[1:].any():
            yield NO_ASSISTANT
        else:
            yield Document(tokens, counts, text.digest)


def _inside(offsets: Sequence[chat.Span], spans: Sequence[chat.Span]) -> NDArray[np.bool_]:
    """[L]; whether the token begins inside one of the spans, which are in order and do not overlap."""
    begins = np.array([begin for begin, _ in offsets], np.int64)
    edges = np.array(spans, np.int64).ravel()
    inside: NDArray[np.bool_] = np.searchsorted(edges, begins, side="right") % 2 == 1
    return inside
