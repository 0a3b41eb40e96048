"""All interleavings of two builders' requests to an object store, up to a number of faults: a model checker.

The builders are the real code of the lock and of writing. A builder meets the world in its requests alone, so
its state is the list of their responses: it runs again on them to show its next request, without threads. A
state of the world that was visited is not visited again.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any
from unittest import mock

from obstore.exceptions import AlreadyExistsError, GenericError, NotFoundError, PreconditionError

from ddk_cache.errors import CacheError
from ddk_cache.storage.lock import LOCK_KEY, STALE, Holder
from ddk_cache.storage.storage import plain_errors
from tools.torture.subject import BUCKET, Subject

# A document is written last, and only over the one seen before; the others always.
SHARD, RECORD, DOCUMENT = "data/c/0", "data/commits/c/0", "data/zarr.json"
SLEEP, HEARTBEAT, NO_RESPONSE, GIVEN_UP = "sleep", "heartbeat", "no response", "given up"
ERRORS: dict[Any, Callable[[], Exception]] = {
    NO_RESPONSE: lambda: GenericError("error sending request"),  # which is retried
    GIVEN_UP: lambda: GenericError("HTTP error, after 10 retries"),
    "missing": lambda: NotFoundError("404"),
    "exists": lambda: AlreadyExistsError("409"),
    "changed": lambda: PreconditionError("412"),
}
Request = tuple[Any, ...]  # what, key, data, mode
# (response, clock), or HEARTBEAT: the other thread takes its turn; after the end, FINISHED and the error
History = tuple[Any, ...]
FINISHED = ("finished",)
UNREAD = 0.0  # a clock that the builder does not look at


class Pending(BaseException):
    """Ends a run at the first request without a response."""


class Builder:
    """Runs a builder on the responses so far."""

    def __init__(self, index: int, history: History) -> None:
        self.index = index
        self.pending: Request = FINISHED
        self.can_beat = self.reads_clock = False
        self._history, self._beats, self._clock = iter(history), False, UNREAD
        self._holder: Holder | None = None

    def run(self) -> str | None:
        """Build; return the error's message, or None."""
        holder = Holder(BUCKET)
        with suppress(Pending):
            try:
                with ExitStack() as claims, plain_errors(BUCKET):
                    holder.acquire(claims, wait=True)
                self._holder = holder
                try:
                    holder.write(SHARD, f"shard of {self.index}".encode())
                    holder.write(RECORD, f"record of {self.index}".encode())
                    holder.write(DOCUMENT, f"document of {self.index}".encode())
                finally:
                    holder.release()
            except CacheError as error:
                return str(error)
        return None

    def request(self, *request: Any) -> Any:
        """Return the recorded response, or stop; what cleans up after that is stopped too."""
        if self.pending is not FINISHED:
            raise Pending
        response = next(self._history, None)
        if response is HEARTBEAT:
            self._beats = True
            assert self._holder is not None
            with suppress(CacheError):
                self._holder.heartbeat()
            self._beats = False
            response = next(self._history, None)
        if response is None:
            self.pending = request
            holder = self._holder  # whose heartbeats wait for each other
            self.can_beat = holder is not None and not self._beats and not holder._sending.locked()
            raise Pending
        value, self._clock = response
        self.reads_clock = False
        if value in ERRORS:
            raise ERRORS[value]()
        return value

    def monotonic(self) -> float:
        """Return the time of the last response."""
        self.reads_clock = True
        return self._clock


class Response:
    """What obstore returns for a ``get``."""

    def __init__(self, data: bytes, version: int) -> None:
        self._data, self.meta = data, {"size": len(data), "e_tag": str(version), "version": None}

    def bytes(self) -> bytes:
        return self._data


@dataclass(frozen=True)
class World:
    """A state; ``objects`` are (key, data, version) and ``late`` the (builder, request) still under way."""

    histories: tuple[History, ...] = ((), ())
    objects: tuple[tuple[str, bytes, int], ...] = ()
    late: tuple[tuple[int, Request], ...] = ()
    clock: float = 0.0
    beaten: float = 0.0  # the time of the lock's last change
    version: int = 0
    faults: int = 0
    beats: int = 0
    is_stolen: bool = False

    def get(self, key: str) -> tuple[bytes, int] | None:
        """Return an object and its version."""
        return next(((data, version) for name, data, version in self.objects if name == key), None)

    def owner(self, key: str) -> str | None:
        """Return the builder whose object it is: the last character but for the lock."""
        stored = self.get(key)
        if stored is None:
            return None
        return stored[0].split(b'"token": "')[1][:1].decode() if key == LOCK_KEY else stored[0][-1:].decode()

    def answered(self, builder: int, response: Any) -> "World":
        """Return the state after a response, or a heartbeat, is known to the builder."""
        histories = list(self.histories)
        histories[builder] = _without_clock(builder, (*histories[builder], response))
        request, _, error, _ = run(builder, histories[builder])
        if request == FINISHED:
            histories[builder] = (FINISHED, error)
        return replace(self, histories=tuple(histories))

    def executed(self, builder: int, request: Request) -> tuple["World", Any]:
        """Return the state after a request, and its response."""
        if request[0] == SLEEP:
            return replace(self, clock=self.clock + STALE / 2), None
        what, key, *rest = request
        stored = self.get(key)
        if what == "get":
            return self, "missing" if stored is None else stored
        others = tuple(entry for entry in self.objects if entry[0] != key)
        if what == "delete":
            return replace(self, objects=others), None
        data, mode = rest
        if mode == "create" and stored:
            return self, "exists"
        if isinstance(mode, str) and mode.isdigit() and (stored is None or str(stored[1]) != mode):
            return self, "changed"
        self._check_put(builder, key)
        changed = tuple(sorted((*others, (key, data, self.version))))
        world = replace(self, objects=changed, version=self.version + 1)
        if key == LOCK_KEY:
            is_stolen = self.is_stolen or self.owner(LOCK_KEY) not in (None, str(builder))
            world = replace(world, beaten=self.clock, is_stolen=is_stolen)
        return world, None

    def _check_put(self, builder: int, key: str) -> None:
        holder = self.owner(LOCK_KEY)
        if holder in (None, str(builder)) or run(int(holder), self.histories[int(holder)])[0] == FINISHED:
            return  # a late request may leave a lock whose builder has ended
        if key == LOCK_KEY:
            assert self.clock - self.beaten >= STALE, "the lock of a live builder is taken"
        if key == DOCUMENT:
            assert self.owner(DOCUMENT) != holder, "a document is replaced after the lock is lost"


@lru_cache(1 << 18)
def run(index: int, history: History) -> tuple[Request, bool, str | None, bool]:
    """Run a builder.

    Returns
    -------
    Its next request, whether a heartbeat may come first, the error it ended with, and whether it has read the
    clock since the last response.
    """
    if history[:1] == (FINISHED,):
        return FINISHED, False, history[1], False
    _running[:] = [Builder(index, history)]
    error = _running[0].run()
    return _running[0].pending, _running[0].can_beat, error, _running[0].reads_clock


def _without_clock(index: int, history: History) -> History:
    """Forget the time of the last response if nothing depends on it, so that fewer states differ."""
    is_read = history[-1] is HEARTBEAT or run(index, history)[3]
    return history if is_read else (*history[:-1], (history[-1][0], UNREAD))


_running: list[Builder] = []  # the one that makes requests


def _get(_: Any, key: str) -> Response:
    return Response(*_running[0].request("get", key))


def _put(_: Any, key: str, data: bytes, mode: Any = "overwrite") -> None:
    _running[0].request("put", key, data, mode if isinstance(mode, str) else mode["e_tag"])


def _delete(_: Any, key: str) -> None:
    _running[0].request("delete", key)


def moves(world: World, most_faults: int, most_beats: int) -> Iterator[tuple[str, World]]:
    """Yield the states that may follow, and how."""
    for index, history in enumerate(world.histories):
        request, can_beat, *_ = run(index, history)
        if request == FINISHED:
            continue
        name = f"{index}: {' '.join(map(str, request[:2]))}"
        after, response = world.executed(index, request)
        yield name, after.answered(index, (response, after.clock))
        if can_beat and world.beats < most_beats:
            yield f"{index}: heartbeat", replace(world, beats=world.beats + 1).answered(index, HEARTBEAT)
        if request[0] == SLEEP or world.faults == most_faults:
            continue
        late = replace(world, late=(*world.late, (index, request)))
        states = {"lost": world} | ({} if request[0] == "get" else {"unanswered": after, "late": late})
        for (outcome, state), error in product(states.items(), (NO_RESPONSE, GIVEN_UP)):
            failed = replace(state, faults=world.faults + 1)
            yield f"{name} is {outcome}: {error}", failed.answered(index, (error, failed.clock))
    for index, request in world.late:
        rest = tuple(item for item in world.late if item != (index, request))
        yield f"{index}: {request[:2]} arrives", replace(world.executed(index, request)[0], late=rest)


def check_end(world: World) -> str:
    """Check a state in which both builders have ended; return what it is counted as."""
    errors = [run(index, history)[2] for index, history in enumerate(world.histories)]
    if not world.faults and not world.is_stolen:
        assert not any("no longer holds the lock" in str(error) for error in errors), (
            "a lock is lost for nothing"
        )
        assert None in errors, "no builder finishes"
        assert world.owner(SHARD) == world.owner(RECORD) == world.owner(DOCUMENT), "a mixture"
    third = replace(world, histories=((), (), ()))
    while (request := run(2, third.histories[2])[0]) != FINISHED:
        third, response = third.executed(2, request)
        third = third.answered(2, (response, third.clock))
    left = [third.owner(key) for key in (LOCK_KEY, SHARD, RECORD, DOCUMENT)]
    assert left == [None, "2", "2", "2"], f"a third builder leaves {left}, {run(2, third.histories[2])[2]}"
    return "ends" if world.owner(SHARD) == world.owner(RECORD) else "ends in which reading refuses the shard"


@contextmanager
def patched() -> Iterator[None]:
    """Let requests, clocks and tokens be those of the builder that runs."""
    store, lock = "ddk_cache.storage.object_store", "ddk_cache.storage.lock"
    clock = mock.Mock(monotonic=lambda: _running[0].monotonic(), sleep=lambda _: _running[0].request(SLEEP))
    with (
        mock.patch.multiple(f"{store}.obstore", get=_get, put=_put, delete=_delete),
        mock.patch(f"{store}.from_url", return_value=None),
        mock.patch(f"{store}.time", mock.Mock(monotonic=lambda: 0.0)),
        mock.patch(f"{lock}.time", clock),
        mock.patch(f"{lock}.secrets.token_hex", side_effect=lambda _: str(_running[0].index)),
        mock.patch.object(Holder, "_has_ended", return_value=False),
    ):
        yield


def torture(
    _: Subject | None,
    seed: int,
    seconds: float,
    *,
    faults: int,
    beats: int,
    most_failures: int = 10,
) -> tuple[Counter[str], list[str]]:
    """Visit the states in random order until all are visited or the time is over.

    ``faults`` is the number of requests that fail, ``beats`` that of heartbeats between two requests.
    """
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    deadline = time.monotonic() + seconds
    with patched():
        pending, ways = [World()], dict[World, tuple[str, World | None]]({World(): ("", None)})
        while pending and len(failures) < most_failures and time.monotonic() < deadline:
            at = chance.randrange(len(pending))
            pending[at], pending[-1] = pending[-1], pending[at]
            world = pending.pop()
            counts["trials"] += 1
            try:
                if not world.late and all(run(*item)[0] == FINISHED for item in enumerate(world.histories)):
                    counts[check_end(world)] += 1
                for name, after in moves(world, faults, beats):
                    if after not in ways:
                        ways[after] = (name, world)
                        pending.append(after)
            except AssertionError as error:
                failures.append(f"{error}: {'; '.join(_way(ways, world))}")
    counts["states not visited"] = len(pending)
    return counts, failures


def _way(ways: Mapping[World, tuple[str, World | None]], world: World | None) -> list[str]:
    """Return the steps that led to a state."""
    steps = []
    while world is not None:
        name, world = ways[world]
        steps.append(name)
    return steps[-2::-1]
