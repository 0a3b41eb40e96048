"""The bytes that a tokenizer's tokens stand for, and the tokens of another tokenizer that spell them."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_cache.errors import ConfigError
from ddk_cache.format.token_text import BYTE, BYTE_LEVEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = {value: letter for letter, value in BYTE_LEVEL.items()}
SPACE = "▁"  # how SentencePiece writes it

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Spelling:
    """A tokenizer's ordinary and special tokens, and its way to split bytes into tokens.

    Raises ConfigError unless it is a fast tokenizer of byte-level (GPT-2's alphabet) or SentencePiece kind.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"{tokenizer.name_or_path}: transplant needs a fast tokenizer (tokenizer.json)")
        self._model = backend.model
        decoder = json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
        if '"ByteLevel"' not in decoder and SPACE not in decoder:
            raise ConfigError(
                f"{tokenizer.name_or_path}: its tokenizer is neither of byte-level nor of SentencePiece "
                "kind; choose another model"
            )
        self._is_byte_level = '"ByteLevel"' in decoder
        added = backend.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {token.content: index for index, token in added.items()}
        """Added tokens by what they are called, such as the markers of roles and turns."""
        self._ids: Mapping[str, int] = tokenizer.get_vocab()
        roles = tokenizer.special_tokens_map
        self.roles: Mapping[str, int] = {role: self._ids[roles[role]] for role in ROLES if role in roles}
        # First the bytes of SentencePiece's fallback: a letter that is the same byte replaces them.
        tokens = sorted(self._ids.items(), key=lambda item: not BYTE.fullmatch(item[0]))
        ordinary = {index: self._bytes(token) for token, index in tokens if index not in added}
        space = " " if self._is_byte_level else SPACE
        plain = {
            index: token.content.replace(space, " ") for index, token in added.items() if not token.special
        }
        self.texts: Mapping[int, bytes] = ordinary | {index: text.encode() for index, text in plain.items()}
        """The bytes of each token of a text: the ordinary ones, and added ones such as runs of spaces."""
        self.ordinary: Mapping[bytes, int] = {text: index for index, text in self.texts.items()}
        self.size = max(self._ids.values()) + 1

    def _bytes(self, token: str) -> bytes:
        if not self._is_byte_level:
            if match := BYTE.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace(SPACE, " ").encode()
        return b"".join(bytes([BYTE_LEVEL[x]]) if x in BYTE_LEVEL else x.encode() for x in token)

    def spell(self, text: bytes) -> list[int]:
        """Return the ids of the tokens that spell ``text``; empty if there are none, as for a lone byte."""
        if self._is_byte_level:
            words = "".join(LETTERS[value] for value in text)
        else:
            try:
                words = text.decode().replace(" ", SPACE)
            except UnicodeDecodeError:
                ids = [self._ids.get(f"<0x{value:02X}>") for value in text]
                return [] if None in ids else [index for index in ids if index is not None]
        unknown = self.roles.get("unk_token")
        return [token.id for token in self._model.tokenize(words) if token.id != unknown]


def token_bytes(tokenizer: "PreTrainedTokenizerBase", size: int) -> NDArray[np.int64] | None:
    """Return the bytes of text of the ids below ``size``, [size], 0 for special tokens; None if unknown."""
    try:
        spelling = Spelling(tokenizer)
    except ConfigError:
        return None
    return np.array([len(spelling.texts.get(index, b"")) for index in range(size)])


def sources(new: Spelling, old: Spelling) -> list[list[int]]:
    """Return, for each id of ``new``, the ids of ``old`` that it is made from.

    One id where the same token exists, or one with the same role; several where old tokens spell it; none
    where nothing does, and for ids without a token.
    """
    made: list[list[int]] = [[] for _ in range(new.size)]
    for index, ids in (*_ordinary(new, old), *_special(new, old)):
        made[index] = ids
    return made


def _ordinary(new: Spelling, old: Spelling) -> Iterator[tuple[int, list[int]]]:
    for index, text in new.texts.items():
        same = old.ordinary.get(text)
        yield index, old.spell(text) if same is None else [same]


def _special(new: Spelling, old: Spelling) -> Iterator[tuple[int, list[int]]]:
    by_role = {index: old.roles[role] for role, index in new.roles.items() if role in old.roles}
    for text, index in new.special.items():
        same = old.special.get(text, by_role.get(index))
        if same is not None or index not in new.texts:
            yield index, old.spell(text.encode()) if same is None else [same]
