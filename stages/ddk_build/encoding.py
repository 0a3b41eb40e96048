"""Texts into token ids, and where the tokens stand in their text."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]
"""[L]"""
Places = NDArray[np.int64]
"""[L, 2]; each token's first character, and that behind its last."""


def encode(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special_tokens: bool
) -> list[list[int]]:
    """Each text's token ids, as ``tokenizer(texts)`` has them.

    Where that is the tokenizers library's work alone, it is asked itself for ids and no more: the tokens'
    places in the text, which transformers always asks for, take a third of the time.
    """
    backend = _backend(tokenizer)
    if backend is None:
        found = tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)
        return list(found["input_ids"])
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
    return [encoding.ids for encoding in encodings]


def encode_with_places(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special_tokens: bool
) -> list[tuple[Ids, Places]]:
    """Each text's token ids, and where the tokens stand in it.

    A byte-level tokenizer need not be asked for the places, which take it a quarter of its time: where the
    tokens' bytes, one after another, are the text's, their lengths say it.
    """
    backend = _backend(tokenizer)
    if backend is None:
        found = tokenizer(
            list(texts), add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False
        )
        return list(map(_arrays, found["input_ids"], found["offset_mapping"]))
    pieces = _pieces(backend)
    if not pieces or (special_tokens and backend.num_special_tokens_to_add(is_pair=False)):
        encodings = backend.encode_batch(list(texts), add_special_tokens=special_tokens)
        return [_arrays(encoding.ids, encoding.offsets) for encoding in encodings]
    placed = []
    for text, ids in zip(texts, encode(tokenizer, texts, special_tokens=False), strict=True):
        places = _by_bytes(text, list(map(pieces.__getitem__, ids)))
        if places is None:
            placed.append(_arrays(ids, backend.encode(text, add_special_tokens=False).offsets))
        else:
            placed.append((np.array(ids, np.int32), places))
    return placed


def _arrays(ids: Sequence[int], places: Sequence[tuple[int, int]]) -> tuple[Ids, Places]:
    return np.array(ids, np.int32), np.fromiter(chain.from_iterable(places), np.int64).reshape(-1, 2)


def _by_bytes(text: str, pieces: Sequence[bytes]) -> Places | None:
    """Where the pieces stand in the text; None if one after another they are another text."""
    whole = text.encode()
    if b"".join(pieces) != whole:
        return None
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ends = np.cumsum(lengths)
    begins = ends - lengths
    if not text.isascii():
        letter = np.cumsum(np.frombuffer(whole, np.uint8) & 0xC0 != 0x80)  # of each byte, counted from 1
        begins, ends = letter[begins] - 1, letter[ends - 1]
    return np.stack([begins, ends], axis=1)


@lru_cache(maxsize=1)
def _pieces(backend: "Tokenizer") -> list[bytes]:
    """Each token's bytes, an added one's as it is written; none where the tokenizer is not byte-level."""
    from tokenizers.decoders import ByteLevel
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if not isinstance(backend.decoder, ByteLevel):
        return []
    byte_of: dict[str, int] = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
    nothing = b"\xff"  # no UTF-8 has it: a text with such a token is another
    words = backend.get_vocab(with_added_tokens=True)
    pieces = [nothing] * (max(words.values(), default=-1) + 1)
    for word, token in words.items():
        if all(letter in byte_of for letter in word):
            pieces[token] = bytes(map(byte_of.__getitem__, word))
    for token, added in backend.get_added_tokens_decoder().items():
        pieces[token] = added.content.encode()
    return pieces


def _backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer | None":
    """What tokenises, where transformers' own classes do no more than call it."""
    from transformers import PreTrainedTokenizerFast

    own = type(tokenizer)
    if own.__call__ is not PreTrainedTokenizerFast.__call__ or (
        own._encode_plus is not PreTrainedTokenizerFast._encode_plus
    ):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend
