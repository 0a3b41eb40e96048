"""Token ids -> text, from a vocabulary alone: neither the teacher nor its tokenizer's code is needed."""

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable

from ddk_cache.format.vocabulary import Vocabulary

SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's


def _byte_level() -> dict[str, int]:
    """Return the byte that each character of a byte-level BPE token stands for, as GPT-2 defined it."""
    spans = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = [byte for first, last in spans for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()


def token_texts(ids: Iterable[int], vocabulary: Vocabulary) -> list[str]:
    """Return the text of each token. A character of several tokens is in the last of them."""
    decoder = getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(_spelt(index, vocabulary)) for index in ids]


def is_special(index: int, vocabulary: Vocabulary) -> bool:
    """Return whether a token looks like a special token, such as ``<|im_end|>``."""
    token = vocabulary.tokens.get(index, "")
    return token in vocabulary.special_tokens.values() or (
        SPECIAL.fullmatch(token) is not None and BYTE.fullmatch(token) is None
    )


def _spelt(index: int, vocabulary: Vocabulary) -> bytes:
    token = vocabulary.tokens.get(index)
    if token is None:
        return f"<id {index}>".encode()
    if vocabulary.is_byte_level and all(letter in BYTE_LEVEL for letter in token):
        return bytes(BYTE_LEVEL[letter] for letter in token)
    if byte := BYTE.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("▁", " ").encode(errors="replace")
