"""A store reads and writes only in its folder, takes no secrets in URLs, and survives forks and pickling."""

import json
import multiprocessing
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from helpers.caches import zarr_array
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

import ddk_cache
from ddk_cache.cache import info as inspection
from ddk_cache.cache.reader import Cache
from ddk_cache.cache.verify import verify
from ddk_cache.errors import CacheError, ConfigError, UnreachableError
from ddk_cache.storage import object_store
from ddk_cache.storage.addresses import Revision, check_revision, refuse_credentials
from ddk_cache.storage.lock import locked
from ddk_cache.storage.storage import Storage, plain_errors
from ddk_cache.util.configuration import Config, load


def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, steps = tmp_path / "cache", list[Path]()
    with locked(str(folder)) as held:
        monkeypatch.setattr(os, "fsync", lambda file: steps.append(Path(f"/proc/self/fd/{file}").readlink()))
        held.write("a/b/object", b"data")
        assert (folder / "a/b/object").read_bytes() == b"data"
        staged = steps.pop(2)
        assert steps == [folder / "a", folder, folder / "a/b"]
        assert staged.parent == folder / "a/b"
        assert staged.name.startswith("object#")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with locked(str(tmp_path / "cache")) as held:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(CacheError, match=r"cache/a: No space left on device$"):
            held.write("a", b"data")
        assert os.listdir(tmp_path / "cache") == ["ddk.lock"]


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "device"])
def test_reading_does_not_leave_the_folder(tmp_path: Path, kind: str) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    (outside / "train").mkdir(parents=True)
    (outside / "train" / "tokens").write_bytes(b"secret")
    path = cache / "code/train/tokens"
    if kind == "folder":
        cache.mkdir()
        (cache / "code").symlink_to(outside)
    else:
        path.parent.mkdir(parents=True)
        if kind == "file":
            path.symlink_to(outside / "train" / "tokens")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
    storage = Storage(str(cache))  # opening a pipe could wait forever
    expected = "is not a regular file" if kind == "pipe" else "is a link that leads out of the cache"
    with pytest.raises(CacheError, match=expected):
        storage.read("code/train/tokens")
    with pytest.raises(CacheError, match=expected):
        storage.read_ranges([("code/train/tokens", -20, 0)])
    assert storage.sizes("") == {}


def test_writing_follows_no_link(tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    for folder in (cache / "prose", outside):
        folder.mkdir(parents=True)
        (folder / "tokens").write_bytes(b"old")
    (cache / "elsewhere").symlink_to(outside)
    (cache / "here").symlink_to(cache / "prose")
    (cache / "file").symlink_to(outside / "tokens")
    with locked(str(cache)) as storage:
        for link in ("elsewhere", "here"):
            with pytest.raises(CacheError, match="is behind a link to a folder, where nothing is written"):
                storage.write(f"{link}/tokens", b"new")
            with pytest.raises(CacheError, match="is behind a link"):
                storage.delete(f"{link}/tokens")
        storage.write("file", b"new")  # replaces the link
    assert not (cache / "file").is_symlink()
    assert [(folder / "tokens").read_bytes() for folder in (cache / "prose", outside)] == [b"old"] * 2


@pytest.fixture(params=["models--a--b/snapshots/0123", "datasets--a--b/snapshots/0123/data/cache"])
def snapshot(cache_folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a cache as huggingface_hub stores it: every file is a link to a blob."""
    snapshot = tmp_path / request.param
    blobs = tmp_path / request.param.partition("/")[0] / "blobs"
    blobs.mkdir(parents=True)
    for index, path in enumerate(sorted(path for path in cache_folder.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / str(index))
        link = snapshot / path.relative_to(cache_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(index), link.parent))
    return snapshot


def test_a_snapshot_of_a_hub_opens_as_it_is(snapshot: Path, cache_folder: Path) -> None:
    cache, original = ddk_cache.open_cache(str(snapshot)), ddk_cache.open_cache(str(cache_folder))
    assert Storage(str(snapshot)).sizes("") == Storage(str(cache_folder)).sizes("")
    for name in original.domains:
        rows, expected = (opened[name].train.read([0, 1]).arrays() for opened in (cache, original))
        assert rows.keys() == expected.keys()
        for array, values in rows.items():
            np.testing.assert_array_equal(values, expected[array])
    assert list(verify(str(snapshot))) == []
    assert inspection.info(str(snapshot))["bytes"] == inspection.info(str(cache_folder))["bytes"]
    assert zarr_array(cache, "code/train/tokens").shape == zarr_array(original, "code/train/tokens").shape


def test_a_link_of_a_snapshot_to_anything_else_is_refused(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    path = snapshot / "code/train/tokens/c/0/0"
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(CacheError, match="is a link that leads out of the cache"):
        Storage(str(snapshot)).read("code/train/tokens/c/0/0")


def test_links_inside_the_cache_are_followed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "code/train").mkdir(parents=True)
    (cache / "code/train/tokens").write_bytes(b"data")
    (cache / "code/validation").symlink_to("train")
    (cache / "prose").mkdir()
    (cache / "prose/tokens").symlink_to("../code/train/tokens")
    (cache / "code/train/loop").symlink_to("..")  # listed once
    storage = Storage(str(cache))
    for key in ("code/validation/tokens", "prose/tokens"):
        assert storage.read(key) == b"data"
        assert storage.read_ranges([(key, 1, 3)]) == [b"at"]
        assert storage.sizes("")[key] == 4
    assert len(storage.sizes("")) < 10


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/etc/passwd", "a//b", "./a", ""])
def test_an_invalid_key_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    with pytest.raises(CacheError, match="is not a valid key"):
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
        "https://host/data.jsonl?a=b&X-Amz-Credential=SECRET",
        "https://host/data.jsonl?access_token=SECRET",
        "https://host/data.jsonl?api_key=SECRET",
        "https://host/data.jsonl?%73ig=SECRET",
        "s3://bucket/cache#SECRET",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="contains credentials") as caught:
        Storage(url)
    assert "SECRET" not in str(caught.value)
    assert "user" not in str(caught.value)


class Revisions(Config):
    revision: Revision


@pytest.mark.parametrize(
    "revision",
    [
        "https://user:SECRET@host/x",
        "main?token=SECRET",
        "user:SECRET",
        "main#SECRET",
        "hf_SECRETSECRETSECRETSECRETSECRETSECR",
        "../SECRET",
        "SECRET key",
    ],
)
def test_credentials_in_a_revision_are_refused_and_not_repeated(tmp_path: Path, revision: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(json.dumps({"revision": revision}))
    with pytest.raises(
        ConfigError, match="revision: is not the name of a branch, a tag or a commit"
    ) as caught:
        load(path, [], Revisions)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "feature/x-1", "0" * 40, "1.0+cpu"])
def test_a_branch_a_tag_and_a_commit_are_revisions(revision: str) -> None:
    assert check_revision(revision) == revision


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
def test_a_worker_reads_a_cache_opened_by_its_parent(cache_folder: Path, method: str) -> None:
    cache = ddk_cache.open_cache(str(cache_folder))
    expected = int(cache["code"].train.read([0]).tokens[0, 0])
    context: Any = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    worker = context.Process(target=_first_row, args=(cache, answers))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    assert answers.get() == expected


def test_a_broken_response_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is obstore's for a store that goes away during a listing."""
    store = MemoryStore()
    message = "Generic S3 error: Error getting list response body: HTTP error: request or response body error"
    calls: Counter[str] = Counter()

    class Broken:
        def __getattr__(self, name: str) -> Any:
            def once(*arguments: Any, **options: Any) -> Any:
                calls[name] += 1
                if calls[name] == 1:
                    raise GenericError(message)
                return getattr(obstore, name)(*arguments, **options)

            return once

    monkeypatch.setattr(object_store, "from_url", lambda url, **options: store)
    obstore.put(store, "a/b/c/0", b"data")
    monkeypatch.setattr(object_store, "obstore", Broken())
    storage = Storage("s3://bucket/cache")
    assert storage.sizes("a/b") == {"a/b/c/0": 4}
    assert storage.read("a/b/c/0") == b"data"
    assert storage.read_ranges([("a/b/c/0", 1, 3)]) == [b"at"]
    assert calls == {"list_with_delimiter": 2, "list": 2, "get": 2, "get_ranges": 2}
    message = "Generic S3 error: no answer"
    calls.clear()
    with pytest.raises(CacheError, match="no answer"):
        storage.read("a/b/c/0")


def test_a_store_is_pickled_without_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_cache.storage.object_store.from_url", lambda url, **options: url)
    storage = Storage("s3://bucket/cache")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.objects is not storage.objects
    assert copy.url == storage.url


def test_a_forked_process_gets_an_error_instead_of_waiting_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_users", {os.getpid() + 1})
    with pytest.raises(
        CacheError, match="a forked process cannot read an object store; start workers with spawn"
    ):
        Storage("s3://bucket/cache")


def test_a_store_without_credentials_says_which_to_set() -> None:
    """The client then asks the metadata service that only machines of a cloud have."""
    request = "Error performing PUT http://169.254.169.254/latest/api/token in 12ms"
    expected = r"^s3://b/c: no credentials in the environment, .* set AWS_ACCESS_KEY_ID"
    with pytest.raises(UnreachableError, match=expected), plain_errors("s3://b/c"):
        raise GenericError(f"Generic S3 error: {request}")
