"""Turn a domain's rows into prompts of token ids, and count the rows without one by reason."""

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_build.data import chat, reasons, rows, sources
from ddk_build.data.encoding import encode
from ddk_build.generate.config import PromptConfig
from ddk_cache.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

# Reasons to skip a row, beside those of documents.
COPY = "a copy of an earlier prompt"
TOO_LONG = "longer than the model with max_tokens"
NO_QUESTION = "without a message to answer"


@dataclass(frozen=True)
class Prompt:
    """What the model continues."""

    id: str
    """64 bits of the digest of its tokens, in hexadecimal."""
    tokens: list[int]
    kept: Mapping[str, Any]
    """The row's values of ``keep_columns``."""


class PromptReader:
    """Reads a domain's prompts, as often as it is asked to: always the same ones in the same order.

    Prompts of more than ``most_tokens`` tokens, which the model cannot answer, are skipped.

    Raises ConfigError, which names the domain, if the model has no chat template, or one without such an
    option.
    """

    def __init__(
        self, name: str, domain: PromptConfig, tokenizer: "PreTrainedTokenizerBase", most_tokens: int
    ) -> None:
        self.name, self.domain, self._tokenizer, self._most_tokens = name, domain, tokenizer, most_tokens
        self.skipped: Counter[str] = Counter()
        """Rows without a prompt, by reason; of the last pass."""
        self.kept_types: dict[str, pa.DataType] = {}
        """Of ``keep_columns``; known after a pass."""
        self._has_chat = domain.prompt_format != "plain" and tokenizer.chat_template is not None
        self.text_format: str | None = None
        """What is done with prompts that are texts; None if there are none; known after a pass."""
        if domain.messages_column or domain.prompt_format == "chat" or self._has_chat:
            self._check_template()

    def __iter__(self) -> Iterator[Prompt]:
        """Yield prompts, at most ``max_prompts``; each text once.

        Raises ConfigError where the source cannot be read or lacks the column.
        """
        self.skipped.clear()
        seen: set[str] = set()
        for part in sources.read(self.name, self.domain, skip=0):
            self.kept_types = {name: part.table.field(name).type for name in self.domain.keep_columns}
            for row in part.rows(self.domain):
                if len(seen) == self.domain.max_prompts:
                    return
                try:
                    prompt = self._prompt(row)
                    if prompt.id in seen:
                        raise reasons.Skip(COPY)
                except reasons.Skip as reason:
                    self.skipped[str(reason)] += 1
                    continue
                seen.add(prompt.id)
                yield prompt

    def _prompt(self, row: sources.Row) -> Prompt:
        if row is None:
            raise reasons.Skip(reasons.NOT_UTF8)
        value = row[self.domain.columns[0]]
        is_text = self.domain.prompt_column is not None and isinstance(value, str)
        try:
            if is_text:
                self.text_format = (
                    "prompts are users' messages in the chat template (prompt_format: chat)"
                    if self._has_chat
                    else "prompts are continued as plain text (prompt_format: plain)"
                )
            if is_text and not self._has_chat:
                tokens = self._continued(value)
            else:
                messages = [{"role": "user", "content": value}] if is_text else value
                tokens = self._answered(messages, row.get("tools"))
        except UnicodeEncodeError:  # half of a surrogate pair
            raise reasons.Skip(reasons.NOT_UTF8) from None
        if not tokens:
            raise reasons.Skip(reasons.EMPTY)
        if len(tokens) > self._most_tokens:
            raise reasons.Skip(TOO_LONG)
        digest = hashlib.sha256(np.array(tokens, "<i4").tobytes())
        return Prompt(digest.hexdigest()[:16], tokens, {name: row[name] for name in self.domain.keep_columns})

    def _continued(self, text: str) -> list[int]:
        """Return a text's tokens with those that the tokenizer puts in front of every text."""
        tokens = self._encode(text, special_tokens=True)
        eos = self._tokenizer.eos_token
        if eos is not None and not text.endswith(eos) and tokens[-1:] == [self._tokenizer.eos_token_id]:
            return tokens[:-1]
        return tokens

    def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        [(tokens, _)] = encode(self._tokenizer, [text], special_tokens=special_tokens)
        return [int(token) for token in tokens]

    def _answered(self, value: Any, tools: Any) -> list[int]:
        """Return a conversation's tokens up to where the assistant speaks after the last other message."""
        messages, tools = rows.conversation(value, tools)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if all(message["role"] == "system" for message in messages):
            raise reasons.Skip(NO_QUESTION)
        if not self._has_chat:  # else it was checked at the start
            self._check_template()

        def text_of(some: list[chat.Message]) -> str:
            keys = self.domain.chat_template_kwargs
            options = {**keys, "add_generation_prompt": True, "tokenize": False}
            return str(self._tokenizer.apply_chat_template(some, tools=tools, **options))

        with chat.refusals():
            text = text_of(chat.without_none(messages, text_of))
        # Templates of reasoning models drop what came before the last question, rightly.
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
        needed = [
            {key: value for key, value in message.items() if key != "reasoning_content" or i > last}
            for i, message in enumerate(messages)
        ]
        rows.check_rendered(needed, tools, text, (*self.domain.allow_dropped, "content"))
        return self._encode(text, special_tokens=False)

    def _check_template(self) -> None:
        """Raise ConfigError if there is no chat template, or it has no option of ``chat_template_kwargs``."""
        key = f"domains.{self.name}"
        if self._tokenizer.chat_template is None:
            column = "messages_column" if self.domain.messages_column else "prompt_column"
            raise ConfigError(
                f"{key}.{column}: the model's tokenizer has no chat template; use an instruct model, or "
                "prompt_column with texts"
            )
        names = set(re.findall(r"\w+", str(self._tokenizer.chat_template)))
        for option in self.domain.chat_template_kwargs:
            if option not in names:
                near = difflib.get_close_matches(option, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"{key}.chat_template_kwargs.{option}: the model's chat template has no such option{hint}"
                )
