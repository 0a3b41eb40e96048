"""Resuming takes the same number of requests, however many shards are done."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from helpers.caches import SHARD_ROWS, VOCABULARY_MAP, make_manifest, make_rows
from obstore.store import MemoryStore

from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.errors import CacheError
from ddk_cache.format import layout
from ddk_cache.storage.lock import joined

MANIFEST = make_manifest("code", target={"kind": "label"})


def write_shards(writer: Writer, shards: int, *, done: int) -> None:
    """Write a domain of ``shards`` shards, the first ``done`` of them answered."""
    counts = {"rows": shards * SHARD_ROWS, "tokens": shards * SHARD_ROWS * 12, "labels": shards * 40}
    validation = {"rows": 1, "tokens": 12, "labels": 10}
    rest = {"limits": [None], "exhausted": True, "source_rows": 1, "source_tokens": 1, "documents": 1}
    rest |= {"skipped": {}, "left_over": 0}
    rows = make_rows(SHARD_ROWS, 0)
    for shard in range(shards):
        writer.write_tokens("code", "train", shard, rows)
    writer.write_tokens("code", "validation", 0, make_rows(1, 0))
    writer.set_state(
        "code", layout.DomainState.model_validate({"train": counts, "validation": validation, **rest})
    )
    labels = np.where(rows["loss_mask"], np.float32(-1), np.float32(0))
    for shard in range(done):
        writer.write_answers("code", "train", shard, writer.encode_rows("train", {"label_logprob": labels}))


@pytest.mark.parametrize("done", [4, 60])
def test_no_request_for_each_finished_shard(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    monkeypatch.setattr("ddk_cache.storage.object_store.from_url", lambda _, **options: store)
    with open_writer("s3://bucket/cache", MANIFEST, VOCABULARY_MAP) as writer:
        write_shards(writer, done + 3, done=done)
    requests: Counter[str] = Counter()
    for name in ("get", "get_range", "list", "list_with_delimiter"):
        original = getattr(obstore, name)

        def counting(*args: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
            requests[_name] += 1
            return _original(*args, **options)

        monkeypatch.setattr(f"ddk_cache.storage.object_store.obstore.{name}", counting)
    with open_writer("s3://bucket/cache", MANIFEST, VOCABULARY_MAP) as writer:
        requests.clear()
        assert writer.has_tokens("code")
        assert writer.unfinished("code", "train") == [done, done + 1, done + 2]
        assert requests == {"get": 3, "list": 12, "list_with_delimiter": 2}  # each split is listed once


def test_a_listing_is_not_older_than_the_last_change(tmp_path: Path) -> None:
    """By this writer, or by one with a granted token."""
    url = str(tmp_path / "cache")
    with open_writer(url, MANIFEST, VOCABULARY_MAP) as writer:
        write_shards(writer, 4, done=1)
        assert writer.unfinished("code", "train") == [1, 2, 3]
        labels = np.where(make_rows(SHARD_ROWS, 0)["loss_mask"], np.float32(-1), np.float32(0))
        answers = writer.encode_rows("train", {"label_logprob": labels})
        writer.write_answers("code", "train", 1, answers)
        assert writer.unfinished("code", "train") == [2, 3]
        (tmp_path / "cache" / layout.ShardKey("code", "train", 0).object("tokens")).write_bytes(b"damage")
        with pytest.raises(CacheError, match="are damaged: run build again"):
            writer.read_tokens("code", "train", 0)
        assert writer.unfinished("code", "train") == [0, 2, 3]
        writer.write_tokens("code", "train", 0, make_rows(SHARD_ROWS, 0))
        assert writer.has_tokens("code")
        other = Writer(joined(url, writer.holder.grant()), MANIFEST)
        for shard in (0, 2, 3):
            other.write_answers("code", "train", shard, answers)
        other.write_answers(
            "code", "validation", 0, other.encode_rows("validation", {"label_logprob": labels[:1]})
        )
        assert writer.finalize_domain("code").complete
        assert writer.unfinished("code", "train") == []
