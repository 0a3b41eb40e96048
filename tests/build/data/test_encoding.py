"""Token ids and offsets are those of transformers, whichever library is called."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.models import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ddk_build.data.encoding import encode

TEXTS = [
    "hello",
    "",
    "  two  blanks, a tab\tand\n\n lines ",
    "<eos> said within the text<eos>",
    "naïve, ünï, 漢字, \u200d👩‍👧, \ufffd",
    "cafe\u0301 in two letters",
    "long " * 3000,
]


def byte_level(folder: Path) -> PreTrainedTokenizerBase:
    make_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def cut_and_padded(folder: Path) -> PreTrainedTokenizerBase:
    """As a tokenizer that was saved in the middle of its use."""
    tokenizer = byte_level(folder)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    return tokenizer


def normalising(folder: Path) -> PreTrainedTokenizerBase:
    """Byte-level too, but of some texts it sees others; and an added token takes the blanks around it."""
    tokenizer = byte_level(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace("ï", "i")]
    )
    tokenizer.add_tokens([AddedToken("lines", lstrip=True, rstrip=True)])
    return tokenizer


def unigram(folder: Path) -> PreTrainedTokenizerBase:
    """With a normalizer, unknown letters, and a special token at both ends."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<bos>", "<eos>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS[:3] * 5, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def whole_specials(folder: Path) -> PreTrainedTokenizerBase:
    """To which special tokens in a text are text."""
    make_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder, split_special_tokens=True)


class Own(PreTrainedTokenizerFast):
    """Does something of its own with texts."""

    def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
        return super()._encode_plus([f"own {one}" for one in text], *args, **options)


def own(folder: Path) -> PreTrainedTokenizerBase:
    make_tokenizer(folder)
    return Own.from_pretrained(folder)


@pytest.mark.parametrize("make", [byte_level, cut_and_padded, normalising, unigram, whole_specials, own])
@pytest.mark.parametrize("special_tokens", [True, False])
def test_ids_and_offsets_are_those_of_transformers(
    make: Callable[[Path], PreTrainedTokenizerBase], special_tokens: bool, tmp_path: Path
) -> None:
    tokenizer = make(tmp_path)
    ids = [row.tolist() for row, _ in encode(tokenizer, TEXTS, special_tokens=special_tokens)]
    with_offsets = encode(tokenizer, TEXTS, special_tokens=special_tokens, offsets=True)
    expected = tokenizer(TEXTS, add_special_tokens=special_tokens, return_offsets_mapping=True)
    assert ids == [row.tolist() for row, _ in with_offsets] == expected["input_ids"]
    offsets = [pairs.tolist() for _, pairs in with_offsets if pairs is not None]
    assert offsets == [list(map(list, pairs)) for pairs in expected["offset_mapping"]]
    assert len({tuple(row) for row in ids}) == len(TEXTS)
