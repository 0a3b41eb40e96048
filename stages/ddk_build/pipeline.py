"""What one engine does with the shards that it is given: three stages, each busy with another part of them.

read    a thread reads the tokens of the next shard, and makes requests of them
ask     the teacher answers PIECE tokens at a time, one piece after another
write   threads put answers in their places, encode and compress them; when all of a shard's pieces are there,
        they become its objects, and its marker follows

A shard is what is stored and what is done again, not what the engine is asked: the next shard's requests are
there before the last piece of this one has been answered. Whatever is slow, no more is in memory than one
shard's requests ahead (40 bytes a token), PIECES pieces of answers ((8 E + 8) bytes a position, three times:
as the engine gave them, in place, as codes) and SHARDS shards in their compressed form. With 64 entries and
shards of 2^20 tokens that is 2.0 GB.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ddk_build.samples import calibration_rows
from ddk_build.scoring import Arrays, Requests, ask, encode, in_place, offsets, requests
from ddk_build.teacher import Answers, Teacher
from ddk_cache import codec, layout
from ddk_cache.writer import Packed, Writer

PIECE = 1 << 18  # tokens, padding included: 32 steps of an engine, of which the last may be half empty
PIECES = 4  # of answers in memory
SHARDS = 3  # that are being written

Place = tuple[str, layout.Split, int]  # domain, split, shard
Answered = Callable[[int, str], object]  # tokens, domain


def needs_codebook(writer: Writer, number: int) -> bool:
    """Whether the codec's tables of a teacher are still to be made; labels alone need none."""
    return writer.manifest.target.kind != "label" and writer.codebook(number) is None


def tokens_by_domain(writer: Writer, work: Sequence[Place]) -> dict[str, int]:
    """How many tokens the shards have."""
    found: Counter[str] = Counter()
    for place in work:
        found[place[0]] += writer.tokens(place)
    return found


class Pipeline:
    """A teacher that answers shard after shard. Leaving it waits for what is being written."""

    def __init__(self, writer: Writer, teacher: Teacher, number: int = 0) -> None:
        """``number``: the teacher's, in the manifest."""
        self._number = number
        self._writer, self._teacher = writer, teacher
        self._ahead: deque[tuple[Place, Future[list[Requests]]]] = deque()
        self._pieces: deque[Future[Packed]] = deque()
        self._shards: deque[tuple[Place, Future[None]]] = deque()
        self._reader = ThreadPoolExecutor(1)
        self._encoders = ThreadPoolExecutor(min(PIECES - 1, os.cpu_count() or 1))
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
        said: list[Arrays] = []
        for name in manifest.domains_of(self._number):
            rows, draws = calibration_rows(self._writer, name), None
            if manifest.target.kind == "sampled":
                draws = offsets(
                    manifest.seed, name, "train", range(len(rows["tokens"])), rows["tokens"].shape[1]
                )
            asked = requests(rows, draws)
            said.append(in_place(ask(self._teacher, asked, manifest.target), asked, manifest.target))
        ids, logprobs = (
            np.concatenate([found[name][found["ids"][..., 0] >= 0] for found in said])
            for name in ("ids", "logprobs")
        )
        codebook = codec.fit(ids, logprobs, manifest.target, manifest.vocab_size)
        self._writer.set_codebook(codebook, self._number)

    def take(self, place: Place, answered: Answered = lambda *_: None) -> list[Place]:
        """Take a shard on, let the teacher answer the one before; the shards written since the last call.

        ``answered`` hears of the tokens of each piece, and of its domain.
        """
        self._ahead.append((place, self._reader.submit(self._read, place)))
        if len(self._ahead) > 1:
            self._answer(*self._ahead.popleft(), answered)
        return self._written(SHARDS)

    def finish(self, answered: Answered = lambda *_: None) -> list[Place]:
        """Let the teacher answer what is left, wait until all is written; the shards since the last call."""
        while self._ahead:
            self._answer(*self._ahead.popleft(), answered)
        return self._written(0)

    def _read(self, place: Place) -> list[Requests]:
        """A shard's tokens as requests, in pieces."""
        tokens, total = self._writer.read_tokens(*place), self._writer.rows(*place)
        step = max(1, PIECE // self._writer.manifest.seq_length)
        return [
            self._requests(place, tokens, np.arange(first, min(first + step, total)))
            for first in range(0, total, step)
        ]

    def _requests(self, place: Place, tokens: Arrays, rows: NDArray[np.int64]) -> Requests:
        domain, split, shard = place
        manifest, draws = self._writer.manifest, None
        if manifest.has_targets(split) and manifest.target.kind == "sampled":
            numbers = shard * manifest.shard_rows + rows
            draws = offsets(manifest.seed, domain, split, numbers.tolist(), manifest.seq_length)
        return requests({name: part[rows] for name, part in tokens.items()}, draws)

    def _answer(self, place: Place, pieces: Future[list[Requests]], answered: Answered) -> None:
        split, parts = place[1], []
        tokens, rows = self._writer.tokens(place), self._writer.rows(*place)
        for asked in pieces.result():
            answers = ask(self._teacher, asked, self._target(split))
            answered(tokens * len(asked.mask) // rows, place[0])
            while len(self._pieces) > PIECES - 2:  # one more is the engine's
                self._pieces.popleft().result()
            parts.append(self._encoders.submit(self._encode, split, asked, answers))
            self._pieces.append(parts[-1])
        self._shards.append((place, self._writers.submit(self._write, place, parts)))

    def _target(self, split: layout.Split) -> layout.Target | None:
        manifest = self._writer.manifest
        return manifest.target if manifest.has_targets(split) else None

    def _encode(self, split: layout.Split, asked: Requests, answers: Answers | None) -> Packed:
        target = self._target(split)
        found = in_place(answers, asked, target)
        if target is not None:
            found = encode(found, self._codebook, target)
        return self._writer.pack(split, found)

    def _write(self, place: Place, parts: list[Future[Packed]]) -> None:
        packed = [part.result() for part in parts]
        whole = {name: [chunk for part in packed for chunk in part[name]] for name in packed[0]}
        self._writer.write_answers(*place, whole)

    @cached_property
    def _codebook(self) -> codec.Codebook:
        codebook = self._writer.codebook(self._number)
        assert codebook is not None, "the calibration comes first"
        return codebook

    def _written(self, most: int) -> list[Place]:
        """Take what is written off the queue until ``most`` shards are left there, and what else is done."""
        places = []
        while self._shards and (len(self._shards) > most or self._shards[0][1].done()):
            place, future = self._shards.popleft()
            future.result()
            places.append(place)
        return places
