"""What one engine does: answer shard after shard; beside it, answers are encoded and written."""

import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from ddk_build.scoring import Arrays, encode, offsets, score
from ddk_build.teacher import Teacher
from ddk_cache import codec, layout
from ddk_cache.progress import meter
from ddk_cache.writer import Writer

# Share of the corpus, and least and most tokens, that the teacher reads beforehand for the codec's tables.
CALIBRATION_SHARE, CALIBRATION_LEAST, CALIBRATION_MOST = 1 / 20, 2_048, 65_536

Place = tuple[str, layout.Split, int]  # domain, split, shard


def calibrate(writer: Writer, teacher: Teacher) -> codec.Codebook:
    """Let the teacher read some train rows of every domain, evenly spread, and fit the codec's tables."""
    manifest = writer.manifest
    totals = {domain.name: writer.split_state(domain.name, "train").rows for domain in manifest.domains}
    share = sum(totals.values()) * manifest.seq_length * CALIBRATION_SHARE
    tokens = min(max(share, CALIBRATION_LEAST), CALIBRATION_MOST)
    wanted = math.ceil(tokens / manifest.seq_length / len(totals))
    ids, logprobs = [], []
    with meter("calibration", "rows", wanted * len(totals)) as shown:
        for name, total in totals.items():
            for row in np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int)).tolist():
                shard, first = divmod(row, manifest.shard_rows)
                found = answers(writer, teacher, (name, "train", shard), first, first + 1)
                there = found["ids"][..., 0] >= 0
                ids.append(found["ids"][there])
                logprobs.append(found["logprobs"][there])
                shown.advance(1)
    codebook = codec.fit(np.concatenate(ids), np.concatenate(logprobs), manifest.target, manifest.vocab_size)
    writer.set_codebook(codebook)
    return codebook


class Pipeline:
    """A teacher that answers shard after shard, while finished ones are encoded and written beside it.

    A shard's requests form a batch of their own, so its answers depend on that shard alone. No more shards
    wait than there are writers, so memory stays flat however slow the disk is. Leaving it waits for what is
    being written.
    """

    def __init__(self, writer: Writer, teacher: Teacher, codebook: codec.Codebook) -> None:
        self._writer, self._teacher, self._codebook = writer, teacher, codebook
        self._writers = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(self._writers)
        self._waiting: deque[tuple[Place, Future[None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def capture(self, place: Place) -> list[Place]:
        """Let the teacher answer a shard; the shards that have been written since the last call."""
        before = self._writer.read_answers(*place)
        found = answers(self._writer, self._teacher, place, first=len(before["label_logprob"]))
        self._waiting.append((place, self._pool.submit(self._store, place, before, found)))
        return self._written(self._writers)

    def finish(self) -> list[Place]:
        """Wait until all is written; the shards that have been since the last call."""
        return self._written(0)

    def _written(self, most: int) -> list[Place]:
        """Take what is written off the queue until ``most`` shards are left there."""
        places = []
        while len(self._waiting) > most:
            place, future = self._waiting.popleft()
            future.result()
            places.append(place)
        return places

    def _store(self, place: Place, before: Arrays, found: Arrays) -> None:
        if len(found["label_logprob"]):
            stored = encode(found, self._codebook, self._writer.manifest.target)
            before = {name: np.concatenate([before[name], stored[name]]) for name in stored}
        self._writer.write_answers(*place, before)


def answers(writer: Writer, teacher: Teacher, place: Place, first: int = 0, end: int | None = None) -> Arrays:
    """What the teacher says of the rows ``first`` to ``end`` of a shard; see ``scoring.score``."""
    domain, split, shard = place
    manifest = writer.manifest
    tokens = writer.read_tokens(*place)
    assert tokens is not None, "tokenise saw to it that they are whole"
    rows = {name: values[first:end] for name, values in tokens.items()}
    target = manifest.target if split == "train" else None
    draws = None
    if target and target.kind == "sampled":
        numbers = shard * manifest.shard_rows + np.arange(len(tokens["tokens"]))[first:end]
        draws = offsets(manifest.seed, domain, split, numbers.tolist(), manifest.seq_length)
    return score(teacher, rows, target, draws)
