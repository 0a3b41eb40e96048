"""Build, train's reader, info and verify against a real S3 protocol server on loopback."""

import multiprocessing
import random
import time
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import obstore
import pytest
from helpers.builds import finish, start, write_config, write_corpus
from helpers.stores import ObjectStore

import ddk_cache
from ddk_cache.cache.info import info
from ddk_cache.cache.verify import verify
from ddk_cache.errors import CacheError, CacheNotFoundError
from ddk_cache.storage import object_store as stores
from ddk_cache.storage.lock import locked
from ddk_cache.storage.storage import Storage
from tools.torture.subject import comparable

T = TypeVar("T")


@pytest.fixture(scope="module")
def bucket(object_store: ObjectStore) -> str:
    return object_store.url


def same(rows: ddk_cache.Rows, expected: ddk_cache.Rows) -> None:
    for name, values in rows.arrays().items():
        np.testing.assert_array_equal(values, expected.arrays()[name], err_msg=name)


def everything(url: str) -> dict[str, bytes]:
    storage = Storage(url)
    return {key: storage.read(key) or b"" for key in storage.sizes("")}


def test_a_killed_build_goes_on_and_gives_what_a_folder_would_hold(
    tmp_path: Path, teacher_folder: Path, bucket: str
) -> None:
    corpus = write_corpus(tmp_path, documents=8)
    local = write_config(tmp_path / "local.yaml", teacher_folder, corpus, cache=str(tmp_path / "cache"))
    assert finish(local) == 0, local.with_suffix(".log").read_text()
    url = f"{bucket}/some/cache"
    config = write_config(tmp_path / "remote.yaml", teacher_folder, corpus, cache=url)
    chance = random.Random(3)
    for kill in range(3):
        process = start(config)
        wanted = (kill + 1) * 60 + chance.randrange(30)
        while process.is_alive() and len(Storage(url).sizes("")) < wanted:
            time.sleep(0.02)
        process.kill()
        process.join()
        with pytest.raises(CacheError):
            ddk_cache.open_cache(url)
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    assert comparable(everything(url)) == comparable(everything(str(tmp_path / "cache")))
    assert not list(verify(url))
    found = info(url)
    assert found["complete"]
    assert found["bytes"] == info(str(tmp_path / "cache"))["bytes"]
    here, there = (ddk_cache.open_cache(place)["code"].train for place in (str(tmp_path / "cache"), url))
    rows = [len(here) - 1, 0, 3]
    same(here.read(rows), there.read(rows))


def test_rows_of_a_batch_are_asked_for_together(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = ddk_cache.open_cache(f"{bucket}/some/cache")["code"].train
    expected = split.read([3, 0, 2, 3], labels=False)
    asked: list[str] = []
    original = obstore.get_ranges

    def counted(store: Any, key: str, **spans: Any) -> object:
        asked.append(key.split("/")[2])
        return original(store, key, **spans)

    monkeypatch.setattr(obstore, "get_ranges", counted)
    found = split.read([3, 0, 2, 3], labels=False)
    arrays = ["codes", "entries", "gaps", "loss_mask", "rankings", "segments", "tail", "tokens"]
    assert sorted(asked) == arrays  # of one shard, each once; no label_logprob
    same(found, expected)


def test_a_spawned_worker_reads_a_pickled_cache(bucket: str) -> None:
    split = ddk_cache.open_cache(f"{bucket}/some/cache")["code"].train
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(methodcaller("read", [1, 0]), (split,))
    assert (found.tokens == split.read([1, 0]).tokens).all()


def test_damage_is_found(tmp_path: Path, teacher_folder: Path, bucket: str) -> None:
    url = f"{bucket}/some/cache"
    storage = Storage(url)
    key = "code/train/label_logprob/c/0/0"
    whole = storage.read(key)
    assert whole is not None
    with locked(url) as held:
        held.write(key, whole[:-7])
    assert [problem.location for problem in verify(url)] == ["code/train shard 0"]
    with locked(url) as held:
        held.write(key, whole)


def test_what_is_not_there_is_said_in_one_line(bucket: str) -> None:
    with pytest.raises(CacheNotFoundError, match="no cache here"):
        ddk_cache.open_cache(f"{bucket}/nothing")
    with pytest.raises(CacheError, match=r"missing|exist"):
        Storage("s3://no-such-bucket/cache").read_ranges([("a", 0, 1)])
    with pytest.raises(CacheError, match=r"no-such-bucket"), locked("s3://no-such-bucket/cache"):
        pass


def test_an_unreachable_store_is_said_in_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"{bucket}/x")
    assert isinstance(storage.objects, stores.ObjectStore)
    storage.objects.store = obstore.store.S3Store(
        "teachers",
        endpoint="http://127.0.0.1:9",
        allow_http=True,
        retry_config={"max_retries": 0},
        client_options={"allow_http": True},
    )
    monkeypatch.setattr("ddk_cache.storage.object_store.RETRY_TIMEOUT", 0.0)
    with pytest.raises(CacheError) as caught:
        storage.read("a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resets", [1, 3])
def test_a_connection_that_is_reset_costs_nothing(
    bucket: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, resets: int
) -> None:
    """Neither a deletion nor a conditional put is repeated by obstore: they might have arrived."""
    monkeypatch.setattr("ddk_cache.storage.object_store.FIRST_DELAY", 0.01)
    url = f"{bucket}/reset/{resets}"

    def survives(request: Callable[[], T]) -> T:
        object_store.resets = resets
        found = request()
        assert not object_store.resets
        return found

    with locked(url) as held:
        for key in ("an/array/c/0", "zarr.json"):  # a document is put only where its state is known
            for data in (b"one", b"two"):
                survives(partial(held.write, key, data))
                assert survives(partial(held.read, key)) == data
            survives(partial(held.delete, key))
            assert held.read(key) is None
        survives(held.heartbeat)
        object_store.resets = resets
    assert Storage(url).read("ddk.lock") is None
