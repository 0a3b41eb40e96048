"""Render conversations with a chat template and locate the assistant's turns in the text."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ddk_build.config import DroppableField
from ddk_build.data import reasons
from ddk_build.data.documents import Text
from ddk_cache.errors import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
"""Character offsets: the first of the span, and the first after it."""
TextOf = Callable[..., str]
"""Renders messages; ``prompt=True`` adds the generation prompt."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPACE = re.compile(r"\s*")
_MARK = "\ue000"  # private use area; appended to contents to locate their ends in the rendered text


class TemplateMismatchError(Exception):
    """The template renders a turn differently once others follow, so the turn cannot be located."""


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    tools: list[Any] | None,
    endings: tuple[str, ...],
    digest: int = 0,
) -> Text:
    """Render a conversation in time linear in its length, except for turns without a text.

    The spans are the assistant's turns, each with its end-of-turn token and without the white space after
    that. They come from the template where it has ``{% generation %}``. Otherwise they come from comparing
    the text with renderings of the conversation's beginning. ``endings`` are the tokens that can end a turn.

    Raises jinja2.TemplateError if the template rejects the conversation, and TemplateMismatchError if it has
    no ``{% generation %}``, and a turn cannot be located.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=tools)
    special_tokens: dict[str, Any] = tokenizer.special_tokens_map

    def rendered(messages: list[Message], **options: Any) -> Any:
        arguments = special_tokens | options
        return render_jinja_template([messages], tools=tools, chat_template=template, **arguments)

    def text_of(messages: list[Message], prompt: bool = False) -> str:
        [text], _ = rendered(messages, add_generation_prompt=prompt)
        return str(text)

    messages = without_none(messages, text_of)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if _GENERATION.search(template):
        [text], [spans] = rendered(messages, return_assistant_tokens_mask=True)
    else:
        text = text_of(messages)
        spans = _locate_turns(text_of, messages, turns, text)
    spans = [(start, _trim(text, start, end, endings)) for start, end in spans]
    cut_points = []
    if len(spans) == len(turns):
        for (_, end), turn in zip(spans, turns, strict=True):
            if turn + 1 < len(messages) and messages[turn + 1]["role"] == "user":
                cut_points.append(_skip_space(text, end))
    return Text(text, digest, spans, cut_points, _prefix_length(text_of, messages, text), templated=True)


@contextmanager
def refusals() -> Iterator[None]:
    """Raise Skip where a chat template rejects a conversation, or fails on it."""
    from jinja2 import TemplateError

    try:
        yield
    except UnicodeEncodeError:  # a ValueError, with a reason of its own
        raise
    except (TemplateError, TypeError, ValueError) as error:  # one that adds text to no content: TypeError
        raise reasons.Skip(reasons.REFUSED, brief(error, 200)) from None


def without_none(messages: list[Message], text_of: Callable[[list[Message]], str]) -> list[Message]:
    """Return the messages with an empty content in place of none where the template writes it as "None"."""
    empty = [m | {"content": ""} if m.get("content", "") is None else m for m in messages]
    if empty == messages:
        return messages
    given, other = (text_of(some).replace("None", "") for some in (messages, empty))
    return empty if given == other else messages


def _trim(text: str, start: int, end: int, endings: tuple[str, ...]) -> int:
    """Return the turn's end without the white space that a template puts after the end-of-turn token."""
    turn = text[start:end].rstrip()
    return start + len(turn) if turn.endswith(endings) else end


def _skip_space(text: str, offset: int) -> int:
    match = _SPACE.match(text, offset)
    return match.end() if match else offset


def _prefix_length(text_of: TextOf, messages: list[Message], text: str) -> int:
    from jinja2 import TemplateError

    count = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    if not count:
        return 0
    try:
        prefix = text_of(messages[:count])
    except TemplateError:  # some templates require a user's message
        return 0
    return len(prefix) if text.startswith(prefix) else 0


@dataclass(frozen=True)
class _ContentEnd:
    """Where a message's content ends in the rendered text."""

    offset: int
    """End of the content's last word."""
    space: str
    """The content's white space after that, which some templates keep and others drop."""

    def after(self, text: str, delimiter: str) -> int | None:
        """Return the offset after ``delimiter``, or None if it does not follow the content."""
        for follows in (self.space + delimiter, delimiter):
            if text.startswith(follows, self.offset):
                return self.offset + len(follows)
        return None

    def delimiter(self, text: str, stop: int) -> str:
        """Return what the template puts between the content and ``stop``."""
        return text[self.offset : stop].removeprefix(self.space)


def _locate_turns(text_of: TextOf, messages: list[Message], turns: Sequence[int], text: str) -> list[Span]:
    """Return the span of each turn.

    To render the conversation up to each turn would take quadratic time. So this happens for the first turn
    after each role, which shows the delimiters around a turn, and for the last turn, which templates treat
    differently. The other turns are where the contents end and the same delimiters follow.
    """
    ends = _content_ends(text_of, messages, text) if len(turns) > 2 else {}
    delimiters: dict[str, tuple[str, str]] = {}  # before and after a turn, by the role of the message before
    spans = []
    for turn in turns:
        role, previous, content = messages[turn - 1]["role"], ends.get(turn - 1), ends.get(turn)
        span = None
        if previous and content and role in delimiters and turn != turns[-1]:
            before, after = delimiters[role]
            start, end = previous.after(text, before), content.after(text, after)
            if start is not None and end is not None and start <= content.offset:
                span = start, end
        if span is None:
            span = start, end = _locate_turn(text_of, messages, turn, text)
            if previous and content and previous.offset <= start and content.offset <= end:
                delimiters[role] = previous.delimiter(text, start), content.delimiter(text, end)
        spans.append(span)
    return spans


def _content_ends(text_of: TextOf, messages: list[Message], text: str) -> dict[int, _ContentEnd]:
    """Return the ends of the contents by message index; none where the template alters the contents."""
    from jinja2 import TemplateError

    marked, spaces = [], {}
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and (words := content.rstrip()):
            spaces[index] = content[len(words) :]
            message = message | {"content": words + _MARK + spaces[index]}
        marked.append(message)
    try:
        parts = text_of(marked).split(_MARK)
    except TemplateError:
        return {}
    if "".join(parts) != text or len(parts) != len(spaces) + 1:
        return {}
    offsets = accumulate(map(len, parts[:-1]))
    return {index: _ContentEnd(offset, spaces[index]) for index, offset in zip(spaces, offsets, strict=True)}


def _locate_turn(text_of: TextOf, messages: list[Message], turn: int, text: str) -> Span:
    """Return the span of ``messages[turn]``, its end-of-turn token included, from renderings up to it.

    Templates of reasoning models add more to the generation prompt and to the last turn than they keep in
    earlier turns. So the turn begins where the prompt and the text diverge, and ends after the longest
    ending of the turn, rendered as the last turn, that the text has from there.
    """
    prompt = text_of(messages[:turn], prompt=True)
    through = text if turn + 1 == len(messages) else text_of(messages[: turn + 1])
    start = min(_common_prefix(prompt, text), _common_prefix(through, text))
    ending = through[start:]
    if not text.startswith(ending, start):
        rest = text[start : start + len(ending)]
        sizes = (match.end() for match in re.finditer(re.escape(ending[-1:]), rest))
        ending = rest[: max((size for size in sizes if ending.endswith(rest[:size])), default=0)]
    content = messages[turn].get("content")
    last_word = content.split()[-1:] if isinstance(content, str) else []
    is_earlier = start < len(prompt) and (turn == 0 or start < len(text_of(messages[:turn])))
    if is_earlier or not ending.strip() or any(word not in ending for word in last_word):
        raise TemplateMismatchError(
            f"message {turn + 1}: the chat template renders it differently once others follow, so the "
            "assistant's tokens cannot be located; add {% generation %} marks to the template"
        )
    return start, start + len(ending)


def _common_prefix(first: str, second: str) -> int:
    """Return how many characters both begin with, by bisection: comparing in C is faster than a loop."""
    if second.startswith(first):
        return len(first)
    return bisect_left(range(1, len(first) + 1), True, key=lambda size: not second.startswith(first[:size]))


def dropped(field: DroppableField) -> str:
    """Return the reason to skip a conversation that would lose a field."""
    if field == "content":
        return "with an empty answer (content), whose end alone would carry loss"
    return f"with {field} that the chat template drops"


def dropped_fields(messages: list[Message], tools: Any, text: str) -> Iterator[DroppableField]:
    """Yield the fields of a conversation that the rendered text lacks.

    Templates of reasoning models keep the reasoning of the last turn alone.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    texts = [answer for answer in answers if isinstance(answer.get("content"), str | None)]
    calls = [call for message in answers for call in message.get("tool_calls") or []]
    if any(name not in text for name in _function_names(tools)):
        yield "tools"
    loses_calls = any(name not in text for name in _function_names(calls))
    if loses_calls:
        yield "tool_calls"
    reasoning = answers[-1].get("reasoning_content") if answers else None
    if isinstance(reasoning, str) and reasoning.strip() not in text:
        yield "reasoning_content"
    empty = [answer for answer in texts if not (answer.get("content") or "").strip()]
    if any(loses_calls or not answer.get("tool_calls") for answer in empty):
        yield "content"


def _function_names(functions: Any) -> list[str]:
    """Return the names of tools or tool calls, which have them at the top or under ``function``."""
    outer = [function for function in functions or [] if isinstance(function, dict)]
    inner = (function.get("function", function) for function in outer)
    return [str(function["name"]) for function in inner if isinstance(function, dict) and "name" in function]
