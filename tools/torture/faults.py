"""Every call to the file system, and every request to an object store, fails once, in turn.

After the failure the same build runs again and must end in the same bytes.
"""

import errno
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import obstore
from obstore.exceptions import GenericError, PermissionDeniedError
from obstore.store import MemoryStore

from ddk_cache.errors import CacheError
from tools.torture.subject import BUCKET, Subject, bucket, stored

CALLS = ("fsync", "ftruncate", "mkdir", "open", "pread", "pwrite", "replace", "scandir", "unlink")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EINTR)
REQUESTS = ("delete", "get", "get_ranges", "list", "list_with_delimiter", "put")
# What happens to a request. Obstore itself repeats others, such as a 500 or a 503.
LOST, UNANSWERED, REFUSED, FAILED, CUT, STALE = KINDS = (
    "the request is lost",
    "it arrives, and the response is lost",
    "the credentials have expired",
    "it fails after all of obstore's retries",
    "the response's body is cut off",
    "a listing lacks the newest object",
)


class Trigger:
    """Counts calls from all threads, and fires once."""

    def __init__(self, fires_at: int | None) -> None:
        self.fires_at, self.calls, self.fired = fires_at, 0, ""
        self._lock = threading.Lock()

    def fires(self, name: str) -> bool:
        with self._lock:
            self.calls += 1
            if self.calls != self.fires_at:
                return False
            self.fired = name
            return True


@contextmanager
def failing_files(root: Path, trigger: Trigger, number: int) -> Iterator[None]:
    """Let calls on files and folders under ``root`` fail with an errno when the trigger fires."""

    def is_inside(target: Any) -> bool:
        if isinstance(target, int):
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{target}")
        return str(target).startswith(str(root))

    def failing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            if is_inside(target) and trigger.fires(f"{name} {target}"):
                raise OSError(number, os.strerror(number), str(target))
            return original(target, *arguments, **options)

        return call

    def short_write(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = open_path(path, mode, *arguments, **options)
        if mode != "wb" or not is_inside(path):
            return file
        return _ShortWriter(file, trigger, number)

    open_path = Path.open
    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, failing(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(Path, "open", short_write))
        yield


class _ShortWriter:
    """A file of which half is written before the error."""

    def __init__(self, file: Any, trigger: Trigger, number: int) -> None:
        self._file, self._trigger, self._number = file, trigger, number

    def __enter__(self) -> "_ShortWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        if self._trigger.fires("write"):
            self._file.write(data[: len(data) // 2])
            raise OSError(self._number, os.strerror(self._number))
        return int(self._file.write(data))


@contextmanager
def failing_requests(trigger: Trigger, kind: str) -> Iterator[None]:
    """Let a request to the object store end as ``kind`` says when the trigger fires."""

    def failing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not trigger.fires(f"{name} {arguments[1:2]}"):
                return original(*arguments, **options)
            if kind == REFUSED:
                raise PermissionDeniedError("ExpiredToken")
            if kind == FAILED:
                raise GenericError("HTTP error: 503, after 10 retries")
            if kind in (LOST, CUT):
                raise GenericError("error sending request" if kind == LOST else "response body is cut off")
            result = original(*arguments, **options)
            if kind == STALE and name == "list":
                pages = list(result)
                return [list(page)[:-1] for page in pages[-1:]]
            if kind == STALE:
                return result
            raise GenericError("error sending request")

        return call

    with ExitStack() as stack:
        for name in REQUESTS:
            patched = failing(name, getattr(obstore, name))
            stack.enter_context(mock.patch(f"ddk_cache.storage.object_store.obstore.{name}", patched))
        yield


def torture(
    subject: Subject, seed: int, seconds: float, *, in_bucket: bool
) -> tuple[Counter[str], list[str]]:
    """Fail calls in random order, until all have failed in every way or the time is over.

    Returns
    -------
    Counts by outcome, and a line for each failure: with the seed, the run can be repeated.
    """
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    trial = _trial_in_bucket if in_bucket else _trial_in_folder
    total = trial(subject, Trigger(None), None).calls
    points = [(call, kind) for call in range(1, total + 1) for kind in (KINDS if in_bucket else ERRORS)]
    chance.shuffle(points)
    counts["points"] = len(points)
    deadline = time.monotonic() + seconds
    for call, kind in points:
        if time.monotonic() > deadline:
            break
        trigger = Trigger(call)
        try:
            trial(subject, trigger, kind, counts)
        except AssertionError as error:
            failures.append(f"seed {seed}, call {call} of {total} ({trigger.fired}), {kind}: {error}")
    return counts, failures


def _trial_in_folder(
    subject: Subject, trigger: Trigger, number: Any, counts: Counter[str] | None = None
) -> Trigger:
    cache = subject.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    with failing_files(cache, trigger, number):
        _fail(subject, str(cache), counts)
    _finish(subject, str(cache), lambda: stored(cache))
    return trigger


def _trial_in_bucket(
    subject: Subject, trigger: Trigger, kind: Any, counts: Counter[str] | None = None
) -> Trigger:
    with bucket() as store:
        with failing_requests(trigger, kind):
            _fail(subject, BUCKET, counts)
        with suppress(FileNotFoundError):
            store.delete("ddk.lock")  # as two minutes without a heartbeat would
        _finish(subject, BUCKET, lambda: objects_of(store))
    return trigger


def _fail(subject: Subject, cache: str, counts: Counter[str] | None) -> None:
    outcome = "finished"
    try:
        subject.build(cache)
    except (CacheError, OSError):
        outcome = "stopped with a message"
    except Exception as error:
        raise AssertionError(f"a traceback: {error!r}") from error
    if counts is not None:
        counts["trials"] += 1
        counts[outcome] += 1


def _finish(subject: Subject, cache: str, objects: Callable[[], dict[str, bytes]]) -> None:
    try:
        subject.build(cache)
    except Exception as error:
        raise AssertionError(f"the same command again: {error!r}") from error
    problems = subject.problems(cache, objects())
    assert not problems, "; ".join(problems[:3])


def objects_of(store: MemoryStore) -> dict[str, bytes]:
    """Return every object by key."""
    keys = [entry["path"] for page in store.list() for entry in page]
    return {key: bytes(store.get(key).bytes()) for key in keys if key != "ddk.lock"}
