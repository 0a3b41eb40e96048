"""A tokenizer is identified by all that decides the tokens of a text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.builds import write_config, write_corpus

from ddk_build.build import build_cache
from ddk_build.config import BuildConfig, TeacherConfig
from ddk_build.teacher.tokenizer import load_tokenizer, tokenizer_digest, vocabulary
from ddk_cache.errors import ConfigError


def cut_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = content["model"]["merges"][:20]


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def change_pre_tokenizer(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def strip_added_token(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["lstrip"] = True


def add_truncation(content: dict[str, Any]) -> None:
    content["truncation"] = {
        "direction": "Right",
        "max_length": 9,
        "strategy": "LongestFirst",
        "stride": 0,
    }


CHANGES = [cut_merges, lowercase, change_pre_tokenizer, strip_added_token]


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def teacher(tmp_path: Path, teacher_folder: Path) -> Path:
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def digest(folder: Path, *, chats: bool = False) -> str:
    return tokenizer_digest(load_tokenizer(TeacherConfig(model=str(folder))), chats=chats)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_how_texts_are_cut_is_seen(
    teacher: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    before = load_tokenizer(TeacherConfig(model=str(teacher)))
    edit(teacher, change)
    after = load_tokenizer(TeacherConfig(model=str(teacher)))
    assert vocabulary(before).fingerprint() == vocabulary(after).fingerprint()
    assert tokenizer_digest(before) != tokenizer_digest(after)


def test_what_decides_no_token_does_not_count(teacher: Path) -> None:
    before = digest(teacher)
    edit(teacher, add_truncation)
    assert digest(teacher) == before


def test_the_chat_template_counts_for_chats_alone(teacher: Path) -> None:
    tokenizer = load_tokenizer(TeacherConfig(model=str(teacher)))
    before = [tokenizer_digest(tokenizer, chats=chats) for chats in (False, True)]
    tokenizer.chat_template = "{{ messages }}"
    after = [tokenizer_digest(tokenizer, chats=chats) for chats in (False, True)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_cache_is_not_extended_with_another_tokenizer(tmp_path: Path, teacher: Path) -> None:
    path = write_config(tmp_path / "build.yaml", teacher, write_corpus(tmp_path))
    build_cache(BuildConfig.from_yaml(path), tokens_only=True)
    build_cache(BuildConfig.from_yaml(path), tokens_only=True)
    edit(teacher, cut_merges)
    with pytest.raises(
        ConfigError, match=r"another configuration: domains\.code\.tokenizer: '[0-9a-f]{64}' -> "
    ):
        build_cache(BuildConfig.from_yaml(path), tokens_only=True)
