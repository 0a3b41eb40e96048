"""Where tokens stand in their text.

The tokenizers library says so where it is asked, and takes a fifth longer for it. Where each token is some
bytes, as with nearly all models of today, their lengths say the same; that the bytes are the text's is looked
at each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_build.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Places = NDArray[np.int64]
"""[L, 2]; each token's first character, and that behind its last."""


PROBE = (
    " a  b\n\n \u00e9t\u00e9 \U0001f642 "  # with all that tokenizers are known to treat in ways of their own
)


class PlacedTokens:
    """Tokenises texts, and says where the tokens stand."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._vocabulary = _vocabulary(tokenizer)
        [(ids, places)] = self._asked([PROBE], special_tokens=False)
        found = None if self._vocabulary is None else _places(PROBE, ids, self._vocabulary)
        if found is None or not np.array_equal(found, places):
            self._vocabulary = None

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[tuple[list[int], Places]]:
        """Each text's token ids as ``tokenizer(texts)`` has them, and their places as its offsets."""
        if self._vocabulary is None or special_tokens:  # which are not in the text
            return self._asked(texts, special_tokens)
        found = []
        for text, ids in zip(texts, encode(self._tokenizer, texts, special_tokens=False), strict=True):
            places = _places(text, ids, self._vocabulary)
            found += self._asked([text], False) if places is None else [(ids, places)]
        return found

    def _asked(self, texts: Sequence[str], special_tokens: bool) -> list[tuple[list[int], Places]]:
        found = self._tokenizer(
            list(texts),
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,  # no warning that a text is longer than the model's window
        )
        flat = [np.fromiter(chain.from_iterable(one), np.int64) for one in found["offset_mapping"]]
        return [(ids, one.reshape(-1, 2)) for ids, one in zip(found["input_ids"], flat, strict=True)]


@dataclass(frozen=True)
class _Vocabulary:
    """The bytes of all tokens, one after another."""

    data: NDArray[np.uint8]
    begins: NDArray[np.int64]
    """[V]; where a token's bytes begin."""
    lengths: NDArray[np.int64]
    """[V]"""


def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> _Vocabulary | None:
    """None where its tokens are not of bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    ids = tokenizer.get_vocab()
    found = [b""] * (max(ids.values()) + 1)
    added = tokenizer.get_added_vocab()
    for token, token_id in ids.items():
        if token not in added and not byte_of.keys() >= set(token):
            return None
        found[token_id] = token.encode() if token in added else b"".join(map(byte_of.__getitem__, token))
    lengths = np.fromiter(map(len, found), np.int64, len(found))
    return _Vocabulary(np.frombuffer(b"".join(found), np.uint8), np.cumsum(lengths) - lengths, lengths)


def _places(text: str, ids: Sequence[int], vocabulary: _Vocabulary) -> Places | None:
    """None where the tokens' bytes, one after another, are not the text's."""
    data, tokens = np.frombuffer(text.encode(), np.uint8), np.array(ids, np.int64)
    lengths = vocabulary.lengths[tokens]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    if lengths.sum() != len(data):
        return None
    origins = np.arange(len(data)) + np.repeat(vocabulary.begins[tokens] - begins, lengths)
    if not np.array_equal(vocabulary.data[origins], data):
        return None
    if len(data) > len(text):
        character = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte; one that is 10xxxxxx goes on with it
        begins, ends = character[begins], character[ends - 1] + 1
    return np.stack([begins, ends], axis=1)
