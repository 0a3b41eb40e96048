"""Conversations: the chat template's text, and a mask of the assistant's tokens alone."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.documents import read_documents, split_documents, write_rows
from transformers import PreTrainedTokenizerBase

from ddk_build.config import BuildConfig, DroppableField
from ddk_build.data import chat, reasons
from ddk_build.data.documents import Document, IngestStatistics
from ddk_build.data.packing.holdout import SplitSettings
from ddk_build.data.packing.packer import to_arrays
from ddk_build.plan.dry_run import dry_run
from ddk_cache.errors import ConfigError

pytestmark = pytest.mark.usefixtures("datasets_cache")

# As reasoning models have it: earlier turns lose their reasoning; the last gets an empty one if it has none.
REASONING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% set said = message.content.split('</think>')[-1].lstrip() %}\
{% if loop.last and '</think>' in message.content %}{{ message.content }}\
{% elif loop.last %}<think>

</think>

{{ said }}{% else %}{{ said }}{% endif %}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""

# Likewise, and the generation prompt is no more than what stands before every turn.
PLAIN_PROMPT = REASONING.replace("assistant\n<think>\n{% endif %}", "assistant\n{% endif %}")

# As some do: the system's message goes into the last turn of the user, wherever that is.
MOVING = """{% set system = messages[0].content if messages and messages[0].role == 'system' else '' %}\
{% for message in messages if message.role != 'system' %}{% if message.role == 'user' %}[INST] \
{% if system and loop.index0 >= loop.length - 2 %}{{ system }} {% endif %}{{ message.content }} [/INST]\
{% else %} {{ message.content }}<eos>{% endif %}{% endfor %}"""

ALTERNATING = """{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ message.role }}
{{ message.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

WITH_TOOLS = """{% if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}\
{% if 'tool_calls' in message %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


OWN_SYSTEM = """{% if messages and messages[0].role != 'system' %}<|im_start|>system
Be the fox<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return said if system is None else [{"role": "system", "content": system}, *said]


LONG = turns("The quick fox?", "jumps over", "the dog?", "Yes: the lazy dog.", system="Be brief")


def read(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    rows: list[Any],
    statistics: IngestStatistics | None = None,
    suffix: str = "jsonl",
) -> list[Document]:
    """Documents of conversations; one more comes last, so that there are two to split."""
    path = folder / f"chat.{suffix}"
    rows = [*rows, {"messages": turns("of", "the")}]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_rows(path, rows)
    return read_documents(tokenizer, statistics, path=str(path), messages_column="messages")


def masked(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[str]:
    """Return the spans of tokens that carry loss."""
    runs: list[list[int]] = []
    before = False
    for token, counts in zip(document.tokens.tolist(), document.carries_loss.tolist(), strict=True):
        if counts:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = counts
    return [str(tokenizer.decode(run)) for run in runs]


def test_the_template_s_own_marks_are_used(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    document = read(tokenizer, tmp_path, [{"messages": LONG}])[0]
    expected: Any = tokenizer.apply_chat_template(LONG, return_assistant_tokens_mask=True)
    assert document.tokens.tolist() == expected["input_ids"]
    assert document.carries_loss.tolist() == [bool(one) for one in expected["assistant_masks"]]
    assert masked(tokenizer, document) == ["jumps over<|im_end|>", "Yes: the lazy dog.<|im_end|>"]


def test_turns_are_located_without_marks(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    marked = read(tokenizer, tmp_path, [{"messages": LONG}])[0]
    for mark in ("{% generation %}", "{% endgeneration %}"):
        tokenizer.chat_template = tokenizer.chat_template.replace(mark, "")
    document = read(tokenizer, tmp_path, [{"messages": LONG}])[0]
    assert document.tokens.tolist() == marked.tokens.tolist()
    assert document.carries_loss.tolist() == marked.carries_loss.tolist()


def test_reasoning_that_the_template_drops_from_earlier_turns(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = REASONING
    thought = "<think>\nfoxes jump\n</think>\n\n"
    some = [turns("q", f"{thought}jumps", "r", "over"), turns("q", "jumps", "r", f"{thought}over")]
    one, other, _ = read(tokenizer, tmp_path, [{"messages": messages} for messages in some])
    assert masked(tokenizer, one) == ["jumps<|im_end|>", "\n</think>\n\nover<|im_end|>"]
    assert masked(tokenizer, other) == ["jumps<|im_end|>", "foxes jump\n</think>\n\nover<|im_end|>"]


def test_a_template_in_which_the_turns_move_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = MOVING
    assert masked(tokenizer, read(tokenizer, tmp_path, [{"messages": LONG[1:]}])[0]) == [
        " jumps over<eos>",
        " Yes: the lazy dog.<eos>",
    ]
    with pytest.raises(
        ConfigError, match=r"^domains\.code: row 1: message 3: the chat template renders it dif"
    ):
        read(tokenizer, tmp_path, [{"messages": turns("a", "b")}, {"messages": LONG}])


def test_a_conversation_that_the_template_refuses_is_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = ALTERNATING
    statistics = IngestStatistics()
    rows = [{"messages": LONG}, {"messages": LONG[1:]}]
    assert len(read(tokenizer, tmp_path, rows, statistics)) == 2
    assert statistics.skipped == {"refused by the chat template": 1}


def test_a_conversation_that_the_template_cannot_render_is_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template += "{% for key, value in messages[0].content.split() | batch(2) %}{% endfor %}"
    statistics = IngestStatistics()
    rows = [{"messages": turns(question, "the fox")} for question in ("quick fox", "quick brown fox", "a b")]
    write_rows(tmp_path / "chat.jsonl", rows)
    keys = {"path": str(tmp_path / "chat.jsonl"), "messages_column": "messages"}
    assert len(read_documents(tokenizer, statistics, **keys)) == 2
    assert statistics.skipped == {reasons.REFUSED: 1}
    assert statistics.examples == {reasons.REFUSED: "row 1: not enough values to unpack (expected 2, got 1)"}


def test_a_conversation_that_begins_with_the_assistant(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    statistics = IngestStatistics()
    rows = [{"messages": LONG}, {"messages": turns("a", "hello", "b", "the fox")[1:]}]
    assert len(read(tokenizer, tmp_path, rows)) == 3
    tokenizer.chat_template = OWN_SYSTEM
    documents = read(tokenizer, tmp_path, rows, statistics)
    assert [masked(tokenizer, document)[-1] for document in documents] == [
        "Yes: the lazy dog.<|im_end|>",
        "the<|im_end|>",
    ]
    assert statistics.skipped == {"begins with the assistant, which the chat template does not support": 1}


def test_odd_conversations_are_counted_by_reason(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    statistics = IngestStatistics()
    odd = [None, [], "hello", ["hello"], [{"content": "a"}], [{"role": None, "content": "a"}], turns("a")]
    odd.append([*turns("a"), {"role": "assistant", "text": "what it says is under another key"}])
    odd.append([*turns("a"), {"role": "assistant", "content": None}])
    rows = [*({"messages": messages} for messages in odd), {"messages": LONG, "tools": "{"}]
    rows.append({"messages": LONG, "tools": '"all"'})
    documents = read(tokenizer, tmp_path, [*rows, {"messages": LONG}], statistics)
    assert len(documents) == 2
    assert statistics.skipped == {
        "null": 1,
        "empty": 1,
        "not a list of messages with roles": 4,
        "a message with neither content nor tool_calls": 2,
        "no token that carries loss": 1,
        "tools are not a list": 2,
    }


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tools_and_calls_reach_the_template_as_they_were(
    suffix: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """In Arrow all messages have the same keys; those that are null were not there."""
    tokenizer.chat_template = WITH_TOOLS
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}]
    calls = [{"name": "add", "arguments": {"a": 1}}]
    other_calls = [{"name": "mul", "arguments": {"b": 2}}]
    asked = {"role": "user", "content": "sum?"}
    answer = {"role": "assistant", "content": "two"}
    rows: list[dict[str, Any]] = [
        {
            "messages": [asked, {"role": "assistant", "content": None, "tool_calls": some}, answer],
            "tools": given,
        }
        for some, given in ((calls, tools), (other_calls, tools), (calls, None), (calls, []))
    ]
    if suffix == "jsonl":
        rows[1]["tools"] = json.dumps(tools)
    documents = read(tokenizer, tmp_path, rows, suffix=suffix)
    for row, document in zip(rows, documents, strict=False):
        given = json.loads(row["tools"]) if isinstance(row["tools"], str) else row["tools"]
        text = tokenizer.apply_chat_template(row["messages"], tools=given or None, tokenize=False)
        assert tokenizer.decode(document.tokens) == text
        called = json.dumps(row["messages"][1]["tool_calls"])
        assert masked(tokenizer, document) == [f"{called}<|im_end|>", "two<|im_end|>"]
    assert documents[0].digest != documents[2].digest == documents[3].digest


def test_the_mask_reaches_the_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The label at t is the token at t+1, so the last token of the prompt has the first label."""
    documents = read(tokenizer, tmp_path, [{"messages": LONG}])
    split = split_documents(documents, SplitSettings(128, 1), IngestStatistics())
    rows = to_arrays([row for _, row in split], 128)
    labels = [
        tokenizer.decode(tokens[1:][mask[:-1]])
        for tokens, mask in zip(rows["tokens"], rows["loss_mask"], strict=True)
    ]
    assert labels == ["jumps over<|im_end|>Yes: the lazy dog.<|im_end|>", "the<|im_end|>"]


def test_a_tokenizer_without_a_template_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"domains\.code\.messages_column: .* has no chat template"):
        read(tokenizer, tmp_path, [{"messages": LONG}])


SAID = (
    "The quick fox?",
    "jumps over",
    "the dog?\n",
    "Yes: the lazy dog.\n\n",
    " a",
    "<think>\nb\n</think>\nc",
)


@pytest.mark.parametrize("template", [REASONING, PLAIN_PROMPT, MOVING, ALTERNATING, WITH_TOOLS, OWN_SYSTEM])
def test_turns_are_located_as_if_each_were_rendered(
    template: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = template
    some = [
        turns(*(SAID[(at * at + first) % len(SAID)] for at in range(9)))[:size]
        for first in range(6)
        for size in range(2, 10)
    ]
    located = [chat.render(tokenizer, messages, None, ("<|im_end|>", "<eos>")) for messages in some]
    monkeypatch.setattr(chat, "_content_ends", lambda *_: {})
    assert located == [chat.render(tokenizer, messages, None, ("<|im_end|>", "<eos>")) for messages in some]
    assert all(rendered.spans for rendered in located)


@pytest.mark.parametrize("template", [OWN_SYSTEM, PLAIN_PROMPT, REASONING])
def test_a_conversation_is_not_rendered_for_each_of_its_turns(
    template: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where contents end with white space, as half of all do, and the template keeps it."""
    from transformers.utils import chat_template_utils

    tokenizer.chat_template = template
    counts: list[int] = []
    original = chat_template_utils.render_jinja_template

    def render(*arguments: Any, **options: Any) -> Any:
        counts[-1] += 1
        return original(*arguments, **options)

    monkeypatch.setattr(chat_template_utils, "render_jinja_template", render)
    for times in (4, 16):
        counts.append(0)
        chat.render(tokenizer, turns(*SAID[:4] * times), None, ("<|im_end|>",))
    assert counts[0] == counts[1]


PAIRS = [{"q": "Which fox?", "a": "The brown one."}, {"q": "Who watches? ", "a": "The teacher."}]


@pytest.mark.parametrize("prompt_format", [None, "chat"])
def test_pairs_of_texts_are_turns_of_the_chat_template(
    prompt_format: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    columns = {"prompt_column": "q", "completion_column": "a", "prompt_format": prompt_format}
    for row, document in zip(PAIRS, read_documents(tokenizer, path=path, **columns), strict=True):
        messages = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
        assert tokenizer.decode(document.tokens) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(document.tokens[document.carries_loss]) == row["a"] + "<|im_end|>"


@pytest.mark.parametrize("has_template", [False, True])
def test_plain_pairs_are_joined_with_a_line_break(
    has_template: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    columns = {"prompt_column": "q", "completion_column": "a"}
    if has_template:
        columns["prompt_format"] = "plain"
    else:
        tokenizer.chat_template = None
    first, second = read_documents(tokenizer, path=path, **columns)
    assert tokenizer.decode(first.tokens) == "Which fox?\nThe brown one.<eos>"
    assert tokenizer.decode(first.tokens[first.carries_loss]) == "The brown one.<eos>"
    assert tokenizer.decode(second.tokens) == "Who watches? The teacher.<eos>"


def test_an_answer_in_the_prompt_never_carries_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Also with a template that marks the answers and not the calls."""
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{% if message.tool_calls %}find_fox<|im_end|>"
        "{% elif message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    prompt = [QUESTION, ANSWER, QUESTION]
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    completions = ([call, ANSWER], [ANSWER | {"content": "red"}], [ANSWER | {"content": "grey"}])
    path = write_rows(tmp_path / "pairs.jsonl", [{"q": prompt, "a": answer} for answer in completions])
    statistics = IngestStatistics()
    documents = read_documents(tokenizer, statistics, path=path, prompt_column="q", completion_column="a")
    assert [masked(tokenizer, document) for document in documents] == [["red<|im_end|>"], ["grey<|im_end|>"]]
    assert statistics.skipped == {reasons.UNMARKED: 1}


def test_chat_format_needs_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(ConfigError, match=r"^domains\.code\.prompt_format: .* has no chat template"):
        read_documents(tokenizer, path=path, prompt_column="q", completion_column="a", prompt_format="chat")


QUESTION = {"role": "user", "content": "Which fox?"}
ANSWER = {"role": "assistant", "content": "The brown one."}
CALL = {"type": "function", "function": {"name": "find_fox", "arguments": "{}"}}
LOST: dict[DroppableField, dict[str, Any]] = {
    "tools": {"messages": [QUESTION, ANSWER], "tools": json.dumps([CALL])},
    "tool_calls": {"messages": [QUESTION, ANSWER | {"tool_calls": [CALL]}]},
    "reasoning_content": {"messages": [QUESTION, ANSWER | {"reasoning_content": "It is brown."}]},
    "content": {"messages": [QUESTION, ANSWER | {"content": " "}]},
}


@pytest.mark.parametrize("field", LOST)
@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_row_that_loses_a_field_is_skipped_unless_allowed(
    field: DroppableField, is_allowed: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = [{"messages": [QUESTION | {"content": f"Fox {n}?"}, ANSWER]} for n in range(2)]
    path = write_rows(tmp_path / "chats.jsonl", [*whole, LOST[field]])
    statistics = IngestStatistics()
    allowed = {"allow_dropped": [field]} if is_allowed else {}
    documents = read_documents(tokenizer, statistics, path=path, messages_column="messages", **allowed)
    assert len(documents) == (3 if is_allowed else 2)
    assert statistics.skipped == ({} if is_allowed else {chat.dropped(field): 1})
    assert statistics.examples == ({} if is_allowed else {chat.dropped(field): "row 2"})


def test_a_template_that_renders_the_fields_loses_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = (
        "{{ tools | tojson if tools }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% generation %}{{ message.reasoning_content }}{{ message.content }}"
        "{{ message.tool_calls | tojson if message.tool_calls }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    rows = [row for field, row in LOST.items() if field != "content"]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    statistics = IngestStatistics()
    assert len(read_documents(tokenizer, statistics, path=path, messages_column="messages")) == 3
    assert not statistics.skipped


def test_a_call_that_is_dropped_leaves_an_empty_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    call = {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    whole = [{"messages": [QUESTION | {"content": f"Fox {n}?"}, ANSWER]} for n in range(2)]
    path = write_rows(tmp_path / "chats.jsonl", [*whole, call])
    statistics = IngestStatistics()
    keys = {"path": path, "messages_column": "messages", "allow_dropped": ["tool_calls"]}
    assert len(read_documents(tokenizer, statistics, **keys)) == 2
    assert statistics.skipped == {chat.dropped("content"): 1}


@pytest.mark.parametrize("is_marked", [False, True])
def test_no_content_is_not_written_as_none(
    is_marked: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = "{{ message.content }}{{ message.tool_calls | tojson if message.tool_calls }}<|im_end|>"
    marked = f"{{% generation %}}{answer}{{% endgeneration %}}"
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        f"{marked if is_marked else answer}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    calls = [
        [QUESTION | {"content": f"Fox {n}?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
        for n in range(2)
    ]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": call} for call in calls])
    [first, _] = read_documents(tokenizer, path=path, messages_column="messages")
    assert str(tokenizer.decode(first.tokens[first.carries_loss])).startswith('[{"')


def test_all_rows_lost_say_which_key_keeps_them(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [LOST["tools"]] * 3)
    with pytest.raises(ConfigError, match=r"3 with tools that .* drops, first row 0\); use .*: \[tools\]"):
        read_documents(tokenizer, path=path, messages_column="messages")


def test_the_first_refusal_says_why(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}"
        + tokenizer.chat_template
    )
    good, bad = ({"messages": [QUESTION | {"content": text}, ANSWER]} for text in ("good", "bad"))
    path = write_rows(tmp_path / "chats.jsonl", [good, bad, bad, {"messages": [QUESTION, ANSWER]}])
    statistics = IngestStatistics()
    with caplog.at_level("INFO", "ddk_build"):
        read_documents(tokenizer, statistics, path=path, messages_column="messages")
    assert statistics.skipped == {reasons.REFUSED: 2}
    assert [record.getMessage() for record in caplog.records] == [
        "domains.code: skipping rows: refused by the chat template; the first is row 1: roles must alternate"
    ]


def test_a_dry_run_counts_the_rows_that_are_skipped(tmp_path: Path, teacher_folder: Path) -> None:
    messages = [{"messages": [QUESTION | {"content": f"Fox {n}?"}, ANSWER]} for n in range(2)]
    path = write_rows(tmp_path / "chats.jsonl", [*messages, LOST["tools"], LOST["tools"]])
    config = {
        "teacher": {"model": str(teacher_folder), "engine": "transformers"},
        "cache": str(tmp_path / "cache"),
        "seq_length": 64,
        "domains": {"chat": {"path": str(path), "messages_column": "messages"}},
    }
    said = dry_run(BuildConfig.model_validate(config), is_here=True)
    assert f"# chat: of the first 4 rows, these are skipped: 2 {chat.dropped('tools')}, first row 2\n" in said
