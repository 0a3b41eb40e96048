"""A tokenizer by its content: where fingerprints are equal, every id means the same token.

Plain data, so that the teacher's side and the student's need no common framework. Neither the tokenizer's
name counts nor the width of a model's head, which may be padded beyond the vocabulary.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from ddk_cache.errors import CacheError

_MOST_BYTES = 1 << 25  # of a decompressed vocabulary; 256k tokens make about 6 MB
_MOST_VALUES = (
    1 << 22
)  # of its JSON, each with a comma or a bracket; a token takes 3, about 200 bytes in memory


@dataclass(frozen=True)
class Vocabulary:
    """The content of a tokenizer.

    With transformers: ``Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)``.
    """

    ids: Mapping[str, int]
    """Token to id; ids may have holes."""
    special_tokens: Mapping[str, str]
    """Role to token, such as ``{"eos_token": "</s>"}``."""

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """Id to token."""
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether a token's characters stand for bytes, as in GPT-2's BPE: "Ġ" is a space."""
        return any(token.startswith("Ġ") for token in self.ids)

    def fingerprint(self) -> str:
        """Return the tokenizer fingerprint: a sha256 as 64 hexadecimal digits.

        The padding token does not count: it occurs in no text, and users change it when they fine-tune.
        """
        return hashlib.sha256(self._canonical()).hexdigest()

    def compress(self) -> bytes:
        """Return the content that the fingerprint covers, compressed: about 7 bytes a token."""
        return zlib.compress(self._canonical(), level=9)

    @classmethod
    def decompress(cls, data: bytes) -> Self:
        """Return the vocabulary that ``compress`` serialised; raise CacheError for other bytes."""
        try:
            content = zlib.decompressobj().decompress(data, _MOST_BYTES).decode("ascii")
            if sum(map(content.count, ",[{")) > _MOST_VALUES:
                raise ValueError("has too many tokens")
            tokens, special_tokens = json.loads(content)
            return cls(
                {str(token): int(index) for index, token in tokens},
                {str(role): str(token) for role, token in special_tokens},
            )
        except (ValueError, TypeError, OverflowError, zlib.error, RecursionError) as error:
            raise CacheError("the vocabulary in the cache cannot be read") from error

    def differences(self, other: Self, limit: int = 3) -> list[str]:
        """Return the first differences, lowest id first, such as ``"'the' has id 262 and id 279"``.

        Empty where the fingerprints are equal; this side comes first in each phrase.
        """
        phrases = [
            f"{role} is {self.special_tokens.get(role)!r} and {other.special_tokens.get(role)!r}"
            for role in sorted(self.special_tokens.keys() | other.special_tokens.keys())
            if role != "pad_token" and self.special_tokens.get(role) != other.special_tokens.get(role)
        ]
        differing = {token for token, _ in self.ids.items() ^ other.ids.items()}
        for token in sorted(differing, key=lambda token: (self.ids.get(token, other.ids.get(token)), token)):
            if len(phrases) >= limit:
                break
            phrases.append(self._ids_of(token, other))
        return phrases[:limit]

    def conflicts(self, other: Self, limit: int = 3) -> list[str]:
        """Return the first tokens whose id means something else, or nothing, in ``other``.

        Empty where ``other`` reads every row of this vocabulary correctly. Roles such as ``eos_token`` and
        additional tokens may differ, as in an Instruct model and its base.
        """
        moved = [(index, token) for token, index in self.ids.items() if other.ids.get(token) != index]
        return [self._ids_of(token, other) for _, token in sorted(moved)[:limit]]

    def _ids_of(self, token: str, other: Self) -> str:
        if token not in other.ids:
            return f"{token!r} has id {self.ids[token]} and is missing in the other"
        if token not in self.ids:
            return f"{token!r} is missing and has id {other.ids[token]} in the other"
        return f"{token!r} has id {self.ids[token]} and id {other.ids[token]}"

    def _canonical(self) -> bytes:
        tokens = sorted((index, token) for token, index in self.ids.items())
        roles = sorted(item for item in self.special_tokens.items() if item[0] != "pad_token")
        return json.dumps([tokens, roles], separators=(",", ":")).encode()
