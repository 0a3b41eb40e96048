"""A store is a folder without ways out, or a URL without secrets; it survives forks and pickling."""

import multiprocessing
import os
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

import ddk_cache
from ddk_cache import bucket
from ddk_cache.addresses import refuse_credentials
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.lock import locked
from ddk_cache.reader import Cache
from ddk_cache.storage import Storage


def test_what_is_written_is_synced_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: steps.append(os.readlink(f"/proc/self/fd/{file}")))
    with locked(str(tmp_path / "cache")) as held:
        steps.clear()
        held.write("a/b/object", b"data")
        assert (tmp_path / "cache/a/b/object").read_bytes() == b"data"
    assert steps[0].startswith(str(tmp_path / "cache/a/b/object#"))
    assert set(steps[1:]) == {str(tmp_path / "cache" / name) for name in ("", "a", "a/b")} - {
        str(tmp_path / "cache") + "/"
    } | {str(tmp_path / "cache")}


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with locked(str(tmp_path / "cache")) as held:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CacheError, match=r"cache/a: No space left on device$"):
            held.write("a", b"data")
        assert os.listdir(tmp_path / "cache") == ["ddk.lock"]


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "device"])
def test_what_leads_out_of_the_folder_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    (outside / "train").mkdir(parents=True)
    (outside / "train" / "tokens").write_bytes(b"secret")
    place = cache / "code/train/tokens"
    if kind == "folder":
        cache.mkdir()
        (cache / "code").symlink_to(outside)
    else:
        place.parent.mkdir(parents=True)
        if kind == "file":
            place.symlink_to(outside / "train" / "tokens")
        elif kind == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to("/dev/zero")
    storage, start = Storage(str(cache)), time.monotonic()
    expected = "is not a regular file" if kind == "pipe" else "is a link"
    with pytest.raises(CacheError, match=expected):
        storage.read("code/train/tokens")
    with pytest.raises(CacheError, match=expected):
        storage.read_ranges([("code/train/tokens", -20, 0)])
    assert storage.sizes("") == {}
    if kind == "folder":
        with locked(str(cache)) as held, pytest.raises(CacheError, match="is a link"):
            held.write("code/train/tokens", b"other")
        assert (outside / "train" / "tokens").read_bytes() == b"secret"
    assert time.monotonic() - start < 10  # a pipe would wait for ever


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd", "a//b", "./a", ""])
def test_a_key_that_leads_elsewhere_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    with pytest.raises(CacheError, match="is no object's name"):
        Storage(str(tmp_path / "cache")).read(key)


def test_the_folder_itself_may_be_a_link(cache_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache_folder)
    assert ddk_cache.open_cache(str(tmp_path / "link")).complete


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:SECRET@bucket/cache",
        "s3://SECRET@bucket/cache",
        "https://user:SECRET@host/data.jsonl",
        "https://host/data.jsonl?X-Amz-Signature=SECRET",
        "az://container/cache?sig=SECRET",
        "zip://data.jsonl::https://user:SECRET@host/data.zip",
        "zip://data.jsonl::https://host/data.zip?sig=SECRET",
        "https://host\\@me:SECRET/data.jsonl",
        *(
            f"https://host/data.jsonl{mark}{name}=SECRET"
            for mark in ("?", "?a=b&", ";", "?a=b;", "#", "?a=b%26")
            for name in (
                *("auth", "Authorization", "pwd", "pass", "passwd", "password1", "secrets", "tokens", "sas"),
                *("access_token", "api_key", "apikey", "AccessKeyId", "AWSAccessKeyId", "X-Amz-Credential"),
                *("SIG", "%73ig", "jwt", "bearer", "session", "X-Goog-Signature", "credentials"),
            )
        ),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="credentials do not belong into a URL") as caught:
        Storage(url)
    assert "SECRET" not in str(caught.value)
    assert "user" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/cache",
        "s3://bucket/key=value/part-?.jsonl",
        "https://host:8080/data.jsonl?download=true&tokenizer=gpt2&author=me",
        "https://host/@user/data.jsonl",
        "zip://data.jsonl::https://host/data.zip",
    ],
)
def test_an_address_without_secrets_is_left_alone(url: str) -> None:
    assert refuse_credentials(url) == url


def _first_row(cache: Cache, answers: Any) -> None:
    answers.put(int(cache["code"].train.read([0]).tokens[0, 0]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_reads_what_its_parent_has_opened(cache_folder: Path, method: str) -> None:
    cache = ddk_cache.open_cache(str(cache_folder))
    expected = int(cache["code"].train.read([0]).tokens[0, 0])
    context: Any = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    worker = context.Process(target=_first_row, args=(cache, answers))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert answers.get() == expected


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By obstore's own word of a store that goes away while it lists; what has no answer obstore repeats."""
    store = MemoryStore()
    said = "Generic S3 error: Error getting list response body: HTTP error: request or response body error"
    broken: Counter[str] = Counter()

    class BreaksOff:
        def __getattr__(self, name: str) -> Any:
            def once(*arguments: Any, **options: Any) -> Any:
                broken[name] += 1
                if broken[name] == 1:
                    raise GenericError(said)
                return getattr(obstore, name)(*arguments, **options)

            return once

    monkeypatch.setattr(bucket, "from_url", lambda url, **options: store)
    obstore.put(store, "a/b/c/0", b"data")
    monkeypatch.setattr(bucket, "obstore", BreaksOff())
    there = Storage("s3://bucket/cache")
    assert there.sizes("a/b") == {"a/b/c/0": 4}
    assert there.read("a/b/c/0") == b"data"
    assert there.read_ranges([("a/b/c/0", 1, 3)]) == [b"at"]
    assert broken == {"list_with_delimiter": 2, "list": 2, "get": 2, "get_ranges": 2}
    said = "Generic S3 error: no answer"
    broken.clear()
    with pytest.raises(CacheError, match="no answer"):
        there.read("a/b/c/0")


def test_a_store_is_pickled_without_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_cache.bucket.from_url", lambda url, **options: url)
    storage = Storage("s3://bucket/cache")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.objects is not storage.objects
    assert copy.url == storage.url


def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket, "_users", {os.getpid() + 1})
    with pytest.raises(CacheError, match="forked process; let workers be spawned"):
        Storage("s3://bucket/cache")
