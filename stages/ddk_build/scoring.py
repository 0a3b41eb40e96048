"""Rows of a shard -> the documents that the teacher reads, and its answers -> the places they belong to."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.teacher import Answers, Teacher
from ddk_cache import codec
from ddk_cache.layout import SplitName, Target

Arrays = dict[str, NDArray[Any]]  # by name


@dataclass(frozen=True)
class Requests:
    """The documents of some rows that the teacher must read."""

    documents: list[NDArray[np.int32]]
    """Token ids, at least two a document."""
    places: list[NDArray[np.int64]]
    """Where each document's positions stand in the flattened rows [n * S]; one fewer than it has tokens."""
    mask: NDArray[np.bool_]
    """[n, S]; the positions that carry loss."""
    draws: list[NDArray[np.float64]] | None = None
    """For a sampled target, the ``offsets`` of each document's positions."""


def requests(rows: Mapping[str, NDArray[Any]], draws: NDArray[np.float64] | None = None) -> Requests:
    """Take rows (``tokens``, ``segments``, ``loss_mask``, [n, S] each) apart into documents.

    A document is cut after its last label: what comes later changes nothing before it. One without a label
    is not read at all. ``draws``: the rows' ``offsets``, [n, S].
    """
    segments, mask = rows["segments"].ravel(), rows["loss_mask"].ravel()
    tokens = rows["tokens"].ravel().astype(np.int32)
    seq_length = rows["segments"].shape[1]
    row = np.arange(segments.size) // seq_length
    starts = np.flatnonzero(np.diff(segments.astype(np.int64), prepend=-1) | np.diff(row, prepend=-1))
    documents, places = [], []
    for start, end in pairwise([*starts, segments.size]):
        labels = np.flatnonzero(mask[start:end])
        if segments[start] and len(labels):
            stop = start + labels[-1] + 1
            documents.append(tokens[start : stop + 1])
            places.append(np.arange(start, stop))
    chosen = None if draws is None else [draws.ravel()[place] for place in places]
    return Requests(documents, places, rows["loss_mask"].astype(np.bool_), chosen)


def offsets(
    seed: int, domain: str, split: SplitName, rows: Sequence[int], seq_length: int
) -> NDArray[np.float64]:
    """The offset of each position's systematic draws, uniform in [0, 1): [n, S].

    Counter-based: a position's offset depends on (seed, domain, split, row, position) alone, so a shard that
    is done again has the same draws.
    """
    key = hashlib.sha256(f"{seed}/{domain}/{split}".encode()).digest()
    words = np.frombuffer(key, "<u8")[:2]
    found = np.empty((len(rows), seq_length))
    for place, row in enumerate(rows):
        np.random.Generator(np.random.Philox(key=words, counter=[0, row, 0, 0])).random(out=found[place])
    return found


def ask(teacher: Teacher, asked: Requests, target: Target | None) -> Answers | None:
    """What the teacher says of the documents, one after another; None where there is none.

    ``target``: what is kept; None for a validation split, which keeps the labels' log-probabilities alone.
    """
    if not asked.documents:
        return None
    return teacher.score(asked.documents, asked.draws, labels_only=target is None)


def in_place(answers: Answers | None, asked: Requests, target: Target | None) -> Arrays:
    """The answers where their positions stand in the rows.

    Returns
    -------
    ``label_logprob`` float32 [n, S] and, with a target, ``ids`` int32 [n, S, E], ``logprobs`` float32
    [n, S, E], ``tail_logprob`` float32 [n, S]; 0, -1, -inf and -inf where a position has no label.
    """
    mask = asked.mask
    places = np.concatenate([np.empty(0, np.int64), *asked.places])
    wanted = mask.ravel()[places]
    places = places[wanted]

    def spread(name: str, fill: float, dtype: type, width: tuple[int, ...] = ()) -> NDArray[Any]:
        flat: NDArray[Any] = np.full((mask.size, *width), fill, dtype)
        if answers is not None:
            flat[places] = getattr(answers, name)[wanted]
        return flat.reshape(*mask.shape, *width)

    found = {"label_logprob": spread("label_logprob", 0, np.float32)}
    if target is not None:
        found["ids"] = spread("ids", -1, np.int32, (target.width,))
        found["logprobs"] = spread("logprobs", -np.inf, np.float32, (target.width,))
        found["tail_logprob"] = spread("tail_logprob", -np.inf, np.float32)
    return found


def encode(found: Arrays, codebook: codec.Codebook, target: Target) -> Arrays:
    """Turn the result of ``in_place`` into the arrays that the writer stores, [n, width] each by name."""
    coded = codec.encode(found["ids"], found["logprobs"], found["tail_logprob"], codebook, target)
    return {"label_logprob": found["label_logprob"]} | coded
