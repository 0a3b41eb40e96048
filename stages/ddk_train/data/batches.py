"""Read rows, in threads ahead of the step, and collate them into batches."""

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
from ddk_cache.format.codec import Targets

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """n rows of S tokens, and the M token positions that carry loss, with their targets."""

    tokens: Tensor  # int32 [n, S]
    positions: Tensor  # int32 [n, S], from 0 in every document
    label_positions: Tensor  # int64 [M], index of each token position in the n * S
    labels: Tensor  # int64 [M], the token after each of them
    domain: Tensor  # int64 [M], index of the domain of each
    ids: Tensor | None  # int32 [M, E], -1 where an entry is absent
    logprobs: Tensor | None  # float32 [M, E]
    tail_logprob: Tensor | None  # float32 [M]
    text_tokens: int  # all but padding
    documents: tuple[Tensor, ...] = ()
    """Not packed: indices into the n * S tokens, int64 [D, L] each, of documents of similar length.
    ``label_positions`` then index the elements of these arrays, concatenated."""
    teacher_logprob: Tensor | None = None  # float32 [M], of the labels; None if they were not read
    writer_logprob: Tensor | None = None  # float32 [M], of the labels by their writer; inf: unknown

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply ``function`` to every tensor."""
        columns: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **columns, documents=tuple(map(function, self.documents)))

    def with_arrays(self, count: int) -> "Batch":
        """Add arrays of one token, without labels, until there are ``count`` arrays of documents."""
        missing = (torch.zeros(1, 1, dtype=torch.int64),) * (count - len(self.documents))
        return replace(self, documents=self.documents + missing)

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Layout:
    """How a student reads rows: packed as in the cache, or each document as a row."""

    packed: bool = True
    isolate_above: int | None = None
    """Not packed: documents longer than this many tokens share no array with shorter ones."""


PACKED = Layout()


def make_batch(parts: Mapping[int, Rows], vocab_size: int, layout: Layout = PACKED) -> Batch:
    """Collate rows, given by their domain's index.

    Rows read without targets have no mass; a batch of only such rows has no targets. ``vocab_size`` is the
    width of the student's head: tokens beyond it raise CacheError, and entries beyond it (a teacher's padded
    vocabulary may be wider) count as tail.
    """
    rows = list(parts.values())
    tokens = np.concatenate([part.tokens for part in rows])
    segments = np.concatenate([part.segments for part in rows])
    if tokens.max() >= vocab_size or tokens.min() < 0:
        wrong = tokens[(tokens >= vocab_size) | (tokens < 0)][0]
        raise CacheError(f"a row holds the token {wrong}; the student has the tokens 0 to {vocab_size - 1}")
    label_positions = np.flatnonzero(np.concatenate([part.loss_mask for part in rows]))
    domain = np.repeat(np.array([*parts], np.int64), [np.count_nonzero(part.loss_mask) for part in rows])
    labels = tokens.reshape(-1)[label_positions + 1].astype(np.int64)
    targets = _targets(rows, vocab_size)
    documents: list[NDArray[np.int64]] = []
    if not layout.packed:
        documents, label_positions = _unpack(segments, label_positions, layout.isolate_above)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(document_positions(segments)),
        label_positions=torch.from_numpy(label_positions),
        labels=torch.from_numpy(labels),
        domain=torch.from_numpy(domain),
        ids=None if targets is None else torch.from_numpy(targets.ids),
        logprobs=None if targets is None else torch.from_numpy(targets.logprobs),
        tail_logprob=None if targets is None else torch.from_numpy(targets.tail_logprob),
        teacher_logprob=_of_labels(rows, "label_logprob", 0.0),
        writer_logprob=_of_labels(rows, "writer_logprob", np.inf),
        text_tokens=int(np.count_nonzero(segments)),
        documents=tuple(map(torch.from_numpy, documents)),
    )


def _of_labels(rows: Sequence[Rows], name: str, fill: float) -> Tensor | None:
    """Return an array of the rows at their labels, [M]; ``fill`` for rows read without it, None for all."""
    arrays = [getattr(part, name) for part in rows]
    if all(array is None for array in arrays):
        return None
    parts = (
        np.full(np.count_nonzero(part.loss_mask), fill, np.float32)
        if array is None
        else array[part.loss_mask]
        for part, array in zip(rows, arrays, strict=True)
    )
    return torch.from_numpy(np.concatenate([*parts]))


def _targets(rows: Sequence[Rows], vocab_size: int) -> Targets | None:
    """Join the rows' targets; entries at or beyond ``vocab_size`` count as tail."""
    width = max(0 if part.targets is None else part.targets.ids.shape[1] for part in rows)
    if not width:
        return None
    targets = Targets.concatenate(
        [
            Targets.absent(int(part.loss_mask.sum()), width) if part.targets is None else part.targets
            for part in rows
        ]
    )
    beyond = targets.ids >= vocab_size
    if not beyond.any():
        return targets
    outside = np.where(beyond, targets.logprobs, -np.inf)
    return Targets(
        np.where(beyond, np.int32(-1), targets.ids),
        np.where(beyond, np.float32(-np.inf), targets.logprobs),
        np.logaddexp.reduce(np.concatenate([outside, targets.tail_logprob[:, None]], axis=1), axis=1),
    )


def _unpack(
    segments: NDArray[np.uint16], label_positions: NDArray[np.int64], isolate_above: int | None
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Return ``Batch.documents`` (without labels, one token) and ``label_positions`` in them.

    Lengths between two powers of two share an array, so padding at most doubles the work. Padding repeats the
    last token behind the document, where no causal model looks.
    """
    starts = np.flatnonzero(document_positions(segments) == 0)
    lengths = np.diff(starts, append=segments.size)
    labelled = np.unique(np.searchsorted(starts, label_positions, side="right") - 1)
    starts, lengths = starts[labelled], lengths[labelled]
    kind = np.ceil(np.log2(lengths)) + (0 if isolate_above is None else 64 * (lengths > isolate_above))
    documents, unpacked, end = [], np.zeros(segments.size, np.int64), 0
    for group in np.unique(kind):
        first, length = starts[kind == group, None], lengths[kind == group, None]
        offset = np.arange(length.max())
        index = first + np.minimum(offset, length - 1)
        inside = offset < length
        unpacked[index[inside]] = end + np.flatnonzero(inside)
        end += index.size
        documents.append(index)
    return documents or [np.zeros((1, 1), np.int64)], unpacked[label_positions]


def document_positions(segments: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Count tokens from 0 in every segment: [n, S] -> int32 [n, S]."""
    index = np.arange(segments.shape[1], dtype=np.int32)
    is_first = np.ones(segments.shape, bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first: NDArray[np.int32] = np.maximum.accumulate(np.where(is_first, index, np.int32(0)), axis=1)
    return index - first


def reader(
    cache: Cache,
    *,
    targets: Sequence[bool],
    labels: Sequence[bool] | None = None,
    vocab_size: int,
    layout: Layout = PACKED,
) -> Callable[..., Batch]:
    """Return a function from (domain int64 [n], row int64 [n]) to the batch of these training rows.

    ``targets`` and ``labels`` [N]: False skips a domain's targets, and its labels' log-probabilities; None
    skips those of all.
    """

    def read(domain: NDArray[np.int64], row: NDArray[np.int64]) -> Batch:
        parts = {
            index: cache[cache.domains[index]].train.read(
                row[domain == index], targets=targets[index], labels=labels is not None and labels[index]
            )
            for index in np.unique(domain).tolist()
        }
        return make_batch(parts, vocab_size, layout)

    return read


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """Map ``function`` over items in threads, in order, at most ``ahead`` early; errors keep their turn."""
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
