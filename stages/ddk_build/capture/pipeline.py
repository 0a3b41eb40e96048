"""Answer shards with one engine, in three stages that run at the same time.

read    a thread reads the tokens of the next shard and makes requests of them
ask     the teacher gets batches of BATCH_TOKENS tokens, each before it has finished the one before
write   threads wait for the answers, encode and compress them; a shard's objects are written when its last
        batch is encoded, its commit record after them

A shard is the unit of storage and recovery, not of the engine's work: the engine's steps pass from one shard
to the next as from one batch to the next. Memory is bounded, whichever stage is slow: two shards' requests
(40 bytes a token), BATCHES batches of answers ((8 E + 8) bytes a position, twice: from the engine and as
codes) and SHARDS + 1 compressed shards. With 64 entries and shards of 2^20 tokens: 1.9 GB.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ddk_build.capture.samples import calibration_rows
from ddk_build.capture.scoring import Arrays, Requests, encode, labelled, requests, sampling_offsets
from ddk_build.teacher.engines import Answers, Teacher
from ddk_cache.cache.writer import EncodedRows, Writer
from ddk_cache.format import layout
from ddk_cache.format.codebook import Codebook, fit_codebook
from ddk_cache.format.layout import ShardKey

BATCH_TOKENS = 1 << 18  # padding included: 32 steps of an engine
BATCHES = 5  # of answers in memory; the engine holds two of them
SHARDS = 3  # that are being written

Progress = Callable[[int, str], object]  # tokens answered, domain


def needs_codebook(writer: Writer, teacher_index: int) -> bool:
    """Return whether a teacher's codebook is missing; labels alone need none."""
    return writer.manifest.target.kind != "label" and writer.codebook(teacher_index) is None


def tokens_by_domain(writer: Writer, shards: Sequence[ShardKey]) -> dict[str, int]:
    """Count the shards' tokens."""
    tokens: Counter[str] = Counter()
    for shard in shards:
        tokens[shard[0]] += writer.tokens(shard)
    return tokens


class Batch(NamedTuple):
    """Rows of a shard, which the teacher was asked to answer."""

    shard: ShardKey
    requests: Requests
    is_last: bool


class Pipeline:
    """A teacher that answers shard after shard; leaving the block waits for the writes."""

    def __init__(self, writer: Writer, teacher: Teacher, teacher_index: int = 0) -> None:
        """``teacher_index``: the teacher's in the manifest."""
        self._teacher_index = teacher_index
        self._writer, self._teacher = writer, teacher
        self._ahead: deque[tuple[ShardKey, Future[list[Requests]]]] = deque()
        self._submitted: deque[Batch] = deque()
        self._encoding: deque[Future[EncodedRows]] = deque()
        self._parts: list[Future[EncodedRows]] = []  # of the shard that is being answered
        self._shards: deque[tuple[ShardKey, Future[None]]] = deque()
        self._reader = ThreadPoolExecutor(1)
        self._encoders = ThreadPoolExecutor(min(BATCHES - 2, os.cpu_count() or 1))
        self._writers = ThreadPoolExecutor(SHARDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._reader, self._encoders, self._writers):
            pool.shutdown()

    def calibrate(self) -> None:
        """Let the teacher answer some rows of each of its domains, and fit its codebook to the answers."""
        manifest = self._writer.manifest
        parts: list[Answers] = []
        for domain in manifest.domains_of(self._teacher_index):
            rows = calibration_rows(self._writer, domain)
            asked = self._requests(ShardKey(domain, "train", 0), rows, np.arange(len(rows["tokens"])))
            parts.append(labelled(self._teacher.score(asked.documents, asked.sampling_offsets), asked))
        answers = Answers.concatenate(parts)
        codebook = fit_codebook(answers.ids, answers.logprobs, manifest.target, manifest.vocab_size)
        self._writer.set_codebook(codebook, self._teacher_index)

    def take(self, shard: ShardKey, progress: Progress = lambda *_: None) -> list[ShardKey]:
        """Queue a shard and ask for the one before; return the shards written since the last call.

        ``progress`` is called with the tokens of each batch that is answered, and their domain.
        """
        self._ahead.append((shard, self._reader.submit(self._read, shard)))
        if len(self._ahead) > 1:
            self._ask(*self._ahead.popleft(), progress)
        return self._written(SHARDS)

    def finish(self, progress: Progress = lambda *_: None) -> list[ShardKey]:
        """Answer the queued shards and wait until they are written; return the shards since the last call."""
        while self._ahead:
            self._ask(*self._ahead.popleft(), progress)
        self._pass_on(self._teacher.drain(), progress)
        return self._written(0)

    def _read(self, shard: ShardKey) -> list[Requests]:
        """Read a shard's tokens as requests, batch by batch."""
        tokens, total = self._writer.read_tokens(*shard), self._writer.rows(*shard)
        width = sum(tokens[name].shape[1] for name in ("tokens", "teacher_prefix") if name in tokens)
        step = max(1, BATCH_TOKENS // width)
        return [
            self._requests(shard, tokens, np.arange(first, min(first + step, total)))
            for first in range(0, total, step)
        ]

    def _requests(self, shard: ShardKey, tokens: Arrays, rows: NDArray[np.int64]) -> Requests:
        domain, split, index = shard
        manifest, offsets = self._writer.manifest, None
        if manifest.has_targets(split) and manifest.target.kind == "sampled":
            row_indices = index * manifest.shard_rows + rows
            offsets = sampling_offsets(
                manifest.seed, domain, split, row_indices.tolist(), manifest.seq_length
            )
        return requests({name: part[rows] for name, part in tokens.items()}, offsets)

    def _ask(self, shard: ShardKey, requested: Future[list[Requests]], progress: Progress) -> None:
        batches = requested.result()
        labels_only = not self._writer.manifest.has_targets(shard.split)
        for index, asked in enumerate(batches, 1):
            self._submitted.append(Batch(shard, asked, index == len(batches)))
            ready = self._teacher.submit(asked.documents, asked.sampling_offsets, labels_only=labels_only)
            self._pass_on(ready, progress)

    def _pass_on(self, ready: Sequence[Callable[[], Answers]], progress: Progress) -> None:
        """Encode the answers to the batches submitted first; write the shards that these complete."""
        for answers in ready:
            shard, asked, is_last = self._submitted.popleft()
            tokens, rows = self._writer.tokens(shard), self._writer.rows(*shard)
            progress(tokens * len(asked.loss_mask) // rows, shard.domain)
            while len(self._encoding) > BATCHES - 3:
                self._encoding.popleft().result()
            self._encoding.append(self._encoders.submit(self._encode, shard.split, asked, answers))
            self._parts.append(self._encoding[-1])
            if is_last:
                self._shards.append((shard, self._writers.submit(self._write, shard, self._parts)))
                self._parts = []

    def _encode(
        self, split: layout.SplitName, asked: Requests, answers: Callable[[], Answers]
    ) -> EncodedRows:
        manifest = self._writer.manifest
        codebook = self._codebook if manifest.has_targets(split) else None
        arrays = encode(labelled(answers(), asked), asked.loss_mask, codebook, manifest.target)
        return self._writer.encode_rows(split, arrays)

    def _write(self, shard: ShardKey, parts: list[Future[EncodedRows]]) -> None:
        compressed = [part.result() for part in parts]
        chunks = {name: [chunk for part in compressed for chunk in part[name]] for name in compressed[0]}
        self._writer.write_answers(*shard, chunks)

    @cached_property
    def _codebook(self) -> Codebook:
        codebook = self._writer.codebook(self._teacher_index)
        assert codebook is not None, "calibrate comes first"
        return codebook

    def _written(self, most: int) -> list[ShardKey]:
        """Return the shards that are written, after waiting until at most ``most`` are not."""
        written = []
        while self._shards and (len(self._shards) > most or self._shards[0][1].done()):
            shard, future = self._shards.popleft()
            future.result()
            written.append(shard)
        return written
