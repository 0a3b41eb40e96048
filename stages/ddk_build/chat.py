"""A conversation through the chat template: its text, and which part of it the assistant wrote."""

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateMismatchError(Exception):
    """The template renders a turn differently once others follow, so it cannot be found in the whole."""


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: list[Any] | None
) -> tuple[str, list[Span]]:
    """Render a conversation; returns its text and the assistant's spans in it, in characters.

    The spans come from the template where it marks them with ``{% generation %}``; otherwise from comparing
    the text with what the template makes of the conversation up to each turn of the assistant.

    Raises
    ------
    jinja2.TemplateError
        The template refuses the conversation.
    TemplateMismatchError
        The template marks nothing, and the turns cannot be found.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=tools)

    def rendered(messages: list[Message], **options: bool) -> Any:
        given: dict[str, Any] = {**tokenizer.special_tokens_map, **options}
        return render_jinja_template([messages], tools=tools, chat_template=template, **given)

    if _GENERATION.search(template):
        [text], [spans] = rendered(messages, return_assistant_tokens_mask=True)
        return text, spans

    def prefix(turns: int, prompt: bool = False) -> str:
        [text], _ = rendered(messages[:turns], add_generation_prompt=prompt)
        return str(text)

    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    whole = prefix(len(messages))
    return whole, [_find(prefix, messages, turn, whole) for turn in turns]


def _find(prefix: Callable[..., str], messages: list[Message], turn: int, whole: str) -> Span:
    """Where ``messages[turn]``, its end-of-turn token included, stands in ``whole``.

    Templates of reasoning models put more behind the generation prompt, and into the last turn, than they
    leave in earlier turns; so the turn begins where prompt and whole part, and of the turn as it is rendered
    last the longest ending that the whole has there is taken.
    """
    before, prompt, through = prefix(turn), prefix(turn, prompt=True), prefix(turn + 1)
    start = min(_shared(prompt, whole), _shared(through, whole))
    ending = through[start:]
    while not whole.startswith(ending, start):
        ending = ending[1:]
    content = messages[turn].get("content")
    last_word = content.split()[-1:] if isinstance(content, str) else []
    # Some templates put a system prompt of their own before the first turn, and before no turn nothing.
    preceded = len(before) if turn else len(prompt)
    if start < preceded or not ending.strip() or any(word not in ending for word in last_word):
        raise TemplateMismatchError(
            f"the chat template renders message {turn + 1} differently once others follow, "
            "so the assistant's tokens cannot be told; give it {% generation %} marks"
        )
    return start, start + len(ending)


def _shared(one: str, other: str) -> int:
    """How many characters both begin with. By bisection: a comparison in C costs less than a loop here."""
    return bisect_left(range(1, len(one) + 1), True, key=lambda size: not other.startswith(one[:size]))
