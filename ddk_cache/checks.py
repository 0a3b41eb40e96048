"""Whether a row's arrays agree with each other, whatever their checksums say."""

import numpy as np
from numpy.typing import NDArray

MOST_LOGPROB = 1e-3  # nats; a log-probability is at most 0, but for float32's rounding


def check_tokens(
    tokens: NDArray[np.integer],
    segments: NDArray[np.uint16],
    loss_mask: NDArray[np.integer],
    vocab_size: int,
) -> None:
    """Check what tokenising wrote, [n, S] each.

    Raises
    ------
    ValueError
        A token is not in the vocabulary; segments do not count up from 1 with the padding behind; or a
        position has a label that its document has not.
    """
    if tokens.max(initial=0) >= vocab_size or tokens.min(initial=0) < 0:
        raise ValueError(f"a token is not in the vocabulary of {vocab_size}")
    here, following = segments[:, :-1], segments[:, 1:]
    # Unsigned differences: a step down is a large one.
    in_order = (following - here <= (here > 0)) | (following == 0)
    if not in_order.all() or segments[:, 0].max(initial=0) > 1:
        raise ValueError("the segments are not in order")
    if loss_mask.max(initial=0) > 1:
        raise ValueError("the loss mask has values other than 0 and 1")
    if loss_mask[:, -1].any() or ((here != following) | (here == 0))[loss_mask[:, :-1] > 0].any():
        raise ValueError("a position carries loss without a label in its document")


def check_labels(label_logprob: NDArray[np.float32], loss_mask: NDArray[np.integer]) -> None:
    """Check the labels' log-probabilities, [n, S] each.

    Raises
    ------
    ValueError
        One is not finite, above 0, or stands where no label is.
    """
    if not (np.isfinite(label_logprob).all() and label_logprob.max(initial=0) <= MOST_LOGPROB):
        raise ValueError("a label's log-probability is no log-probability")
    if label_logprob[loss_mask == 0].any():
        raise ValueError("a label's log-probability stands where no label is")


def check_entries(entries: NDArray[np.uint16], loss_mask: NDArray[np.integer]) -> None:
    """Check the numbers of entries, [n, S] each.

    Raises
    ------
    ValueError
        A position that carries loss has no entry, or one that carries none has some.
    """
    if not np.array_equal(entries > 0, loss_mask > 0):
        raise ValueError("entries stand elsewhere than the loss mask says")
