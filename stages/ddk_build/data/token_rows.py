"""Turn a row of token ids into documents."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.config import DomainConfig
from ddk_build.data import reasons
from ddk_build.data.documents import Document, Skipped, digest_of
from ddk_cache.errors import ConfigError
from ddk_cache.format.validate import MOST_LOGPROB


def documents(
    domain: DomainConfig,
    check: Callable[[NDArray[np.int64]], None],
    bos: int | None,
    seed: int,
    row: dict[str, Any],
) -> list[Document | Skipped]:
    """Return the documents of a row of token ids. Segment 0 is padding."""
    ids = _integers(row[str(domain.tokens_column)])
    names = domain.loss_mask_column, domain.segments_column, domain.positions_column
    mask, segments, positions = (None if name is None else _integers(row[name]) for name in names)
    if any(column is not None and len(column) != len(ids) for column in (mask, segments, positions)):
        raise reasons.Skip(reasons.NOT_TOKENS)
    if not len(ids):
        raise reasons.Skip(reasons.EMPTY)
    check(ids)
    counts = np.ones(len(ids), np.bool_) if mask is None else mask != 0
    written = None if domain.logprobs_column is None else _logprobs(row[domain.logprobs_column], counts)
    items: list[Document | Skipped] = []
    for begin, end in _boundaries(len(ids), segments, positions):
        if segments is None or segments[begin] != 0:
            item = _token_document(ids[begin:end].astype(np.int32), counts[begin:end], bos, seed)
            if isinstance(item, Document) and written is not None:
                item.writer_logprob = written[begin:end]
            items.append(item)
    return items or [Skipped(reasons.EMPTY)]


def _logprobs(value: Any, counts: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the values, one for each token that counts, at those tokens' positions."""
    try:
        logprobs = np.array(value, np.float32)
    except (ValueError, TypeError):
        raise reasons.Skip(reasons.NOT_LOGPROBS) from None
    if logprobs.shape != (np.count_nonzero(counts),) or not (logprobs <= MOST_LOGPROB).all():
        raise reasons.Skip(reasons.NOT_LOGPROBS)
    placed = np.zeros(len(counts), np.float32)
    placed[counts] = logprobs
    return placed


def _boundaries(
    length: int, segments: NDArray[np.int64] | None, positions: NDArray[np.int64] | None
) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each document: where the segment changes or the positions do not continue."""
    ends = np.zeros(length - 1, np.bool_)
    if segments is not None:
        ends |= np.diff(segments) != 0
    if positions is not None:
        ends |= np.diff(positions) != 1
    return pairwise([0, *(np.flatnonzero(ends) + 1).tolist(), length])


def _token_document(
    ids: NDArray[np.int32], counts: NDArray[np.bool_], bos: int | None, seed: int
) -> Document | Skipped:
    if len(ids) < 2:
        return Skipped(reasons.ONE_TOKEN)
    if not counts[1:].any():
        return Skipped(reasons.NO_LOSS)
    cut_points = None if counts.all() else np.flatnonzero(counts[:-1] & ~counts[1:]) + 1
    return Document(ids, counts, digest_of(ids.astype("<i4").tobytes(), seed), int(ids[0] == bos), cut_points)


def check_ids(key: str, size: int, ids: NDArray[np.int64]) -> None:
    """Raise ConfigError if a token is not among the tokenizer's ``size`` tokens."""
    for token in (ids.min(), ids.max()):
        if not 0 <= token < size:
            raise ConfigError(
                f"{key}: token {token} is outside the {size} tokens of the teacher's tokenizer; tokenise "
                "with the teacher's, or give text_column"
            )


def _integers(value: Any) -> NDArray[np.int64]:
    if value is None:
        raise reasons.Skip(reasons.NULL)
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise reasons.Skip(reasons.NOT_TOKENS)
    try:
        return np.array(value, np.int64)
    except OverflowError:  # -1 in an unsigned column
        raise reasons.Skip(reasons.NOT_TOKENS) from None
