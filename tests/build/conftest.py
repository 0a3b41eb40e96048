"""Fixtures of stage one's tests: a small tokenizer, and a cache of ``datasets`` for each test."""

from pathlib import Path

import pytest
from helpers.models import make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a byte-level tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer, which a test may change."""
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``datasets`` convert files into the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
