"""Rows of a cache in the tokens of another tokenizer, and the loss ALM, which compares the two by chunks."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_cache import Rows
from ddk_train.data.batches import Batch, make_batch
from ddk_train.student.spelling import Spelling
from ddk_train.student.tokenizer import read_tokenizer

Int64 = NDArray[np.int64]

TEMPERATURE = 100.0  # of ALM


class Part(NamedTuple):
    """A row's part of a document in the other tokens [L]. A chunk ends where a token of both ends."""

    tokens: Int64
    mask: NDArray[np.bool_]  # [L], where the next token is a label
    chunk: Int64  # [M], of each label; -1 outside
    teacher: NDArray[np.float64]  # [C], the teacher's log-probability of each chunk, nats
    in_chunks: Int64  # positions in the row of the labels of these chunks in the teacher's tokens
    size: int  # bytes of all chunks


class Respeller:
    """Reads rows of a cache in the tokens of another tokenizer; both are of byte-level kind."""

    def __init__(self, teacher: Path, other: Path) -> None:
        tokenizers = [read_tokenizer("tokenizer", str(folder)) for folder in (teacher, other)]
        self._old, self._new = map(Spelling, tokenizers)
        self._encode = tokenizers[1].backend_tokenizer.encode
        self._ends = [spelling.roles["eos_token"] for spelling in (self._old, self._new)]

    def respell(self, rows: Rows) -> list[Part]:
        """Return the parts of one row, which was read with its labels' log-probabilities."""
        segments = rows.segments[0]
        return [
            self._part(rows, np.flatnonzero(segments == index)) for index in range(1, int(segments.max()) + 1)
        ]

    def _part(self, rows: Rows, at: Int64) -> Part:
        """Return the part of a document at the positions ``at``; its end counts as one byte in chunks."""
        assert rows.label_logprob is not None
        tokens, labelled = rows.tokens[0, at].tolist(), np.flatnonzero(rows.loss_mask[0, at])
        is_end = tokens[-1] == self._ends[0]
        text = b"".join(self._old.texts.get(token, b"") for token in tokens)
        broken = next((i for i, byte in enumerate(text) if byte & 0xC0 != 0x80), 0)  # a character was cut
        other = self._encode(text[broken:].decode(errors="ignore")).ids + [self._ends[1]] * is_end
        old = np.cumsum([len(self._old.texts.get(token, b" ")) for token in tokens])
        new = broken + np.cumsum([len(self._new.texts.get(token, b" ")) for token in other])
        begin = old[labelled[0]] if labelled.size else old[-1]  # the context before it has no labels
        mask = np.append(new[:-1] >= begin, False)
        ends = np.intersect1d(old[old >= begin], new)
        of_old, of_new = chunks(ends, old[labelled]), chunks(ends, new[mask])
        inside = labelled[of_old >= 0]
        teacher = np.zeros(max(len(ends) - 1, 0))
        np.add.at(teacher, of_old[of_old >= 0], rows.label_logprob[0, at[inside]])
        size = int(ends[-1] - ends[0]) - is_end if len(teacher) else 0
        return Part(np.array(other), mask, of_new, teacher, at[inside], size)


def chunks(ends: Int64, starts: Int64) -> Int64:
    """Return between which two of ``ends`` the tokens at ``starts`` are, [M]; -1 for those outside."""
    index = np.searchsorted(ends, starts, side="right") - 1
    return np.where(index < len(ends) - 1, index, -1)


def join(rows: Sequence[Sequence[Part]], vocab_size: int) -> tuple[Batch, Tensor, Tensor]:
    """Return rows as a batch, the chunk of each label [M], and the teacher's log-probability of each [C]."""
    shape = len(rows), max(sum(len(part.tokens) for part in row) for row in rows)
    packed = Rows(np.zeros(shape, np.int32), np.zeros(shape, np.uint16), np.zeros(shape, np.bool_))
    chunk, first = [], 0
    for index, row in enumerate(rows):
        begin = 0
        for segment, part in enumerate(row, start=1):
            at = index, slice(begin, begin + len(part.tokens))
            packed.tokens[at], packed.segments[at], packed.loss_mask[at] = part.tokens, segment, part.mask
            chunk.append(np.where(part.chunk < 0, -1, part.chunk + first))
            begin, first = begin + len(part.tokens), first + len(part.teacher)
    teacher = np.concatenate([part.teacher for row in rows for part in row]).astype(np.float32)
    batch = make_batch({0: packed}, vocab_size)
    return batch, torch.from_numpy(np.concatenate(chunk)), torch.from_numpy(teacher)


def alm(logprob: Tensor, chunk: Tensor, teacher: Tensor) -> Tensor:
    """Return ALM (arXiv 2503.20083) over the labels' number, times its temperature.

    The binary cross-entropy of each chunk's likelihood, to the power of 1 / temperature, with the teacher's.
    ``logprob`` [M] is that of the student's labels, ``chunk`` [M] their chunk or -1, ``teacher`` [C].
    """
    inside = chunk >= 0
    student = torch.zeros_like(teacher).index_add(0, chunk[inside], logprob[inside])
    p, log_q = (teacher / TEMPERATURE).exp(), (student / TEMPERATURE).clamp(max=-1e-6)
    terms = p * log_q + (1 - p) * (-log_q.expm1()).log()
    return -terms.sum() * TEMPERATURE / len(logprob)
