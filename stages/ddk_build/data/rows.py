"""Turn a row of a dataset into texts for the tokenizer or documents of tokens, or skip it with a reason."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ddk_build.config import DomainConfig
from ddk_build.data import chat, reasons, sources, token_rows
from ddk_build.data.documents import Document, Skipped, Text, digest_of
from ddk_cache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ShareGPT's values of "from", and the roles of chat templates.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_response": "tool", "observation": "tool"}


Item = Text | Document | Skipped
Columns = dict[str, Any]
Reader = Callable[[sources.Row], Sequence[Item]]
"""Returns the documents of a row, or the reason to skip it."""


def reader(name: str, domain: DomainConfig, tokenizer: "PreTrainedTokenizerBase", seed: int) -> Reader:
    """Return the function that reads the domain's rows.

    Raises ConfigError, which names the domain, if the tokenizer has no chat template or no offsets. The
    reader raises it too, where the template does not show the assistant's turns, or a token is outside the
    vocabulary.
    """
    read: Callable[[Columns], Sequence[Item]]
    renderer = _Chat(tokenizer, seed, domain.allow_dropped)
    if domain.messages_column is not None:
        _check_template(f"domains.{name}.messages_column", tokenizer)
        read = partial(_messages, renderer, domain.messages_column)
    elif domain.prompt_column is not None:
        _check_fast(f"domains.{name}.prompt_column", tokenizer)
        if domain.prompt_format == "chat":
            _check_template(f"domains.{name}.prompt_format", tokenizer)
        read = partial(_pair, renderer, f"domains.{name}.prompt_column", domain)
    elif domain.tokens_column is not None:
        check = partial(token_rows.check_ids, f"domains.{name}.tokens_column", len(tokenizer))
        read = partial(token_rows.documents, domain, check, tokenizer.bos_token_id, seed)
    else:
        read = partial(_text, domain.text_column, seed)

    def read_or_skip(row: sources.Row) -> Sequence[Item]:
        if row is None:
            return [Skipped(reasons.NOT_UTF8)]
        if domain.score_column is not None and not _is_enough(row[domain.score_column], domain.min_score):
            return [Skipped(reasons.LOW_SCORE)]
        try:
            return _distinguished(read(row), domain, row, seed)
        except reasons.Skip as reason:
            return [Skipped(str(reason), reason.detail)]
        except UnicodeEncodeError:  # half of a surrogate pair
            return [Skipped(reasons.NOT_UTF8)]

    return read_or_skip


def _distinguished(items: Sequence[Item], domain: DomainConfig, row: Columns, seed: int) -> Sequence[Item]:
    """Let rows of one group have one digest, and no copies among those with another content or prefix."""
    prefix = teacher_prefix(domain, row)
    differs = digest_of(prefix.encode(), seed) if prefix else 0
    group = None if domain.group_column is None else row[domain.group_column]
    if domain.group_column is not None and group is None:
        raise reasons.Skip(reasons.NULL)
    for item in items:
        if not isinstance(item, Skipped):
            item.variant = differs
            if group is not None:
                item.variant ^= item.digest
                item.digest = digest_of(json.dumps(group, default=str).encode(), seed)
    return items


def teacher_prefix(domain: DomainConfig, row: Columns) -> str:
    """Return what the teacher alone reads in front of a row's documents; may be empty."""
    prefix = None if domain.teacher_prefix_column is None else row[domain.teacher_prefix_column]
    if not isinstance(prefix, str | None):
        raise reasons.Skip(reasons.NOT_PREFIX)
    return prefix or ""


def _is_enough(score: Any, least: float | None) -> bool:
    return isinstance(score, int | float) and least is not None and score >= least


def _check_template(key: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{key}: the teacher's tokenizer has no chat template; use an instruct model, or text_column"
        )
    _check_fast(key, tokenizer)


def _check_fast(key: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ConfigError if the tokenizer does not know its tokens' offsets in a text."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{key}: the teacher's tokenizer has no fast version, which the loss mask needs; use text_column"
        )


def _text(column: str, seed: int, row: Columns) -> list[Item]:
    text = _string(row[column])
    return [Text(text, digest_of(_folded(text).encode(), seed))]


def _string(value: Any) -> str:
    if value is None:
        raise reasons.Skip(reasons.NULL)
    if not isinstance(value, str):
        raise reasons.Skip(reasons.NOT_TEXT)
    if not value or value.isspace():
        raise reasons.Skip(reasons.EMPTY)
    return value


@dataclass(frozen=True)
class _Chat:
    """Renders conversations."""

    tokenizer: "PreTrainedTokenizerBase"
    seed: int
    allow_dropped: Collection[str]

    def render(self, messages: Any, tools: Any, answers: int | None = None) -> list[Item]:
        """Return the conversation; only its last ``answers`` turns of the assistant carry loss, or all."""
        messages, tools = conversation(messages, tools)
        # Not of the rendered text: some templates add the date.
        content = json.dumps([_folded(messages), tools], sort_keys=True, ensure_ascii=False)
        digest = digest_of(content.encode(), self.seed)
        try:
            with chat.refusals():
                text = chat.render(self.tokenizer, messages, tools, self.endings, digest)
        except chat.TemplateMismatchError:
            if messages[0]["role"] == "assistant":
                raise reasons.Skip(reasons.ASSISTANT_FIRST) from None
            raise
        check_rendered(messages, tools, text.text, self.allow_dropped)
        if answers is not None:
            turns = sum(message["role"] == "assistant" for message in messages)
            if text.spans is None or len(text.spans) != turns:
                raise reasons.Skip(reasons.UNMARKED)
            text.spans = text.spans[turns - answers :]
        return [text]

    @cached_property
    def endings(self) -> tuple[str, ...]:
        """The tokens that can end a turn: those added to the text's."""
        return tuple(self.tokenizer.get_added_vocab())


def check_rendered(
    messages: list[chat.Message], tools: Any, text: str, allow_dropped: Collection[str]
) -> None:
    """Raise Skip where the rendered ``text`` lacks a part of the conversation."""
    contents = [message.get("content") for message in messages]
    if any(isinstance(content, list | dict) and str(content) in text for content in contents):
        raise reasons.Skip(reasons.PARTS)  # rendered by Python's str: [{'type': 'text', ...
    for field in chat.dropped_fields(messages, tools, text):
        if field not in allow_dropped:
            raise reasons.Skip(chat.dropped(field))


def conversation(messages: Any, tools: Any) -> tuple[list[chat.Message], list[Any] | None]:
    """Return the messages of a row, with roles, and its tools; raise Skip if it has no conversation."""
    messages = _without_nulls(messages)
    if messages is None:
        raise reasons.Skip(reasons.NULL)
    if messages == []:
        raise reasons.Skip(reasons.EMPTY)
    return _with_roles(messages), _tools(tools)


def _messages(renderer: _Chat, column: str, row: Columns) -> list[Item]:
    return renderer.render(row[column], row.get("tools"))


def _pair(renderer: _Chat, key: str, domain: DomainConfig, row: Columns) -> list[Item]:
    """Return a prompt and its completion, which alone carries loss: texts, or parts of a conversation."""
    prompt, completion = row[str(domain.prompt_column)], row[str(domain.completion_column)]
    if prompt is None or completion is None:
        raise reasons.Skip(reasons.NULL)
    if isinstance(prompt, list) and isinstance(completion, list):
        _check_template(key, renderer.tokenizer)
        answers = sum(message["role"] == "assistant" for message in _with_roles(_without_nulls(completion)))
        return renderer.render([*prompt, *completion], row.get("tools"), answers)
    if not isinstance(prompt, str):
        raise reasons.Skip(reasons.NOT_TEXT)
    completion = _string(completion)
    if is_chat(domain, renderer.tokenizer):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return renderer.render(turns, row.get("tools"), 1)
    if prompt and not (prompt[-1].isspace() or completion[0].isspace()):
        prompt += "\n"
    text = prompt + completion
    content = json.dumps([_folded(prompt), _folded(completion)], ensure_ascii=False)
    return [Text(text, digest_of(content.encode(), renderer.seed), [(len(prompt), len(text))])]


def prompt_notes(domains: Mapping[str, DomainConfig], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Yield a line on each domain of prompts and completions: how they are joined."""
    for name, domain in domains.items():
        if domain.prompt_column is not None and is_chat(domain, tokenizer):
            yield f"{name}: a prompt and its completion are turns of the chat template (prompt_format: chat)"
        elif domain.prompt_column is not None:
            yield f"{name}: a prompt and its completion are joined as plain text (prompt_format: plain)"


def is_chat(domain: DomainConfig, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a prompt and a completion that are texts become turns of the chat template."""
    return domain.prompt_format != "plain" and tokenizer.chat_template is not None


def _tools(value: Any) -> list[Any] | None:
    try:
        tools = _without_nulls(json.loads(value) if isinstance(value, str) else value) or None
    except ValueError:
        raise reasons.Skip(reasons.NOT_TOOLS) from None
    if not isinstance(tools, list | None):
        raise reasons.Skip(reasons.NOT_TOOLS)
    return tools


def _with_roles(messages: Any) -> list[chat.Message]:
    """Return messages with roles; ShareGPT's have "from" and "value"."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise reasons.Skip(reasons.NOT_MESSAGES)
    converted = []
    for message in messages:
        if "role" not in message and isinstance(message.get("from"), str) and "value" in message:
            rest = {key: value for key, value in message.items() if key not in {"from", "value"}}
            role = SHAREGPT_ROLES.get(message["from"], message["from"])
            message = {"role": role, "content": message["value"], **rest}
        if not isinstance(message.get("role"), str):
            raise reasons.Skip(reasons.NOT_MESSAGES)
        if message.get("content") is None and not message.get("tool_calls"):
            raise reasons.Skip(reasons.NO_CONTENT)  # a template would render an empty answer
        converted.append(message)
    return converted


def _without_nulls(value: Any) -> Any:
    """Drop keys with null, which Arrow adds to give all rows the same; templates test for a key."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"
        }
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _folded(value: Any) -> Any:
    """Collapse white space in all texts, so that copies which differ only there have one digest."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        return {key: _folded(item) for key, item in value.items()}
    return [_folded(item) for item in value] if isinstance(value, list) else value
