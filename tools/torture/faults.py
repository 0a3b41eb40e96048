"""Every call to the file system, and every request to an object store, fails once, in turn.

After the failure, or after a chain of them in two runs, the same command must end in the same bytes.
"""

import errno
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import obstore
from obstore.exceptions import GenericError, PermissionDeniedError
from obstore.store import MemoryStore

from ddk_cache.errors import CacheError, ConfigError
from ddk_train.errors import TrainingError
from tools.torture.failing_files import Trigger, failing_files
from tools.torture.subject import BUCKET, Subject, bucket, stored

ERRORS = (errno.EIO, errno.ENOSPC, errno.EINTR)
FINISHED = "finished all the same"
MESSAGES = (CacheError, ConfigError, TrainingError, OSError)  # what a command prints as one line
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
    subject: Subject, seed: int, seconds: float, *, in_bucket: bool = False, chained: bool = False
) -> tuple[Counter[str], list[str]]:
    """Fail calls in random order, until all have failed in every way or the time is over.

    Returns
    -------
    Counts by outcome, and a line for each failure: with the seed, the run can be repeated.
    """
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    trial = _trial_in_bucket if in_bucket else _trial_in_folder
    kinds: Sequence[Any] = KINDS if in_bucket else ERRORS
    counting = Trigger()
    trial(subject, kinds[0], [counting], Counter())
    total = counting.calls
    points = [(call, kind) for call in range(1, total + 1) for kind in kinds]
    chance.shuffle(points)
    counts["points"] = len(points)
    deadline = time.monotonic() + seconds
    for call, kind in points:
        if time.monotonic() > deadline:
            break
        triggers = [Trigger(call)]
        if chained:  # the clean-up, or what follows a call whose failure does no harm, and the next run
            triggers = [Trigger(call, call + chance.randint(1, 9)), Trigger(chance.randint(1, total))]
        counts["trials"] += 1
        try:
            trial(subject, kind, triggers, counts)
        except AssertionError as error:
            fired = "; ".join(name for trigger in triggers for name in trigger.fired)
            failures.append(f"seed {seed}, call {call} of {total} ({fired}), {kind}: {error}")
    return counts, failures


def _trial_in_folder(
    subject: Subject, number: Any, triggers: Sequence[Trigger], counts: Counter[str]
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    output = str(subject.output)
    subject.begin()
    for trigger in triggers:
        with failing_files((subject.output, *subject.sources), trigger, fail):
            outcome = _outcome(subject, output)
        counts[outcome] += 1
        if outcome == FINISHED:
            _check(subject, output, stored(subject.output))
    _finish(subject, output, lambda: stored(subject.output))


def _trial_in_bucket(subject: Subject, kind: Any, triggers: Sequence[Trigger], counts: Counter[str]) -> None:
    with bucket() as store:
        for trigger in triggers:
            with failing_requests(trigger, kind):
                outcome = _outcome(subject, BUCKET)
            counts[outcome] += 1
            if outcome == FINISHED:
                _check(subject, BUCKET, objects_of(store))
            with suppress(FileNotFoundError):
                store.delete("ddk.lock")  # as two minutes without a heartbeat would
        _finish(subject, BUCKET, lambda: objects_of(store))


def _outcome(subject: Subject, output: str) -> str:
    try:
        subject.run(output)
    except MESSAGES:
        return "stopped with a message"
    except Exception as error:
        raise AssertionError(f"a traceback: {error!r}") from error
    return FINISHED


def _finish(subject: Subject, output: str, objects: Callable[[], dict[str, bytes]]) -> None:
    try:
        subject.run(output)
    except Exception as error:
        raise AssertionError(f"the same command again: {error!r}") from error
    _check(subject, output, objects())


def _check(subject: Subject, output: str, objects: dict[str, bytes]) -> None:
    problems = subject.problems(output, objects)
    assert not problems, "; ".join(problems[:3])


def objects_of(store: MemoryStore) -> dict[str, bytes]:
    """Return every object by key."""
    keys = [entry["path"] for page in store.list() for entry in page]
    return {key: bytes(store.get(key).bytes()) for key in keys if key != "ddk.lock"}
