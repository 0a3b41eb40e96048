"""The teacher never waits for reading, and memory is bounded when the store is slow."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.caches import SHARD_ROWS, VOCABULARY, VOCABULARY_MAP, make_manifest, make_rows

from ddk_build.capture import pipeline
from ddk_build.capture.pipeline import BATCHES, SHARDS, Pipeline, ShardKey
from ddk_build.teacher.engines import Answers
from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.format import layout

WORK: list[ShardKey] = [ShardKey("code", "train", shard) for shard in range(12)]


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    monkeypatch.setattr("os.fsync", lambda _: None)
    rows = len(WORK) * SHARD_ROWS
    empty = {"rows": 0, "tokens": 0, "labels": 0}
    state: dict[str, Any] = {"train": {"rows": rows, "tokens": rows * 12, "labels": rows * 10}}
    state |= {"validation": empty, "limits": [None], "exhausted": True, "source_rows": 1}
    state |= {"source_tokens": 1, "documents": 1, "skipped": {}, "left_over": 0}
    manifest = make_manifest("code", target={"kind": "label"})
    with open_writer(str(tmp_path / "cache"), manifest, VOCABULARY_MAP) as writer:
        for shard in WORK:
            writer.write_tokens(*shard, make_rows(SHARD_ROWS, shard[2]))
        writer.set_state("code", layout.DomainState.model_validate(state))
        yield writer


class Teacher:
    """Answers -1 for every label; calls ``asked`` with the index of each call first."""

    engine, engine_version, vocab_size = "none", "0", VOCABULARY

    def __init__(self) -> None:
        self.calls = 0

    def asked(self, call: int) -> None: ...

    def submit(self, *documents: Any, **options: Any) -> list[Callable[[], Answers]]:
        answers = self.score(*documents, **options)
        return [lambda: answers]

    def drain(self) -> list[Callable[[], Answers]]:
        return []

    def score(
        self, documents: Sequence[np.ndarray], offsets: object = None, *, labels_only: bool = False
    ) -> Answers:
        self.asked(self.calls)
        self.calls += 1
        count = sum(map(len, documents)) - len(documents)
        absent = np.empty((count, 0), np.float32)
        gone = np.full(count, -np.inf, np.float32)
        return Answers(absent.astype(np.int32), absent, gone, np.full(count, -1, np.float32))

    def close(self) -> None: ...


def test_the_next_shard_is_read_while_the_teacher_answers(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {shard[2]: threading.Event() for shard in WORK}
    teacher, original = Teacher(), writer.read_tokens

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
    teacher, original = Teacher(), writer.write_answers
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
