"""Tokens are spelt out from the vocabulary as the tokenizer itself would."""

from pathlib import Path

import pytest
from helpers.models import make_tokenizer

from ddk_cache.format.token_text import is_special, token_texts
from ddk_cache.format.vocabulary import Vocabulary


@pytest.mark.parametrize(
    "text", ["def add(a, b):\n\treturn a", "naïve 東京 🙂 <|im_start|>x<|im_end|>", " a  b "]
)
def test_byte_level_tokens_are_the_text(tmp_path: Path, text: str) -> None:
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, vocabulary)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids) == text
    special = [text for index, text in zip(ids, texts, strict=True) if is_special(index, vocabulary)]
    assert special == [part for part in ("<|im_start|>", "<|im_end|>") if part in text]


def test_sentencepiece_has_its_own_spaces_and_bytes() -> None:
    tokens = ["<s>", "▁The", "▁", "<0xE2>", "<0x82>", "<0xAC>", "fox", "<0x0A>"]
    vocabulary = Vocabulary({token: index for index, token in enumerate(tokens)}, {"bos_token": "<s>"})
    assert token_texts(range(8), vocabulary) == ["<s>", " The", " ", "", "", "€", "fox", "\n"]
    assert [is_special(index, vocabulary) for index in range(8)] == [True, *[False] * 7]


def test_an_id_outside_the_vocabulary_is_shown_as_such() -> None:
    assert token_texts([7, -1], Vocabulary({"a": 0}, {})) == ["<id 7>", "<id -1>"]
