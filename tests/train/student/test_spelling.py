"""The bytes of tokens, and which old tokens a new one is made from."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ddk_cache.errors import ConfigError
from ddk_train.student.spelling import LETTERS, Spelling, sources, token_bytes


def byte_level(words: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with all bytes, and with every beginning of each word."""
    alphabet = LETTERS
    spelled = ["".join(alphabet[value] for value in word.encode()) for word in words]
    beginnings = dict.fromkeys(word[:end] for word in spelled for end in range(2, len(word) + 1))
    vocabulary = {token: index for index, token in enumerate([*alphabet.values(), *beginnings])}
    merges = [(word[:-1], word[-1]) for word in beginnings]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def sentence_piece(words: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2's: spaces as ▁, bytes as a fallback."""
    pieces = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *"theand", *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(word[:-1], word[-1]) for word in words]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **roles)


def test_the_same_bytes_are_the_same_token_whatever_a_tokenizer_calls_them() -> None:
    new, old = Spelling(byte_level([" t", " th", "é"])), Spelling(sentence_piece(["▁t", "▁th"]))
    made = sources(new, old)
    for text in (b" ", b"t", b" t", b" th", b"\x00", b"\xff"):
        assert made[new.ordinary[text]] == [old.ordinary[text]]


def test_a_token_that_the_other_lacks_is_spelled() -> None:
    new, old = Spelling(byte_level([" t", " th", " the", " thé"])), Spelling(sentence_piece(["▁t", "▁th"]))
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
    new = Spelling(byte_level([], eos_token="<|end|>", pad_token="<pad>", bos_token="<s>"))
    old = Spelling(byte_level([], eos_token="</s>", pad_token="<pad>"))
    made = sources(new, old)
    assert made[new.special["<pad>"]] == [old.special["<pad>"]]
    assert made[new.special["<|end|>"]] == [old.special["</s>"]]
    assert made[new.special["<s>"]] == [old.ordinary[bytes([value])] for value in b"<s>"]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        name_or_path = "old-model"

    with pytest.raises(ConfigError, match=r"^old-model: transplant needs a fast tokenizer"):
        Spelling(Slow())  # type: ignore[arg-type]
    assert token_bytes(Slow(), 4) is None  # type: ignore[arg-type]


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"the": 0, "##n": 1}))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="neither of byte-level nor of SentencePiece kind"):
        Spelling(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_added_tokens_may_be_text() -> None:
    """As Gemma's runs of spaces and line breaks."""
    tokenizer = sentence_piece(["▁t"], eos_token="</s>")
    tokenizer.add_tokens(["▁▁▁", "\n"])
    new, old = Spelling(tokenizer), Spelling(byte_level(["   "], eos_token="</s>"))
    made = sources(new, old)
    assert made[new.special["▁▁▁"]] == [old.ordinary[b"   "]]
    assert made[new.special["\n"]] == [old.ordinary[b"\n"]]
    assert sources(old, new)[old.ordinary[b"   "]] == [new.special["▁▁▁"]]


@pytest.mark.parametrize(
    ("tokenizer", "spaces"),
    [
        (byte_level([" t", " th"], eos_token="</s>"), "    "),
        (sentence_piece(["▁t", "▁th"], eos_token="</s>"), "▁▁▁▁"),
    ],
    ids=["byte-level", "SentencePiece"],
)
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer: PreTrainedTokenizerFast, spaces: str) -> None:
    tokenizer.add_tokens([spaces])
    sizes = token_bytes(tokenizer, 400)
    assert sizes is not None
    for text in ("the", " the", "t the theé", "the    t"):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.eos_token_id] == 0
    assert not sizes[len(tokenizer) :].any()  # the padding of a model's vocabulary
