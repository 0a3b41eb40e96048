"""Rows of a configuration are shown as a build will tokenise them, without an engine."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.models import make_tokenizer

from ddk_build.preview import preview
from ddk_cache.cli import show
from ddk_cache.cli.commands import show as command
from ddk_cache.errors import ConfigError

CHATS = [
    [{"role": "user", "content": f"Add 1 and {n}."}, {"role": "assistant", "content": f"It is {n + 1}."}]
    for n in (2, 3)
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a configuration of a chat and a text; its teacher has no weights."""
    make_tokenizer(tmp_path / "teacher")
    rows: dict[str, list[Any]] = {
        "chat": [{"messages": messages} for messages in CHATS],
        "text": [{"text": "The quick brown fox. " * 30}, {"text": "The end."}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = {
        "teacher": {"model": str(tmp_path / "teacher"), "engine": "transformers"},
        "cache": str(tmp_path / "cache"),
        "seq_length": 64,
        "domains": {
            "chat": {"path": str(tmp_path / "chat.jsonl"), "messages_column": "messages"},
            "text": {"path": str(tmp_path / "text.jsonl")},
        },
    }
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_only_the_answer_of_a_chat_carries_loss(config: Path) -> None:
    (shown,) = (show.Shown(*parts) for parts in preview(str(config), "chat", 0))
    document = show.documents(shown)[0]
    assert "".join(token.text for token in document if token.has_loss) == "It is 3.<|im_end|>"
    assert "Add 1 and 2." in "".join(token.text for token in document)
    assert not list((config.parent).glob("cache*"))


def test_a_long_text_continues_in_the_next_row(config: Path) -> None:
    rows = [next(preview(str(config), "text", row))[1] for row in (0, 1)]
    assert rows[0].segments.all()
    context = next(position for position, loss in enumerate(rows[1].loss_mask[0]) if loss)
    assert context == 64 // 8 - 1  # the default overlap
    assert (rows[1].tokens[0][: context + 1] == rows[0].tokens[0][-context - 1 :]).all()


def test_the_command_shows_every_domain(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("build", "ddk_build.preview:preview", "ddk_cache.previews")
    monkeypatch.setattr(show, "entry_points", lambda group: [point])
    output = CliRunner().invoke(command, [str(config)], catch_exceptions=False).output
    assert "chat, row 0 as it will be tokenised" in output
    assert "text, row 0 as it will be tokenised" in output
    assert "⟦It is 3.<|im_end|>⟧" in output


def test_a_mistake_names_the_key(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"--domain law: .* has chat, text"):
        list(preview(str(config), "law", 0))
    with pytest.raises(ConfigError, match="--row 9: chat has fewer rows"):
        list(preview(str(config), "chat", 9))
