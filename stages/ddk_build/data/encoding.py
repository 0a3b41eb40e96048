"""Encode texts as token ids, with the tokens' offsets in the text."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]
"""[L]"""
Offsets = NDArray[np.int64]
"""[L, 2]; each token's first character, and the first character after it."""


def encode(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special_tokens: bool, offsets: bool = False
) -> list[tuple[Ids, Offsets | None]]:
    """Return each text's token ids, as ``tokenizer(texts)`` does, with the tokens' offsets on request.

    Only fast tokenizers have offsets.
    """
    backend = _backend(tokenizer)
    if backend is None:
        encoded = tokenizer(
            list(texts), add_special_tokens=special_tokens, return_offsets_mapping=offsets, verbose=False
        )
        return list(map(_arrays, encoded["input_ids"], encoded.get("offset_mapping", [None] * len(texts))))
    encode_batch = backend.encode_batch if offsets else backend.encode_batch_fast
    encodings = encode_batch(list(texts), add_special_tokens=special_tokens)
    return [_arrays(encoding.ids, encoding.offsets if offsets else None) for encoding in encodings]


def _arrays(ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None) -> tuple[Ids, Offsets | None]:
    if offsets is None:
        return np.array(ids, np.int32), None
    return np.array(ids, np.int32), np.fromiter(chain.from_iterable(offsets), np.int64).reshape(-1, 2)


def _backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer | None":
    """Return the tokenizers library's object, unless the tokenizer's class changes texts first.

    Calling it directly saves a quarter of the time of short texts.
    """
    from transformers import PreTrainedTokenizerFast

    for method in ("__call__", "_encode_plus"):
        if getattr(type(tokenizer), method) is not getattr(PreTrainedTokenizerFast, method):
            return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend
