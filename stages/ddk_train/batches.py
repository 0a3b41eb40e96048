"""From drawn rows to batches: read and decoded by threads, ahead of the step, in the order drawn."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_cache import Cache, Rows
from ddk_cache.errors import CacheError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """n rows of S tokens, and the M positions of them that carry loss.

    Entries are int32 and float32 until they are on the device, and only those of positions that carry
    loss go there.
    """

    tokens: Tensor  # int32 [n, S]
    positions: Tensor  # int32 [n, S], counted from 0 in every document
    places: Tensor  # int64 [M], which of the n * S positions carry loss
    labels: Tensor  # int64 [M], the token after each of them
    domain: Tensor  # int64 [M], the number of the domain that each of them belongs to
    ids: Tensor | None  # int32 [M, E], -1 where an entry is absent
    logprobs: Tensor | None  # float32 [M, E]
    tail_logprob: Tensor | None  # float32 [M]
    text_tokens: int  # all but padding
    documents: tuple[Tensor, ...] = ()
    """For a student that takes each document as a row of its own: int64 [D, L] each, documents of like
    length, where in the n * S their tokens lie. ``places`` then count these arrays' elements instead."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor replaced by ``function`` of it."""
        changed: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        changed["documents"] = tuple(map(function, self.documents))
        return replace(self, **changed)

    def with_arrays(self, count: int) -> "Batch":
        """With ``count`` arrays of documents: what is missing are arrays of one token, without labels."""
        missing = (torch.zeros(1, 1, dtype=torch.int64),) * (count - len(self.documents))
        return replace(self, documents=self.documents + missing)

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Layout:
    """How rows reach a student."""

    packed: bool = True
    """Rows as the cache has them; else each document is a row of its own."""
    apart_at: int | None = None
    """Not packed: documents longer than this many tokens stand in no array with shorter ones."""


PACKED = Layout()


def make_batch(parts: Mapping[int, Rows], vocab_size: int, layout: Layout = PACKED) -> Batch:
    """Put rows together, ``parts`` being a domain's number to its rows.

    Of the targets only what positions with loss need is taken; rows that were read without have no mass
    anywhere, and a batch of such rows alone has None. ``vocab_size`` is the width of the student's head. A
    teacher's padded vocabulary may be wider: entries beyond it, which no student of this tokenizer could
    give, count as tail.

    Raises
    ------
    CacheError
        A token is at or beyond ``vocab_size``.
    """
    rows = list(parts.values())
    tokens = _join(part.tokens for part in rows)
    segments = _join(part.segments for part in rows)
    if tokens.max() >= vocab_size or tokens.min() < 0:
        wrong = tokens[(tokens >= vocab_size) | (tokens < 0)][0]
        raise CacheError(f"a row holds the token {wrong}; the student has the tokens 0 to {vocab_size - 1}")
    places = np.flatnonzero(_join(part.loss_mask for part in rows))
    domain = np.repeat(np.array([*parts], np.int64), [int(part.loss_mask.sum()) for part in rows])
    ids = logprobs = tail = None
    width = max(0 if part.ids is None else part.ids.shape[-1] for part in rows)
    if width:
        found = [_targets(part, width) for part in rows]
        ids, logprobs, tail = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if (ids >= vocab_size).any():
            ids, logprobs, tail = _without_padding(ids, logprobs, tail, vocab_size)
    labels = tokens.reshape(-1)[places + 1].astype(np.int64)
    documents: list[NDArray[np.int64]] = []
    if not layout.packed:
        documents, places = _unpack(segments, places, layout.apart_at)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(document_positions(segments)),
        places=torch.from_numpy(places),
        labels=torch.from_numpy(labels),
        domain=torch.from_numpy(domain),
        ids=None if ids is None else torch.from_numpy(ids),
        logprobs=None if logprobs is None else torch.from_numpy(logprobs),
        tail_logprob=None if tail is None else torch.from_numpy(tail),
        text_tokens=int((segments > 0).sum()),
        documents=tuple(map(torch.from_numpy, documents)),
    )


def _unpack(
    segments: NDArray[np.uint16], places: NDArray[np.int64], apart_at: int | None
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """``Batch.documents``, and ``places`` (of the n * S) as places in them. Without labels: one token.

    Lengths between two powers of two stand together, so padding never more than doubles the work. It repeats
    a document's last token, behind it, where no causal model looks.
    """
    starts = np.flatnonzero(document_positions(segments) == 0)
    lengths = np.diff(starts, append=segments.size)
    labelled = np.unique(np.searchsorted(starts, places, side="right") - 1)
    starts, lengths = starts[labelled], lengths[labelled]
    kind = np.ceil(np.log2(lengths)) + (0 if apart_at is None else 64 * (lengths > apart_at))
    documents, where, end = [], np.zeros(segments.size, np.int64), 0
    for one in np.unique(kind):
        first, length = starts[kind == one, None], lengths[kind == one, None]
        step = np.arange(length.max())
        index = first + np.minimum(step, length - 1)
        inside = step < length
        where[index[inside]] = end + np.flatnonzero(inside)
        end += index.size
        documents.append(index)
    return documents or [np.zeros((1, 1), np.int64)], where[places]


def document_positions(segments: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Each token's place in its own document: [n, S] -> int32 [n, S], 0 wherever a segment begins."""
    index = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first: NDArray[np.int32] = np.maximum.accumulate(np.where(begins, index, np.int32(0)), axis=1)
    return index - first


def reader(
    cache: Cache, *, targets: Sequence[bool], vocab_size: int, pin: bool, layout: Layout = PACKED
) -> Callable[..., Batch]:
    """A function from (domain int64 [n], row int64 [n]) to the batch of those training rows, on the CPU.

    ``targets`` [N] False leaves a domain's entries unread; ``pin`` puts the batch into page-locked memory,
    from which a copy to the GPU does not hold up the step.
    """

    def read(domain: NDArray[np.int64], row: NDArray[np.int64]) -> Batch:
        parts = {
            int(number): cache[cache.domains[number]].train.read(
                row[domain == number], targets=targets[number], labels=False
            )
            for number in np.unique(domain)
        }
        batch = make_batch(parts, vocab_size, layout)
        return batch.map(Tensor.pin_memory) if pin else batch

    return read


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """``map`` by ``threads`` threads, at most ``ahead`` results early, in order.

    An error in a thread is raised here, at its item's turn.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _join(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(list(arrays))


Targets = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]


def _targets(part: Rows, width: int) -> Targets:
    """ids and logprobs [M, E] and tail_logprob [M] of the positions with loss."""
    if part.ids is None or part.logprobs is None or part.tail_logprob is None:
        shape = int(part.loss_mask.sum()), width
        nothing = np.full(shape, -np.inf, np.float32)
        return np.full(shape, -1, np.int32), nothing, nothing[:, 0]
    mask = part.loss_mask
    return part.ids[mask], part.logprobs[mask], part.tail_logprob[mask]


def _without_padding(
    ids: NDArray[np.int32], logprobs: NDArray[np.float32], tail: NDArray[np.float32], vocab_size: int
) -> Targets:
    """Move the mass of entries at or beyond ``vocab_size`` into the tail."""
    beyond = ids >= vocab_size
    moved = np.where(beyond, logprobs, -np.inf)
    return (
        np.where(beyond, np.int32(-1), ids),
        np.where(beyond, np.float32(-np.inf), logprobs),
        np.logaddexp.reduce(np.concatenate([moved, tail[:, None]], axis=1), axis=1),
    )
