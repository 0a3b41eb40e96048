"""A row of a dataset into texts for the tokenizer, or documents of tokens; or the reason for neither."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_build import chat, sources
from ddk_build.config import DomainConfig
from ddk_build.documents import Document
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
NO_CONTENT = "a message with neither content nor tool_calls"
NOT_TOOLS = "tools are not a list"
NOT_TOKENS = "not a list of token ids, with as many numbers in the other columns"
PARTS = "content that the chat template takes for text, which it is not"
REFUSED = "refused by the chat template"
ASSISTANT_FIRST = "begins with the assistant, which the chat template does not foresee"
NO_LOSS = "no token that carries loss"

# Who speaks, as ShareGPT's "from" has it and as chat templates do.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_response": "tool", "observation": "tool"}


@dataclass(slots=True)
class Text:
    """What the tokenizer is given."""

    text: str
    digest: int
    spans: Sequence[chat.Span] | None = None
    """The parts that carry loss, in characters; None: all of it."""
    cut_points: Sequence[int] = ()
    prefix_length: int = 0
    templated: bool = False
    """The special tokens are in the text already."""


Item = Text | Document | str
Reader = Callable[[sources.Row], list[Item]]
"""The documents of a row, or the reason why it has none."""


class _LeftOut(Exception):
    """A row gives no document, for this reason."""


def reader(name: str, domain: DomainConfig, tokenizer: "PreTrainedTokenizerBase", seed: int) -> Reader:
    """What makes documents of the domain's rows.

    Raises
    ------
    ConfigError
        In one line that names the domain: the tokenizer has no chat template, or one in which the
        assistant's tokens cannot be told, or it cannot say where its tokens stand in a text. The reader
        raises it too, where a column is of another kind than the configuration says, or holds tokens of
        another vocabulary.
    """
    if domain.messages_column is not None:
        _check_template(f"domains.{name}.messages_column", tokenizer)
        make: Callable[..., list[Item]] = partial(_messages, _Chat(tokenizer, seed))
    elif domain.prompt_column is not None:
        _check_fast(f"domains.{name}.prompt_column", tokenizer)
        make = partial(_pair, _Chat(tokenizer, seed), f"domains.{name}.prompt_column")
    elif domain.tokens_column is not None:
        make = partial(_tokens, f"domains.{name}.tokens_column", tokenizer, seed)
    else:
        make = partial(_text, seed)

    def read(row: sources.Row) -> list[Item]:
        if row is None:
            return [NOT_UTF8]
        try:
            return make(domain, row)
        except _LeftOut as reason:
            return [str(reason)]

    return read


def _check_template(key: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.chat_template is None:
        raise ConfigError(f"{key}: the teacher's tokenizer has no chat template")
    _check_fast(key, tokenizer)


def _check_fast(key: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Only a fast tokenizer says where its tokens stand in a text."""
    if not tokenizer.is_fast:
        raise ConfigError(f"{key}: the teacher's tokenizer has no fast version")


def _text(seed: int, domain: DomainConfig, row: dict[str, Any]) -> list[Item]:
    text = row[domain.text_column]
    if text is None:
        raise _LeftOut(NULL)
    if not isinstance(text, str):
        raise _LeftOut(NOT_TEXT)
    if not text or text.isspace():
        raise _LeftOut(EMPTY)
    return [Text(text, _digest(_folded(text).encode, seed))]


def _tokens(
    key: str, tokenizer: "PreTrainedTokenizerBase", seed: int, domain: DomainConfig, row: dict[str, Any]
) -> list[Item]:
    """Each document of a row of token ids; a new one begins where the segment changes, or the positions do
    not go on. Segment 0 is padding."""
    assert domain.tokens_column is not None
    ids = _numbers(row[domain.tokens_column])
    columns = (domain.loss_mask_column, domain.segments_column, domain.positions_column)
    mask, segments, positions = (None if name is None else _numbers(row[name]) for name in columns)
    if any(column is not None and len(column) != len(ids) for column in (mask, segments, positions)):
        raise _LeftOut(NOT_TOKENS)
    if not len(ids):
        raise _LeftOut(EMPTY)
    size = len(tokenizer)
    if ids.min() < 0 or ids.max() >= size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ConfigError(f"{key}: token {wrong} is not one of the {size} of the teacher's tokenizer")
    ends = np.zeros(len(ids) - 1, np.bool_)
    if segments is not None:
        ends |= np.diff(segments) != 0
    if positions is not None:
        ends |= np.diff(positions) != 1
    edges = [0, *(np.flatnonzero(ends) + 1).tolist(), len(ids)]
    found: list[Item] = []
    for begin, end in pairwise(edges):
        if segments is not None and segments[begin] == 0:
            continue
        part = np.ascontiguousarray(ids[begin:end], np.int32)
        counts = np.ones(end - begin, np.bool_) if mask is None else mask[begin:end] != 0
        digest = _digest(part.astype("<i4").tobytes, seed)
        if len(part) < 2:
            found.append(ONE_TOKEN)
        elif not counts[1:].any():
            found.append(NO_LOSS)
        else:
            questions = None if counts.all() else np.flatnonzero(counts[:-1] & ~counts[1:]) + 1
            head = int(part[0] == tokenizer.bos_token_id)
            found.append(Document(part, counts, digest, head, questions))
    return found or [EMPTY]


def _numbers(value: Any) -> Any:
    if value is None:
        raise _LeftOut(NULL)
    if not isinstance(value, list) or not all(isinstance(one, int) for one in value):
        raise _LeftOut(NOT_TOKENS)
    return np.array(value, np.int64)


@dataclass(frozen=True)
class _Chat:
    """Renders conversations."""

    tokenizer: "PreTrainedTokenizerBase"
    seed: int

    def render(self, messages: Any, tools: Any, answers: int | None = None) -> list[Item]:
        """The conversation; of its answers only the last ``answers`` carry loss, or all."""
        from jinja2 import TemplateError

        messages = _without_nulls(messages)
        if messages is None:
            raise _LeftOut(NULL)
        if messages == []:
            raise _LeftOut(EMPTY)
        messages = _as_roles(messages)
        try:
            tools = _without_nulls(json.loads(tools) if isinstance(tools, str) else tools) or None
        except ValueError:
            raise _LeftOut(NOT_TOOLS) from None
        if not isinstance(tools, list | None):
            raise _LeftOut(NOT_TOOLS)
        try:
            found = chat.render(self.tokenizer, messages, tools, self.endings)
        except (TemplateError, TypeError):  # a template that adds text to a missing content: TypeError
            raise _LeftOut(REFUSED) from None
        except chat.TemplateMismatchError:
            if messages[0]["role"] == "assistant":
                raise _LeftOut(ASSISTANT_FIRST) from None
            raise
        contents = [message.get("content") for message in messages]
        if any(isinstance(content, list | dict) and str(content) in found.text for content in contents):
            raise _LeftOut(PARTS)  # written as Python writes it: [{'type': 'text', ...
        # The text is not what is digested: some templates put the date into it.
        content = json.dumps([_folded(messages), tools], sort_keys=True, ensure_ascii=False)
        spans = found.spans if answers is None else found.spans[len(found.spans) - answers :]
        digest = _digest(content.encode, self.seed)
        return [Text(found.text, digest, spans, found.cut_points, found.prefix_length, templated=True)]

    @cached_property
    def endings(self) -> tuple[str, ...]:
        """What a turn can end with: the tokens beside the text's."""
        return tuple(self.tokenizer.get_added_vocab())


def _messages(to_text: _Chat, domain: DomainConfig, row: dict[str, Any]) -> list[Item]:
    return to_text.render(row[str(domain.messages_column)], row.get("tools"))


def _pair(to_text: _Chat, key: str, domain: DomainConfig, row: dict[str, Any]) -> list[Item]:
    """A prompt and its completion, which alone carries loss: texts, or parts of a conversation."""
    prompt, completion = row[str(domain.prompt_column)], row[str(domain.completion_column)]
    if prompt is None or completion is None:
        raise _LeftOut(NULL)
    if isinstance(prompt, list) and isinstance(completion, list):
        _check_template(key, to_text.tokenizer)
        answers = sum(message["role"] == "assistant" for message in _as_roles(_without_nulls(completion)))
        return to_text.render([*prompt, *completion], row.get("tools"), answers)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise _LeftOut(NOT_TEXT)
    if not completion or completion.isspace():
        raise _LeftOut(EMPTY)
    content = json.dumps([_folded(prompt), _folded(completion)], ensure_ascii=False)
    text = prompt + completion
    return [Text(text, _digest(content.encode, to_text.seed), [(len(prompt), len(text))])]


def _as_roles(messages: Any) -> list[chat.Message]:
    """Messages with roles; those of ShareGPT have "from" and "value"."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _LeftOut(NOT_MESSAGES)
    found = []
    for message in messages:
        if "role" not in message and isinstance(message.get("from"), str) and "value" in message:
            rest = {key: held for key, held in message.items() if key not in {"from", "value"}}
            role = SHAREGPT_ROLES.get(message["from"], message["from"])
            message = {"role": role, "content": message["value"], **rest}
        if not isinstance(message.get("role"), str):
            raise _LeftOut(NOT_MESSAGES)
        if message.get("content") is None and not message.get("tool_calls"):
            raise _LeftOut(NO_CONTENT)  # a template would make an empty answer of it
        found.append(message)
    return found


def _without_nulls(value: Any) -> Any:
    """Drop the keys that Arrow added to make all rows alike; templates ask whether a key is there."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(held) for key, held in value.items() if held is not None or key == "content"
        }
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _folded(value: Any) -> Any:
    """Text with each run of white space as one blank, and none around it: what copies differ in."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {key: _folded(held) for key, held in value.items()}
    return [_folded(held) for held in value] if isinstance(value, list) else value


def _digest(content: Callable[[], bytes], seed: int) -> int:
    try:
        found = hashlib.blake2b(content(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise _LeftOut(NOT_UTF8) from None
    return int.from_bytes(found, "little")
