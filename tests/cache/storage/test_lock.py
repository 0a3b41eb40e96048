"""The lock has one holder, whichever process is suspended, killed, resumed or started at the same time."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.caches import VOCABULARY_MAP, make_manifest, read_files, write_domain
from obstore.store import MemoryStore

from ddk_cache.cache.writer import open_writer
from ddk_cache.errors import CacheError
from ddk_cache.storage import lock
from ddk_cache.storage.folder import Folder
from ddk_cache.storage.lock import LOCK_KEY, Holder, locked
from ddk_cache.storage.object_store import ObjectStore
from ddk_cache.storage.storage import Storage

TRIALS = 100


NO_PROCESS = 1 << 22  # the kernel's ids are below


def dead_lock(folder: Path | None = None, **changes: Any) -> bytes:
    """Return the lock of a dead process of this machine, in a folder or an object store, with ``changes``."""
    holder = object.__new__(Holder)
    holder.write_token, holder._grants, holder._heartbeats = "dead", [], 0
    holder._claim = None if folder is None else [folder.stat().st_dev, folder.stat().st_ino]
    return json.dumps(json.loads(holder.content()) | {"process": NO_PROCESS} | changes).encode()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def memory_store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Return an object store in memory, with conditional puts, to which every URL leads."""
    store = MemoryStore()
    monkeypatch.setattr("ddk_cache.storage.object_store.from_url", lambda _, **options: store)
    return store


def acquire_together(url: str, stack: ExitStack, barrier: threading.Barrier, won: list[Holder]) -> None:
    """Take the lock and hold it until the stack ends; the loser gets an error."""
    barrier.wait()
    with suppress(CacheError):
        won.append(stack.enter_context(locked(url, wait=False)))


@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_one_of_two_processes_gets_a_stale_lock(cache: Path, memory_store: MemoryStore, kind: str) -> None:
    url = str(cache) if kind == "folder" else "s3://bucket/cache"
    winners = []
    for _ in range(TRIALS):
        if kind == "folder":
            (cache / LOCK_KEY).write_bytes(dead_lock(cache))
        else:
            object_store_of(url).swap(LOCK_KEY, None, dead_lock())
        won: list[Holder] = []
        with ExitStack() as stack:
            barrier = threading.Barrier(2)
            rivals = [
                threading.Thread(target=acquire_together, args=(url, stack, barrier, won)) for _ in range(2)
            ]
            for rival in rivals:
                rival.start()
            for rival in rivals:
                rival.join(30)
            for holder in won:
                holder.write("object", b"mine")
            winners.append(len(won))
        assert Storage(url).read(LOCK_KEY) is None
    assert winners == [1] * TRIALS


def object_store_of(url: str) -> ObjectStore:
    objects = Storage(url).objects
    assert isinstance(objects, ObjectStore)
    return objects


@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_a_suspended_builder_writes_nothing_after_losing_the_lock(
    cache: Path, memory_store: MemoryStore, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat stopped with it, and a builder on another machine took the lock."""
    url = str(cache) if kind == "folder" else "s3://bucket/cache"
    monkeypatch.setattr(Folder, "claim", lambda _: nullcontext())  # kernels do not see each other's locks
    monkeypatch.setattr(lock, "POLL", 0.01)
    monkeypatch.setattr(lock, "STALE", 0.05)
    with locked(url) as sleeper:
        sleeper.write("state", b"old")
        time.sleep(0.1)
        with locked(url) as other:
            other.write("state", b"new")
            for attempt in (
                lambda: sleeper.write("state", b"old"),
                lambda: sleeper.delete("state"),
                sleeper.heartbeat,
                sleeper.check,
            ):
                with pytest.raises(CacheError, match="this process no longer holds the lock"):
                    attempt()
            sleeper.release()
            other.check()
            assert other.read("state") == b"new"
    assert Storage(url).sizes("") == {"state": 3}


def test_a_late_document_is_refused(memory_store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request of a build that lost its lock was under way, or retried, for minutes."""
    swap = ObjectStore.swap

    def late(self: ObjectStore, key: str, before: Any, data: bytes) -> bool:
        monkeypatch.undo()
        monkeypatch.setattr("ddk_cache.storage.object_store.from_url", lambda _, **options: memory_store)
        assert swap(self, key, self.peek(key)[1], b"new")  # by another process
        return swap(self, key, before, data)

    with locked("s3://bucket/cache") as sleeper:
        sleeper.write("code/zarr.json", b"older")
        monkeypatch.setattr(ObjectStore, "swap", late)
        with pytest.raises(CacheError, match=r"code/zarr\.json: another process has written it meanwhile"):
            sleeper.write("code/zarr.json", b"old")
    assert Storage("s3://bucket/cache").read("code/zarr.json") == b"new"


def test_a_live_build_on_this_machine_is_reported_at_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "POLL", None)  # to wait raises TypeError
    with (
        locked(str(cache)),
        pytest.raises(CacheError, match=r"another process \(process \d+ on"),
        locked(str(cache)),
    ):
        pass


def test_a_process_id_in_another_container_is_another_process(memory_store: MemoryStore) -> None:
    """Containers may share a host's name, and each counts its processes from 1."""
    assert object_store_of("s3://bucket/cache").swap(LOCK_KEY, None, dead_lock(namespace="pid:[1]"))
    with pytest.raises(CacheError, match="another process"), locked("s3://bucket/cache", wait=False):
        pass


@pytest.mark.parametrize("process", [os.getpid(), 1, 0, -1, 1 << 70], ids=["own", "1", "0", "-1", "huge"])
def test_in_an_object_store_only_a_process_that_has_ended_is_dead(
    memory_store: MemoryStore, process: int
) -> None:
    """A process of another user, or of the same id, may be the holder."""
    url = "s3://bucket/cache"
    assert object_store_of(url).swap(LOCK_KEY, None, dead_lock(process=process))
    with pytest.raises(CacheError, match="another process"), locked(url, wait=False):
        pass
    object_store_of(url).remove(LOCK_KEY, None)
    assert object_store_of(url).swap(LOCK_KEY, None, dead_lock())
    with locked(url, wait=False) as held:
        held.check()


def test_a_live_lock_is_kept_whatever_proc_and_the_clock_say(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with hidepid=2, in a time namespace, or while the holder is suspended."""
    monkeypatch.setattr(lock, "STALE", 0.0)
    with locked(str(cache)) as held:
        monkeypatch.setattr(os, "kill", lambda *_: os.stat(cache / "no such process"))
        monkeypatch.setattr(Path, "read_text", lambda *_: os.stat(cache / "hidden"))
        (cache / LOCK_KEY).write_bytes(json.dumps(json.loads(held.content()) | {"process": 1}).encode())
        with pytest.raises(CacheError, match="another process"), locked(str(cache)):
            pass
        held.check()


def test_a_copied_folder_is_not_the_locked_one(cache: Path, tmp_path: Path) -> None:
    with locked(str(cache)):
        shutil.copytree(cache, tmp_path / "copy")
        with pytest.raises(CacheError, match="another process"), locked(str(tmp_path / "copy"), wait=False):
            pass
    (tmp_path / "copy" / LOCK_KEY).unlink()
    with locked(str(tmp_path / "copy")) as held:
        held.check()


def sleep_after(forked: Any) -> None:
    forked.set()
    time.sleep(60)


def test_a_forked_child_does_not_keep_the_lock(cache: Path) -> None:
    """Engines and DataLoaders fork; a killed build's children may live on for seconds."""
    context = multiprocessing.get_context("fork")
    with locked(str(cache)):
        forked = context.Event()
        child = context.Process(target=sleep_after, args=(forked,))
        child.start()
        forked.wait()
    with locked(str(cache)) as held:
        held.check()
    child.kill()
    child.join()


def test_the_next_build_removes_what_killed_writers_staged(cache: Path) -> None:
    with open_writer(str(cache), make_manifest("code"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    before = read_files(cache)
    (cache / "code/train/tokens/c/0/0#0123456789ab").write_bytes(b"half")
    (cache / "notes#1").write_bytes(b"a user's")
    with open_writer(str(cache), make_manifest("code"), VOCABULARY_MAP):
        pass
    (cache / "notes#1").unlink()
    assert read_files(cache) == before


@pytest.mark.parametrize("lives", [True, False])
def test_a_lock_of_another_machine_is_watched_with_this_machines_clock(
    cache: Path, lives: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clocks of two machines may be hours apart: what counts is whether the heartbeat changes."""
    monkeypatch.setattr(lock, "STALE", 0.3)
    monkeypatch.setattr(lock, "POLL", 0.02)
    path = cache / LOCK_KEY
    path.write_bytes(dead_lock(cache, boot="other", host="elsewhere"))
    if lives:
        later = dead_lock(cache, boot="other", host="elsewhere", heartbeat=9)
        between_two_looks = "ddk_cache.storage.lock.time.sleep"
        monkeypatch.setattr(between_two_looks, lambda _: path.write_bytes(later))
        with pytest.raises(CacheError, match=r"another process .* on elsewhere"), locked(str(cache)):
            pass
    else:
        with locked(str(cache)) as held:
            held.check()
    assert "waiting up to 0 s for a heartbeat of process" in caplog.text


def test_without_wait_the_error_comes_at_once(cache: Path) -> None:
    (cache / LOCK_KEY).write_bytes(dead_lock(cache, boot="other"))
    with pytest.raises(CacheError, match="another process"), locked(str(cache), wait=False):
        pass


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b"\xff" * 99, b"[" * 60000])
def test_an_unreadable_lock_becomes_stale(cache: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE", 0.1)
    monkeypatch.setattr(lock, "POLL", 0.02)
    (cache / LOCK_KEY).write_bytes(raw)
    with locked(str(cache)) as held:
        held.check()
    assert not (cache / LOCK_KEY).exists()


def test_a_retried_request_is_no_rival(memory_store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first put arrived without a response; the retry finds the holder's own lock."""
    swap = ObjectStore.swap

    def twice(self: ObjectStore, key: str, before: Any, data: bytes) -> bool:
        swap(self, key, before, data)
        return swap(self, key, before, data)

    monkeypatch.setattr(ObjectStore, "swap", twice)
    with locked("s3://bucket/cache") as held:
        monkeypatch.setattr(ObjectStore, "swap", swap)
        held.check()


def _hold(url: str, ready: Any) -> None:
    with locked(url):
        ready.set()
        time.sleep(60)


def test_a_killed_builds_lock_is_taken_at_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(cache), ready))
    process.start()
    assert ready.wait(30)
    assert process.pid is not None
    with pytest.raises(CacheError, match=f"process {process.pid} on"), locked(str(cache)):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    with locked(str(cache)) as held:
        held.check()
    process.join()
