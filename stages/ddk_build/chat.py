"""A conversation through the chat template: its text, and which part of it the assistant wrote."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\ue000"  # of the private use area; put behind the messages' contents to find them again


class TemplateMismatchError(Exception):
    """The template renders a turn differently once others follow, so it cannot be found in the whole."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template has it; all places are in characters."""

    text: str
    spans: Sequence[Span] = ()
    """The assistant's turns, each with its end-of-turn token and without what stands behind that."""
    questions: Sequence[int] = ()
    """Where the user speaks after the assistant: a piece of a long conversation may begin there."""
    head: int = 0
    """The system message's end, which stands before every piece."""


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    tools: list[Any] | None,
    endings: tuple[str, ...],
) -> Rendered:
    """Render a conversation; in time linear in its length, but for turns without a text of their own.

    ``endings`` are the tokens that can end a turn. The spans come from the template where it marks them with
    ``{% generation %}``; otherwise from comparing the text with what the template makes of the conversation
    up to a turn of the assistant.

    Raises
    ------
    jinja2.TemplateError
        The template refuses the conversation.
    TemplateMismatchError
        The template marks nothing, and the turns cannot be found.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=tools)
    special: dict[str, Any] = tokenizer.special_tokens_map

    def rendered(messages: list[Message], **options: bool) -> Any:
        given = special | options
        return render_jinja_template([messages], tools=tools, chat_template=template, **given)

    def text_of(messages: list[Message], prompt: bool = False) -> str:
        [text], _ = rendered(messages, add_generation_prompt=prompt)
        return str(text)

    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if _GENERATION.search(template):
        [text], [spans] = rendered(messages, return_assistant_tokens_mask=True)
    else:
        text = text_of(messages)
        spans = _spans(text_of, messages, turns, text)
    questions = []
    if len(spans) == len(turns):
        for (_, end), turn in zip(spans, turns, strict=True):
            if turn + 1 < len(messages) and messages[turn + 1]["role"] == "user":
                questions.append(
                    len(text) - len(text[end:].lstrip()) if text[end : end + 1].isspace() else end
                )
    return Rendered(
        text,
        [(start, _without_newline(text, start, end, endings)) for start, end in spans],
        questions,
        _head(text_of, messages, text),
    )


def _without_newline(text: str, start: int, end: int, endings: tuple[str, ...]) -> int:
    """The turn's end without the white space that a template puts behind its end-of-turn token."""
    said = text[start:end].rstrip()
    return start + len(said) if said.endswith(endings) else end


def _head(text_of: Callable[..., str], messages: list[Message], whole: str) -> int:
    from jinja2 import TemplateError

    count = next((at for at, message in enumerate(messages) if message["role"] != "system"), 0)
    if not count:
        return 0
    try:
        head = text_of(messages[:count])
    except TemplateError:  # some want a user's message
        return 0
    return len(head) if whole.startswith(head) else 0


def _spans(
    text_of: Callable[..., str], messages: list[Message], turns: Sequence[int], whole: str
) -> list[Span]:
    """Where each turn stands in ``whole``.

    What a template puts around a turn is found with ``_find`` once for each role that comes before it, and
    then looked for behind the contents that ``_ends`` finds: so a conversation is not rendered once more for
    each of its turns. The last turn, which templates treat differently, ends with the text; where it begins
    is left to ``_find`` if the generation prompt is not just what they put before a turn.
    """
    ends = _ends(text_of, messages, whole) if len(turns) > 1 else {}
    around: dict[str, _Around] = {}  # by the role before
    spans: list[Span] = []
    for turn in turns:
        role = messages[turn - 1]["role"]
        known = turn > 0 and turn - 1 in ends and turn in ends
        last = turn + 1 == len(messages)
        if known and role in around and (around[role].prompted if last else turn != turns[-1]):
            begin = _past(whole, ends[turn - 1], _white(messages[turn - 1]), around[role].before)
            white, behind = _white(messages[turn]), around[role].behind
            close = len(whole) if last else _past(whole, ends[turn], white, behind)
            if begin is not None and close is not None and begin <= ends[turn] <= close:
                spans.append((begin, close))
                continue
        (start, end), prompted = _find(text_of, messages, turn, whole)
        spans.append((start, end))
        if known and ends[turn - 1] <= start and ends[turn] <= end:
            around[role] = _Around(
                whole[ends[turn - 1] : start].removeprefix(_white(messages[turn - 1])),
                whole[ends[turn] : end].removeprefix(_white(messages[turn])),
                prompted,
            )
    return spans


@dataclass(frozen=True)
class _Around:
    """What a template puts around a turn; white space of the texts themselves left out."""

    before: str
    """From the text before to the turn."""
    behind: str
    """Behind the turn's own text, its end-of-turn token included."""
    prompted: bool
    """The generation prompt ends where the turn begins."""


def _past(whole: str, place: int, white: str, behind: str) -> int | None:
    """Where ``behind`` ends, if it stands at ``place``, or after the white space that the text ends with:
    some templates keep that, others do not."""
    found = (part for part in (white + behind, behind) if whole.startswith(part, place))
    part = next(found, None)
    return None if part is None else place + len(part)


def _white(message: Message) -> str:
    """The white space that a message's text ends with."""
    content = message.get("content")
    return content[len(content.rstrip()) :] if isinstance(content, str) else ""


def _ends(text_of: Callable[..., str], messages: list[Message], whole: str) -> dict[int, int]:
    """Where the messages' contents end in ``whole``, by message; nothing where the template alters them."""
    from jinja2 import TemplateError

    marked, numbers = [], []
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            said = content.rstrip()
            message = message | {"content": said + _MARK + content[len(said) :]}
            numbers.append(number)
        marked.append(message)
    if _MARK in whole:
        return {}
    try:
        parts = text_of(marked).split(_MARK)
    except TemplateError:
        return {}
    if "".join(parts) != whole or len(parts) != len(numbers) + 1:
        return {}
    found, end = {}, 0
    for number, part in zip(numbers, parts, strict=False):
        end += len(part)
        found[number] = end
    return found


def _find(text_of: Callable[..., str], messages: list[Message], turn: int, whole: str) -> tuple[Span, bool]:
    """Where ``messages[turn]``, its end-of-turn token included, stands in ``whole``; and whether it begins
    where the generation prompt ends.

    Templates of reasoning models put more behind the generation prompt, and into the last turn, than they
    leave in earlier turns; so the turn begins where prompt and whole part, and of the turn as it is rendered
    last the longest ending that the whole has there is taken.
    """
    before = text_of(messages[:turn])
    through = whole if turn + 1 == len(messages) else text_of(messages[: turn + 1])
    prompt = text_of(messages[:turn], prompt=True)
    start = min(_shared(prompt, whole), _shared(through, whole))
    ending = through[start:]
    if not whole.startswith(ending, start):
        ending = ending[len(ending) - _overlap(ending, whole[start:]) :]
    content = messages[turn].get("content")
    last_word = content.split()[-1:] if isinstance(content, str) else []
    # Some templates put a system prompt of their own before the first turn, and before no turn nothing.
    preceded = len(before) if turn else len(prompt)
    if start < preceded or not ending.strip() or any(word not in ending for word in last_word):
        raise TemplateMismatchError(
            f"the chat template renders message {turn + 1} differently once others follow, "
            "so the assistant's tokens cannot be told; give it {% generation %} marks"
        )
    return (start, start + len(ending)), start == len(prompt)


def _shared(one: str, other: str) -> int:
    """How many characters both begin with. By bisection: a comparison in C costs less than a loop here."""
    return bisect_left(range(1, len(one) + 1), True, key=lambda size: not other.startswith(one[:size]))


def _overlap(one: str, other: str) -> int:
    """How many characters ``one`` ends and ``other`` begins with (Knuth, Morris, Pratt: linear)."""
    other = other[: len(one)]
    back = [0] * len(other)  # how much of the beginning of ``other`` a part of it ends with
    matched = 0
    for at in range(1, len(other)):
        while matched and other[at] != other[matched]:
            matched = back[matched - 1]
        matched += other[at] == other[matched]
        back[at] = matched
    matched = 0
    for letter in one:
        if matched == len(other):
            matched = back[matched - 1]
        while matched and letter != other[matched]:
            matched = back[matched - 1]
        matched += letter == other[matched] if other else 0
    return matched
