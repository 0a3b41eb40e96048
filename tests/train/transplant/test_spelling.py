"""The bytes of tokens, and which old tokens a new one is made from."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ddk_cache.errors import ConfigError
from ddk_train.transplant.spelling import Spelling, letters, sources


def byte_level(words: list[str], **roles: str) -> Spelling:
    """Return a byte-level tokenizer with all bytes, and with every beginning of each word."""
    alphabet = letters()
    spelled = ["".join(alphabet[value] for value in word.encode()) for word in words]
    beginnings = dict.fromkeys(word[:end] for word in spelled for end in range(2, len(word) + 1))
    vocabulary = {token: index for index, token in enumerate([*alphabet.values(), *beginnings])}
    merges = [(word[:-1], word[-1]) for word in beginnings]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Spelling(PreTrainedTokenizerFast(tokenizer_object=backend, **roles))


def sentence_piece(words: list[str], **roles: str) -> Spelling:
    """Return a tokenizer as Llama 2's: spaces as ▁, bytes as a fallback."""
    pieces = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *"theand", *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(word[:-1], word[-1]) for word in words]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Spelling(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles))


def test_the_same_bytes_are_the_same_token_whatever_a_tokenizer_calls_them() -> None:
    new, old = byte_level([" t", " th", "é"]), sentence_piece(["▁t", "▁th"])
    made = sources(new, old)
    for text in (b" ", b"t", b" t", b" th", b"\x00", b"\xff"):
        assert made[new.ordinary[text]] == [old.ordinary[text]]


def test_a_token_that_the_other_lacks_is_spelled() -> None:
    new, old = byte_level([" t", " th", " the", " thé"]), sentence_piece(["▁t", "▁th"])
    made = sources(new, old)
    assert made[new.ordinary[b" the"]] == [old.ordinary[b" th"], old.ordinary[b"e"]]
    assert made[new.ordinary[" thé".encode()]] == [
        old.ordinary[b" th"],
        old.ordinary[b"\xc3"],
        old.ordinary[b"\xa9"],
    ]
    back = sources(old, new)
    assert all(len(back[index]) == 1 for text, index in old.ordinary.items() if len(text) == 1)


def test_special_tokens_go_by_their_text_then_by_their_role() -> None:
    new = byte_level([], eos_token="<|end|>", pad_token="<pad>", bos_token="<s>")
    old = byte_level([], eos_token="</s>", pad_token="<pad>")
    made = sources(new, old)
    assert made[new.special["<pad>"]] == [old.special["<pad>"]]
    assert made[new.special["<|end|>"]] == [old.special["</s>"]]
    assert made[new.special["<s>"]] == [old.ordinary[bytes([value])] for value in b"<s>"]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        name_or_path = "old-model"

    with pytest.raises(ConfigError, match=r"^old-model: transplant needs a fast tokenizer"):
        Spelling(Slow())  # type: ignore[arg-type]
