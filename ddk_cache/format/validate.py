"""Check that a row's arrays are consistent with each other, independently of their checksums."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_LOGPROB = 1e-3  # nats; a log-probability is at most 0, but for float32's rounding


def check_rows(arrays: Mapping[str, NDArray[Any]], vocab_size: int) -> None:
    """Check rows by the arrays that were read of them, [n, width] each by name; raise ValueError."""
    mask = arrays["loss_mask"]
    check_tokens(arrays["tokens"], arrays["segments"], mask, vocab_size)
    if "label_logprob" in arrays:
        check_labels(arrays["label_logprob"], mask)
    if "writer_logprob" in arrays and arrays["writer_logprob"][mask == 0].any():
        raise ValueError("a position without a label has a writer's log-probability")
    if "entries" in arrays and not np.array_equal(arrays["entries"] > 0, mask > 0):
        raise ValueError("entries and the loss mask are at different positions")


def check_tokens(
    tokens: NDArray[np.integer], segments: NDArray[np.uint16], loss_mask: NDArray[np.integer], vocab_size: int
) -> None:
    """Check the arrays that tokenising writes, [n, S] each; raise ValueError.

    Tokens are in the vocabulary; segments count up from 1, with the padding at the end; a position that
    carries loss has a label in its document.
    """
    if tokens.max(initial=0) >= vocab_size or tokens.min(initial=0) < 0:
        raise ValueError(f"a token is not in the vocabulary of {vocab_size}")
    here, following = segments[:, :-1], segments[:, 1:]
    # The difference is unsigned: a step down is a large number.
    in_order = (following - here <= (here > 0)) | (following == 0)
    if not in_order.all() or segments[:, 0].max(initial=0) > 1:
        raise ValueError("the segments are not in order")
    if loss_mask.max(initial=0) > 1:
        raise ValueError("the loss mask has values other than 0 and 1")
    if loss_mask[:, -1].any() or ((here != following) | (here == 0))[loss_mask[:, :-1] > 0].any():
        raise ValueError("a position carries loss without a label in its document")


def check_labels(label_logprob: NDArray[np.float32], loss_mask: NDArray[np.integer]) -> None:
    """Raise ValueError unless log-probabilities [n, S] are finite and at most 0, and 0 off the mask."""
    if not (np.isfinite(label_logprob).all() and label_logprob.max(initial=0) <= MOST_LOGPROB):
        raise ValueError("a label's log-probability is not a log-probability")
    if label_logprob[loss_mask == 0].any():
        raise ValueError("a position without a label has a log-probability")
