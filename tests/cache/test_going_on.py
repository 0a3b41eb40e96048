"""Going on asks a store the same number of questions, however many shards are done."""

from collections import Counter
from typing import Any

import numpy as np
import obstore
import pytest
from cache_makers import SHARD_ROWS, VOCABULARY_MAP, make_manifest, make_rows
from obstore.store import MemoryStore

from ddk_cache import layout
from ddk_cache.writer import Writer, open_writer

MANIFEST = make_manifest("code", target={"kind": "label"})


def write_shards(writer: Writer, shards: int, *, done: int) -> None:
    """A domain of ``shards`` shards, the first ``done`` of them answered."""
    counts = {"rows": shards * SHARD_ROWS, "tokens": shards * SHARD_ROWS * 12, "labels": shards * 40}
    validation = {"rows": 1, "tokens": 12, "labels": 10}
    rest = {"limits": [None], "exhausted": True, "source_rows": 1, "source_tokens": 1, "documents": 1}
    rest |= {"skipped": {}, "left_over": 0, "held_out": None}
    rows = make_rows(SHARD_ROWS, 0)
    for shard in range(shards):
        writer.write_tokens("code", "train", shard, rows)
    writer.write_tokens("code", "validation", 0, make_rows(1, 0))
    writer.set_state(
        "code", layout.DomainState.model_validate({"train": counts, "validation": validation, **rest})
    )
    labels = np.where(rows["loss_mask"], np.float32(-1), np.float32(0))
    for shard in range(done):
        writer.write_answers("code", "train", shard, writer.pack("train", {"label_logprob": labels}))


@pytest.mark.parametrize("done", [4, 60])
def test_no_request_for_each_finished_shard(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    monkeypatch.setattr("ddk_cache.bucket.from_url", lambda _, **options: store)
    with open_writer("s3://bucket/cache", MANIFEST, VOCABULARY_MAP) as writer:
        write_shards(writer, done + 3, done=done)
    asked: Counter[str] = Counter()
    for name in ("get", "get_range", "list", "list_with_delimiter"):
        original = getattr(obstore, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
            asked[_name] += 1
            return _original(*args, **options)

        monkeypatch.setattr(f"ddk_cache.bucket.obstore.{name}", counting)
    with open_writer("s3://bucket/cache", MANIFEST, VOCABULARY_MAP) as writer:
        asked.clear()
        assert writer.has_tokens("code")
        assert writer.unfinished("code", "train") == [done, done + 1, done + 2]
        assert asked == {"get": 5, "list": 21, "list_with_delimiter": 3}
