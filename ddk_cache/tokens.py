"""What a tokenizer is, told by its content: where fingerprints agree, every id means the same token.

Plain data, so that the teacher's side and the student's need no framework in common. Neither the
tokenizer's name counts nor the width of a model's head, which may be padded beyond the vocabulary.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from ddk_cache.errors import CacheError

_MOST_BYTES = 1 << 25  # of an unpacked vocabulary; 256k tokens make about 6 MB


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's content.

    With transformers: ``Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)``.
    """

    ids: Mapping[str, int]
    """Token to id; ids may have holes."""
    special_tokens: Mapping[str, str]
    """Role to token, such as ``{"eos_token": "</s>"}``."""

    def fingerprint(self) -> str:
        """sha256 as 64 hexadecimal digits.

        The padding token is left out: it stands in no text, and whoever fine-tunes sets it at will.
        """
        return hashlib.sha256(self._canonical()).hexdigest()

    def pack(self) -> bytes:
        """What the fingerprint is made from, compressed: about 7 bytes a token."""
        return zlib.compress(self._canonical(), level=9)

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """The inverse of ``pack``.

        Raises
        ------
        CacheError
            The bytes are not what ``pack`` makes.
        """
        try:
            tokens, special_tokens = json.loads(zlib.decompressobj().decompress(packed, _MOST_BYTES))
            return cls(
                {str(token): int(index) for index, token in tokens},
                {str(role): str(token) for role, token in special_tokens},
            )
        except (ValueError, TypeError, zlib.error, RecursionError) as error:
            raise CacheError("the vocabulary kept in the cache cannot be read") from error

    def differences(self, other: Self, limit: int = 3) -> list[str]:
        """The first ``limit`` differences, lowest id first, such as ``"'the' has id 262 and id 279"``.

        Empty where the fingerprints agree; this side comes first in each phrase.
        """
        found = [
            f"{role} is {self.special_tokens.get(role)!r} and {other.special_tokens.get(role)!r}"
            for role in sorted(self.special_tokens.keys() | other.special_tokens.keys())
            if role != "pad_token" and self.special_tokens.get(role) != other.special_tokens.get(role)
        ]
        differing = {token for token, _ in self.ids.items() ^ other.ids.items()}
        for token in sorted(differing, key=lambda token: (self.ids.get(token, other.ids.get(token)), token)):
            if len(found) >= limit:
                break
            found.append(f"{token!r} has {_id(self.ids.get(token))} and {_id(other.ids.get(token))}")
        return found[:limit]

    def conflicts(self, other: Self, limit: int = 3) -> list[str]:
        """The first ``limit`` tokens whose id means something else to ``other``, or nothing, in its words.

        Empty where ``other`` reads every row of this vocabulary aright: roles such as ``eos_token``, and
        tokens that it has besides, make no difference to ids and may differ (an Instruct model and its base).
        """
        moved = [(index, token) for token, index in self.ids.items() if other.ids.get(token) != index]
        return [
            f"{token!r} has {_id(index)} and {_id(other.ids.get(token))}"
            for index, token in sorted(moved)[:limit]
        ]

    def _canonical(self) -> bytes:
        tokens = sorted((index, token) for token, index in self.ids.items())
        roles = sorted(item for item in self.special_tokens.items() if item[0] != "pad_token")
        return json.dumps([tokens, roles], separators=(",", ":")).encode()


def _id(index: int | None) -> str:
    return "no id" if index is None else f"id {index}"
