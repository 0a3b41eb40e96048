"""Rows of a shard -> the documents that the teacher reads, and its answers -> the arrays that are stored."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.data.packing.teacher_prefix import decode, in_front
from ddk_build.teacher.engines import Answers
from ddk_cache.format import codec
from ddk_cache.format.codebook import Codebook
from ddk_cache.format.layout import SplitName, Target

Arrays = dict[str, NDArray[Any]]  # by name


@dataclass(frozen=True)
class Requests:
    """The documents of some rows that the teacher reads."""

    documents: list[NDArray[np.int32]]
    """Token ids, at least two a document."""
    positions: list[NDArray[np.int64]]
    """Of each document the token positions that are answered, as indices into the n * S: all but its last.
    -1, which carries no loss, at what the teacher alone reads."""
    loss_mask: NDArray[np.bool_]
    """[n, S]."""
    sampling_offsets: list[NDArray[np.float64]] | None = None
    """For a sampled target, those of each document's positions; see ``sampling_offsets``."""


def requests(
    rows: Mapping[str, NDArray[Any]], sampling_offsets: NDArray[np.float64] | None = None
) -> Requests:
    """Cut rows (``tokens``, ``segments``, ``loss_mask``, [n, S] each) into documents.

    A document ends with its last label: what follows changes nothing before it. A document without a label is
    left out. ``sampling_offsets`` [n, S] are the rows'. With ``teacher_prefix`` [n, W] each document stands
    behind its own prefix.
    """
    segments, mask = rows["segments"].ravel(), rows["loss_mask"].ravel()
    tokens = rows["tokens"].ravel().astype(np.int32)
    row = np.arange(segments.size) // rows["segments"].shape[1]
    starts = np.flatnonzero(np.diff(segments.astype(np.int64), prepend=-1) | np.diff(row, prepend=-1))
    documents, positions = [], []
    prefixes = None
    if "teacher_prefix" in rows:
        counts = rows["segments"].max(axis=1).tolist()
        prefixes = [list(decode(*pair)) for pair in zip(rows["teacher_prefix"], counts, strict=True)]
    for start, end in pairwise([*starts, segments.size]):
        labels = np.flatnonzero(mask[start:end])
        if segments[start] and len(labels):
            stop = start + labels[-1] + 1
            document, answered = tokens[start : stop + 1], np.arange(start, stop)
            if prefixes is not None:
                prefix = prefixes[row[start]][segments[start] - 1]
                document = in_front(prefix, document)
                answered = np.concatenate([np.full(len(prefix) - 1, -1), answered])
            documents.append(document)
            positions.append(answered)
    offsets = None
    if sampling_offsets is not None:
        offsets = [sampling_offsets.ravel()[document] for document in positions]
    return Requests(documents, positions, rows["loss_mask"].astype(np.bool_), offsets)


def sampling_offsets(
    seed: int, domain: str, split: SplitName, rows: Sequence[int], seq_length: int
) -> NDArray[np.float64]:
    """Return the offset of each token position's systematic draws, uniform in [0, 1): [n, S].

    Counter-based: an offset depends on (seed, domain, split, row, position) alone, so a shard that is
    answered again has the same draws.
    """
    digest = hashlib.sha256(f"{seed}/{domain}/{split}".encode()).digest()
    key = np.frombuffer(digest, "<u8")[:2]
    offsets = np.empty((len(rows), seq_length))
    for values, row in zip(offsets, rows, strict=True):
        np.random.Generator(np.random.Philox(key=key, counter=[0, row, 0, 0])).random(out=values)
    return offsets


def labelled(answers: Answers, asked: Requests) -> Answers:
    """Keep the answers at the M token positions that carry loss, row after row."""
    carries_loss = asked.loss_mask.ravel()[np.concatenate([np.empty(0, np.int64), *asked.positions])]
    return answers if carries_loss.all() else answers[carries_loss]


def encode(
    answers: Answers, loss_mask: NDArray[np.bool_], codebook: Codebook | None, target: Target
) -> Arrays:
    """Encode the answers at the labelled positions as the arrays that the writer stores, [n, width] each.

    Without ``codebook`` the labels' log-probabilities alone.
    """
    label_logprob = np.zeros(loss_mask.shape, np.float32)
    label_logprob[loss_mask] = answers.label_logprob
    arrays = {"label_logprob": label_logprob}
    return arrays if codebook is None else arrays | codec.encode(answers, loss_mask, codebook, target)
