"""Perplexity on each domain's validation split: the student's, worked out in shares, and the teacher's."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_cache import Cache
from ddk_cache.errors import CacheError
from ddk_train.batches import Batch, make_batch, read_ahead
from ddk_train.distributed import Ranks, measuring
from ddk_train.student import Student

Float64 = NDArray[np.float64]

OF_LABELS = ("places", "labels", "domain", "ids", "logprobs", "tail_logprob")  # a Batch's, one for each label


class Measured(NamedTuple):
    """A student on each domain's validation split, [N]."""

    perplexity: Float64  # exp of the mean loss over the labels; not finite where that is too much
    standard_error: Float64
    """Of that mean loss, in nats, from its spread between rows, whose labels hang together; 0 where there is
    one row alone. Pieces of one long document hang together too, which is not in it."""
    kl: Float64 | None  # mean over the labels, nats; None without targets for the split
    agreement: Float64 | None
    """Share of the labels for which the student's likeliest token is the teacher's: its first entry, or one
    of those that are level with it in the cache. None without targets for the split, and for ``sampled``
    ones, where the token that was drawn most often need not be the likeliest."""


def measure_student(
    student: Student,
    cache: Cache,
    ranks: Ranks,
    *,
    batch_size: int,
    threads: int,
    between: Callable[[], None] = lambda: None,
) -> Measured:
    """Perplexity, and where the cache has targets for the validation splits how far from the teacher it is.

    ``between`` is called before each batch; what it raises ends the measurement. Raises CacheError where a
    domain's state has another number of labels, or another cross-entropy of the teacher, than its rows.

    Every process takes its share of each group of ``world * batch_size`` rows. All go through the same
    number of batches, empty ones where rows have run out, because a sharded student needs all of them.
    """
    work = [
        (number, group + ranks.rank * batch_size)
        for number, name in enumerate(cache.domains)
        for group in range(0, len(cache[name].validation), ranks.world * batch_size)
    ]

    targets = cache.manifest.has_targets("validation")

    def read(item: tuple[int, int]) -> tuple[Batch, Tensor, float]:
        """A batch, the row that each of its labels is in, [M], and the sum of the teacher's loss on them."""
        split = cache[cache.domains[item[0]]].validation
        wanted = np.arange(item[1], min(item[1] + batch_size, len(split)))
        rows = split.read(wanted if wanted.size else [0], targets=targets)
        batch = make_batch({item[0]: rows}, student.vocab_size, student.layout)
        if wanted.size:
            assert rows.label_logprob is not None
            teachers = -float(rows.label_logprob.sum(dtype=np.float64))
            return batch, torch.from_numpy(np.nonzero(rows.loss_mask)[0]), teachers
        found = {name: getattr(batch, name) for name in OF_LABELS}
        empty: dict[str, Any] = {name: x if x is None else x[:0] for name, x in found.items()}
        return replace(batch, **empty), batch.labels[:0], 0.0

    # Of each domain the sums over its labels: cross-entropy, KL, agreement, and their number; over its rows,
    # for the spread of their sums of cross-entropy c about a mean: c², c n and n² of n labels; and of the
    # teacher's cross-entropy.
    sums = torch.zeros(len(cache.domains), 8, dtype=torch.float64, device=ranks.device)
    batches = read_ahead(read, work, threads=threads, ahead=2 * threads)
    with measuring(student):
        for (number, _), (batch, row, teachers) in zip(work, batches, strict=True):
            between()
            [even] = ranks.equalize([batch])
            result = student(even.to(ranks.device), float(targets))
            found = result.row_cross_entropy, result.row_kl, result.row_agrees
            of_labels = torch.stack([*found, torch.ones_like(result.row_kl)]).double()
            of_rows = of_labels.new_zeros(4, batch_size).index_add_(1, row.to(ranks.device), of_labels)
            c, n = of_rows[0], of_rows[3]
            sums[number, :7] += torch.cat([of_rows, torch.stack([c * c, c * n, n * n])]).sum(-1)
            sums[number, 7] += teachers
    *totals, labels, squares, products, squared_labels, of_teacher = ranks.sum(sums).cpu().numpy().T
    check_states(cache, labels, of_teacher)
    cross_entropy, kl, agreement = (total / labels for total in totals)
    rows = np.array([len(cache[name].validation) for name in cache.domains])
    spread = squares - 2 * cross_entropy * products + cross_entropy**2 * squared_labels
    error = np.sqrt(spread.clip(0) * rows / (rows - 1).clip(1)) / labels
    with np.errstate(over="ignore"):
        perplexity = np.asarray(np.exp(cross_entropy))
    is_topk = cache.target.kind == "topk"
    return Measured(perplexity, error, kl if targets else None, agreement if targets and is_topk else None)


def check_states(cache: Cache, labels: Float64, of_teacher: Float64) -> None:
    """Raise CacheError where states have not the labels, [N], or the loss, [N], of the validation rows."""
    for name, count, loss in zip(cache.domains, labels.tolist(), of_teacher.tolist(), strict=True):
        domain = cache[name]
        recorded, known = domain.state.validation.labels, domain.teacher_cross_entropy
        if count != recorded:
            wrong = (
                f"the number of labels is recorded as {recorded:,}, and its validation rows have {count:,.0f}"
            )
        elif not math.isclose(loss / count, known, rel_tol=1e-6):  # sums of float64, in another order
            wrong = (
                f"the teacher's cross-entropy is recorded as {known:.6g}, and its validation rows have "
                f"{loss / count:.6g}"
            )
        else:
            continue
        raise CacheError(
            f"{cache.storage.url}: domain {name!r}: {wrong}: run ddk-cache verify, then build again"
        )


def teacher_perplexity(cache: Cache) -> Float64:
    """The teacher's over the same labels, [N]; measured when the cache was built.

    Raises
    ------
    CacheError
        A domain has no training rows, or its validation split is not finished.
    """
    for name in cache.domains:
        if len(cache[name].train) == 0:
            raise CacheError(f"{cache.storage.url}: domain {name!r} has no training rows yet")
    return np.exp([cache[name].teacher_cross_entropy for name in cache.domains])
