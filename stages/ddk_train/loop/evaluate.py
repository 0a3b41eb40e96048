"""Measure the perplexity of student and teacher on each domain's validation split."""

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
from ddk_train.data.batches import Batch, make_batch, read_ahead
from ddk_train.loss.fused import DistillationLoss
from ddk_train.student.distributed import Ranks, measuring
from ddk_train.student.student import Student

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class Measured(NamedTuple):
    """Measures of a student on each domain's validation split, [N]."""

    student_ppl: Float64  # exp of the mean loss over the labels; infinite if that overflows
    standard_error: Float64
    """Of the mean loss, in nats, from its spread between rows, whose labels are correlated; NaN for
    one row. It ignores that chunks of one long document are correlated too."""
    validation_kl: Float64 | None
    """Forward KL over entries and tail at the cache's temperature, whatever the run minimises; mean over the
    labels, nats. None without validation targets."""
    validation_agreement: Float64 | None
    """Share of the labels for which the student's likeliest token is one of the teacher's likeliest entries.
    None without validation targets, and for ``sampled`` ones, whose most drawn token need not be the
    likeliest."""
    student_bits_per_byte: Float64 | None  # of the labels' text; None if the tokens' bytes are unknown
    teacher_bits_per_byte: Float64 | None


class _Sums(NamedTuple):
    """Sums over a domain's labels, and over its rows of a row's loss c and number of labels n."""

    loss: Any  # over the labels: the student's cross-entropy, nats
    kl: Any
    agreement: Any
    labels: Any
    squared_loss: Any  # over the rows: c², c n and n² give the spread of c about n times a mean
    loss_labels: Any
    squared_labels: Any
    teacher_loss: Any  # over the labels
    size: Any  # their bytes


def _sums(result: DistillationLoss, row: Tensor, rows: int, of_labels: list[float]) -> Tensor:
    """Return ``_Sums`` of a batch of ``rows`` rows, [9] float64; ``row`` [M] is the row of each label."""
    columns = result.row_cross_entropy, result.row_kl, result.row_agrees
    per_label = torch.stack([*columns, torch.ones_like(result.row_kl)]).double()
    per_row = per_label.new_zeros(4, rows).index_add_(1, row.to(per_label.device), per_label)
    loss, labels = per_row[0], per_row[3]
    spread = torch.stack([loss * loss, loss * labels, labels * labels])
    return torch.cat([torch.cat([per_row, spread]).sum(-1), loss.new_tensor(of_labels)])


def measure_student(
    student: Student,
    cache: Cache,
    ranks: Ranks,
    token_bytes: Int64 | None,
    between: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure perplexity and, if the validation splits have targets, the distance from the teacher.

    ``token_bytes`` [V] are the bytes of text of each token, or None if they are unknown. ``between`` is
    called before each batch and may raise to end the measurement. Raises CacheError if a domain's state
    disagrees with its rows.

    Each process measures its share of every group of ``world * batch_size`` rows. A sharded student needs all
    processes in every batch, so a process without rows left runs an empty one.
    """
    config = student.config
    batch_size, threads = config.per_device_train_batch_size, config.num_reader_threads
    work = [
        (domain, group + ranks.rank * batch_size)
        for domain, name in enumerate(cache.domains)
        for group in range(0, len(cache[name].validation), ranks.world * batch_size)
    ]
    targets = cache.manifest.has_targets("validation")

    def read(item: tuple[int, int]) -> tuple[Batch, Tensor, list[float]]:
        domain, first = item
        split = cache[cache.domains[domain]].validation
        indices = np.arange(first, min(first + batch_size, len(split)))
        rows = split.read(indices if indices.size else [0], targets=targets)
        if not indices.size:
            rows = replace(rows, loss_mask=np.zeros_like(rows.loss_mask), targets=None)
        assert rows.label_logprob is not None
        teacher_loss = -float(rows.label_logprob[rows.loss_mask].sum(dtype=np.float64))
        batch = make_batch({domain: rows}, student.vocab_size, student.layout)
        size = 0 if token_bytes is None else int(token_bytes[batch.labels.numpy()].sum())
        return batch, torch.from_numpy(np.nonzero(rows.loss_mask)[0]), [teacher_loss, size]

    sums = torch.zeros(len(cache.domains), len(_Sums._fields), dtype=torch.float64, device=ranks.device)
    parts = read_ahead(read, work, threads=threads, ahead=2 * threads)
    with measuring(student):
        for (domain, _), (host_batch, row, of_labels) in zip(work, parts, strict=True):
            between()
            [batch] = ranks.equalize([host_batch])
            result = student(batch.to(ranks.device), float(targets), measured_at=cache.target.temperature)
            sums[domain] += _sums(result, row, batch_size, of_labels)
    total = _Sums(*ranks.sum(sums).cpu().numpy().T)
    check_states(cache, total.labels, total.teacher_loss)
    loss = total.loss / total.labels
    rows = np.array([len(cache[name].validation) for name in cache.domains])
    with np.errstate(over="ignore"):
        perplexity = np.asarray(np.exp(loss))
    has_agreement = targets and cache.target.kind == "topk"
    bits = None if token_bytes is None or not total.size.all() else total.size * np.log(2)
    return Measured(
        perplexity,
        standard_error(total, rows),
        total.kl / total.labels if targets else None,
        total.agreement / total.labels if has_agreement else None,
        None if bits is None else total.loss / bits,
        None if bits is None else total.teacher_loss / bits,
    )


def standard_error(total: _Sums, rows: Int64) -> Float64:
    """Return the standard error of each domain's mean loss over its rows [N]; NaN for one row."""
    mean = total.loss / total.labels
    spread = total.squared_loss - 2 * mean * total.loss_labels + mean**2 * total.squared_labels
    error: Float64 = np.sqrt(spread.clip(0) * rows / (rows - 1).clip(1)) / total.labels
    error[rows == 1] = np.nan
    return error


def check_states(cache: Cache, labels: Float64, teacher_loss: Float64) -> None:
    """Raise CacheError if a state differs from the validation rows' labels [N] or teacher's loss [N]."""
    for name, count, loss in zip(cache.domains, labels.tolist(), teacher_loss.tolist(), strict=True):
        domain = cache[name]
        recorded, recorded_loss = domain.state.validation.labels, domain.teacher_cross_entropy
        if count != recorded:
            wrong = f"records {recorded:,} labels, and its validation rows have {count:,.0f}"
        elif not math.isclose(loss / count, recorded_loss, rel_tol=1e-6):  # float64 sums in another order
            wrong = (
                f"records a teacher's cross-entropy of {recorded_loss:.6g}, and its validation rows have "
                f"{loss / count:.6g}"
            )
        else:
            continue
        raise CacheError(
            f"{cache.storage.url}: domain {name!r} {wrong}: run ddk-cache verify, then build again"
        )


def teacher_perplexity(cache: Cache) -> Float64:
    """Return the teacher's perplexity over the same labels, [N], as the build measured it.

    Raises CacheError if a domain has no training rows or its validation split is not finished.
    """
    for name in cache.domains:
        if len(cache[name].train) == 0:
            raise CacheError(f"{cache.storage.url}: domain {name!r} has no training rows yet")
    return np.exp([cache[name].teacher_cross_entropy for name in cache.domains])
