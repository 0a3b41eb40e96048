"""Where tokens stand: the same as the tokenizers library says, also where it has to be asked."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ddk_build.places import PlacedTokens

TEXTS = [
    "The quick brown fox",
    "<|im_start|>user\nna\u00efve \u65e5\u672c\u8a9e \U0001f642\u0301<|im_end|>\n",
    " \t\n two  blanks ",
    "cafe\u0301",  # NFC makes one letter of the last two
    "a <sep> b",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def assert_as_asked(tokenizer: PreTrainedTokenizerBase, placed: PlacedTokens, texts: list[str]) -> None:
    found = placed.encode(texts, special_tokens=False)
    expected = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    assert [ids for ids, _ in found] == expected["input_ids"]
    for (_, places), offsets in zip(found, expected["offset_mapping"], strict=True):
        np.testing.assert_array_equal(places, np.array(offsets).reshape(-1, 2))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
def test_any_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    assert_as_asked(tokenizer, PlacedTokens(tokenizer), texts)


def normalised(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


def swallowing(tokenizer: PreTrainedTokenizerBase) -> None:
    """An added token that takes the blanks around it."""
    tokenizer.add_tokens([AddedToken("<sep>", lstrip=True, rstrip=True)])


def trimming(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its tokens begin behind their blank."""
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)


def lower(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def prefixed(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [normalised, swallowing, trimming, lower, prefixed])
def test_bytes_that_are_not_the_text_s(
    tmp_path: Path, change: Callable[[PreTrainedTokenizerBase], None]
) -> None:
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    change(tokenizer)
    placed = PlacedTokens(tokenizer)
    assert_as_asked(tokenizer, placed, TEXTS)
    for text in TEXTS:
        assert_as_asked(tokenizer, placed, [text])


def test_words_are_not_bytes() -> None:
    """Its blanks are in no token."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "two": 1, "words": 2, "\u2581": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert_as_asked(tokenizer, PlacedTokens(tokenizer), ["two words", "two others"])
