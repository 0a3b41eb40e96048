"""The teacher never waits for reading, and memory is bounded when the store is slow."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.caches import SHARD_ROWS, VOCABULARY, VOCABULARY_MAP, make_manifest, make_rows

from ddk_build.capture import pipeline
from ddk_build.capture.pipeline import BATCHES, SHARDS, Pipeline, ShardKey
from ddk_build.teacher.engines import Answers, Teacher
from ddk_cache import open_cache
from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.format import layout

WORK: list[ShardKey] = [ShardKey("code", "train", shard) for shard in range(12)]
HELD_OUT = ShardKey("code", "validation", 0)


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    monkeypatch.setattr("os.fsync", lambda _: None)
    rows = len(WORK) * SHARD_ROWS
    state: dict[str, Any] = {
        split: {"rows": count, "tokens": count * 12, "labels": count * 10}
        for split, count in (("train", rows), ("validation", SHARD_ROWS))
    }
    state |= {"limits": [None], "exhausted": True, "source_rows": 1}
    state |= {"source_tokens": 1, "documents": 1, "skipped": {}, "left_over": 0}
    manifest = make_manifest("code", target={"kind": "label"})
    with open_writer(str(tmp_path / "cache"), manifest, VOCABULARY_MAP) as writer:
        for shard in (*WORK, HELD_OUT):
            writer.write_tokens(*shard, make_rows(SHARD_ROWS, shard[2]))
        writer.set_state("code", layout.DomainState.model_validate(state))
        yield writer


class Lagging(Teacher):
    """Answers each label with a number of its own, ``lag`` calls late; calls ``asked`` at each call."""

    vocab_size = VOCABULARY

    def __init__(self, lag: int = 0) -> None:
        self.lag, self.calls = lag, 0
        self.waiting: deque[Answers] = deque()

    def asked(self, call: int) -> None: ...

    def submit(
        self, documents: Sequence[np.ndarray], offsets: object = None, *, labels_only: bool = False
    ) -> list[Callable[[], Answers]]:
        self.asked(self.calls)
        self.calls += 1
        labels = np.concatenate([document[1:] for document in documents])
        absent = np.empty((len(labels), 0), np.float32)
        gone = np.full(len(labels), -np.inf, np.float32)
        logprobs = (-labels / 100).astype(np.float32)
        self.waiting.append(Answers(absent.astype(np.int32), absent, gone, logprobs))
        return self._answered(self.lag)

    def drain(self) -> list[Callable[[], Answers]]:
        return self._answered(0)

    def _answered(self, left: int) -> list[Callable[[], Answers]]:
        ready = [self.waiting.popleft() for _ in range(len(self.waiting) - left)]
        return [partial(Answers.concatenate, [answers]) for answers in ready]


@pytest.mark.parametrize("lag", [0, 2, 7])
@pytest.mark.parametrize("batch_tokens", [1, 1 << 18])
def test_answers_that_come_late_go_to_their_rows(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, lag: int, batch_tokens: int
) -> None:
    """They cross batches and shards, and no shard is left when the work is finished."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", batch_tokens)
    counted: list[int] = []
    with Pipeline(writer, Lagging(lag)) as feed:
        shards = [*WORK, HELD_OUT]
        written = [done for shard in shards for done in feed.take(shard, lambda n, _: counted.append(n))]
        written += feed.finish(lambda n, _: counted.append(n))
    assert written == shards
    assert sum(counted) == sum(map(writer.tokens, shards))
    writer.finalize_domain("code")
    split = open_cache(writer.url)["code"].train
    rows = split.read(range(len(split)))
    assert rows.label_logprob is not None
    labels = rows.tokens[:, 1:][rows.loss_mask[:, :-1]]
    np.testing.assert_allclose(rows.label_logprob[rows.loss_mask], -labels / 100, atol=1e-3)


def test_the_next_shard_is_read_while_the_teacher_answers(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {shard[2]: threading.Event() for shard in WORK}
    teacher, original = Lagging(), writer.read_tokens

    def read_tokens(*shard: Any) -> Any:
        tokens = original(*shard)
        read[shard[2]].set()
        return tokens

    def asked(call: int) -> None:
        if call + 1 < len(WORK):
            assert read[call + 1].wait(20), "the teacher would have to wait for it"

    monkeypatch.setattr(writer, "read_tokens", read_tokens)
    monkeypatch.setattr(teacher, "asked", asked)
    with Pipeline(writer, teacher) as feed:
        written = [done for shard in WORK for done in feed.take(shard)] + feed.finish()
    assert sorted(written) == WORK
    assert writer.unfinished("code", "train") == []


def test_memory_is_bounded_as_documented(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store slower than the teacher: batches, of a row each, that are answered and not yet written."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 1)
    teacher, original = Lagging(), writer.write_answers
    held: list[int] = []
    written = 0

    def write_answers(*arguments: Any) -> None:
        nonlocal written
        time.sleep(0.05)
        original(*arguments)
        written += SHARD_ROWS

    monkeypatch.setattr(writer, "write_answers", write_answers)
    monkeypatch.setattr(teacher, "asked", lambda call: held.append(call - written))
    with Pipeline(writer, teacher) as feed:
        for shard in WORK:
            feed.take(shard)
        feed.finish()
    assert teacher.calls == len(WORK) * SHARD_ROWS
    # SHARDS are being written, and another is being answered.
    assert SHARDS * SHARD_ROWS <= max(held) <= (SHARDS + 1) * SHARD_ROWS + BATCHES
    assert writer.unfinished("code", "train") == []


def test_answers_wait_to_be_encoded_in_a_bounded_number(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding slower than the teacher."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 1)
    teacher, original = Lagging(), pipeline.encode
    waiting: list[int] = []
    encoded = 0

    def encode(*arguments: Any) -> Any:
        nonlocal encoded
        time.sleep(0.02)
        encoded += 1
        return original(*arguments)

    monkeypatch.setattr(pipeline, "encode", encode)
    monkeypatch.setattr(teacher, "asked", lambda call: waiting.append(call - encoded))
    with Pipeline(writer, teacher) as feed:
        for shard in WORK:
            feed.take(shard)
        feed.finish()
    assert 1 < max(waiting) <= BATCHES - 2
