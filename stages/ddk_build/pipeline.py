"""What one engine does: answer shard after shard; beside it, answers are encoded and written."""

import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ddk_build.scoring import Arrays, encode, offsets, score
from ddk_build.teacher import Teacher
from ddk_cache import codec, layout
from ddk_cache.progress import meter
from ddk_cache.writer import Writer

# Share of the corpus, and least and most tokens, that the teacher reads beforehand for the codec's tables.
CALIBRATION_SHARE, CALIBRATION_LEAST, CALIBRATION_MOST = 1 / 20, 2_048, 65_536

Place = tuple[str, layout.Split, int]  # domain, split, shard


def calibration_rows(totals: Mapping[str, int], manifest: layout.Manifest) -> dict[Place, NDArray[np.int64]]:
    """Train rows of every domain, evenly spread over its ``totals``: for each shard, their numbers in it."""
    share = sum(totals.values()) * manifest.seq_length * CALIBRATION_SHARE
    tokens = min(max(share, CALIBRATION_LEAST), CALIBRATION_MOST)
    wanted = math.ceil(tokens / manifest.seq_length / len(totals))
    chosen: dict[Place, NDArray[np.int64]] = {}
    for name, total in totals.items():
        rows = np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(np.int64))
        shards, within = np.divmod(rows, manifest.shard_rows)
        for shard in np.unique(shards).tolist():
            chosen[name, "train", shard] = within[shards == shard]
    return chosen


class Pipeline:
    """A teacher that answers shard after shard, while finished ones are encoded and written beside it.

    A shard's requests form a batch of their own; what calibration has read is not read again. No more
    shards wait than there are writers, so memory stays flat however slow the disk is. Leaving it waits for
    what is being written.
    """

    def __init__(self, writer: Writer, teacher: Teacher, number: int = 0) -> None:
        """``number``: the teacher's, in the manifest."""
        self._number = number
        self._writer, self._teacher = writer, teacher
        self._calibrated: dict[Place, tuple[NDArray[np.int64], Arrays]] = {}  # rows, and their answers
        self._writers = max(1, min(4, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(self._writers)
        self._waiting: deque[tuple[Place, Future[None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def calibrate(self) -> None:
        """Let the teacher read some train rows of each of its domains, and fit its tables to what it said."""
        manifest = self._writer.manifest
        names = manifest.domains_of(self._number)
        chosen = calibration_rows(
            {name: self._writer.split_state(name, "train").rows for name in names}, manifest
        )
        with meter("calibration", "rows", sum(map(len, chosen.values()))) as shown:
            for place, rows in chosen.items():
                self._calibrated[place] = rows, self._answers(place, rows)
                shown.advance(len(rows))
        ids, logprobs = (
            np.concatenate([found[name][found["ids"][..., 0] >= 0] for _, found in self._calibrated.values()])
            for name in ("ids", "logprobs")
        )
        codebook = codec.fit(ids, logprobs, manifest.target, manifest.vocab_size)
        self._writer.set_codebook(codebook, self._number)

    def capture(self, place: Place) -> list[Place]:
        """Let the teacher answer a shard; the shards that have been written since the last call."""
        known, said = self._calibrated.pop(place, (np.empty(0, np.int64), {}))
        rows = np.setdiff1d(np.arange(self._writer.rows(*place)), known)
        found = self._answers(place, rows)
        if said:
            gaps = np.searchsorted(rows, known)
            found = {name: np.insert(part, gaps, said[name], axis=0) for name, part in found.items()}
        self._waiting.append((place, self._pool.submit(self._store, place, found)))
        return self._written(self._writers)

    def finish(self) -> list[Place]:
        """Wait until all is written; the shards that have been since the last call."""
        return self._written(0)

    @cached_property
    def _codebook(self) -> codec.Codebook:
        codebook = self._writer.codebook(self._number)
        assert codebook is not None, "the calibration comes first"
        return codebook

    def _answers(self, place: Place, rows: NDArray[np.int64]) -> Arrays:
        """What the teacher says of the numbered rows of a shard; see ``scoring.score``."""
        domain, split, shard = place
        manifest = self._writer.manifest
        tokens = self._writer.read_tokens(*place)
        target = manifest.target if manifest.has_targets(split) else None
        draws = None
        if target and target.kind == "sampled":
            numbers = shard * manifest.shard_rows + rows
            draws = offsets(manifest.seed, domain, split, numbers.tolist(), manifest.seq_length)
        return score(self._teacher, {name: part[rows] for name, part in tokens.items()}, target, draws)

    def _written(self, most: int) -> list[Place]:
        """Take what is written off the queue until ``most`` shards are left there."""
        places = []
        while len(self._waiting) > most:
            place, future = self._waiting.popleft()
            future.result()
            places.append(place)
        return places

    def _store(self, place: Place, found: Arrays) -> None:
        if "ids" in found:
            found = encode(found, self._codebook, self._writer.manifest.target)
        self._writer.write_answers(*place, found)
