"""The objects of a cache in an object store, through obstore, which retries most failed requests itself."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, GenericError, NotFoundError, PreconditionError
from obstore.store import from_url

from ddk_cache.storage.folder import check_size
from ddk_cache.util.durable import Guard

MISSING = (NotFoundError, FileNotFoundError)  # obstore raises either
CONNECTIONS = 16  # concurrent requests
PAGE = 1000  # keys in one response of a listing
DOCUMENT = "zarr.json"  # the last part of a document's key
ARRAY_DEPTH = 3  # an array's key has three parts: <domain>/<split>/<array>
RETRY_TIMEOUT = 180.0  # seconds from the first request to the last retry
MAX_RETRIES = 10
FIRST_DELAY, MAX_DELAY = 0.5, 15.0  # seconds between two retries; each delay is twice the one before
# Parts of obstore's messages about a broken response and a broken connection.
LOST = ("response body", "error sending request")

P = ParamSpec("P")
T = TypeVar("T")

_users: set[int] = set()  # ids of the processes that use obstore's threads; a fork inherits its parent's


def retried(request: Callable[P, T]) -> Callable[P, T]:
    """Retry what obstore does not: a broken response, and a deletion or conditional put without response.

    The first attempt may have arrived. A conditional put is then refused, and the caller looks at the object.
    """

    @wraps(request)
    def retry(*arguments: P.args, **options: P.kwargs) -> T:
        deadline, delay = time.monotonic() + RETRY_TIMEOUT, FIRST_DELAY
        while True:
            try:
                return request(*arguments, **options)
            except GenericError as error:
                is_retried = f"after {MAX_RETRIES} retries" in str(error)
                is_lost = any(part in str(error) for part in LOST) and not is_retried
                if not is_lost or time.monotonic() + delay > deadline:
                    raise
            time.sleep(delay)
            delay = min(2 * delay, MAX_DELAY)

    return retry


class ObjectStore:
    """Objects by key. Every method may raise obstore's BaseError.

    Raises ValueError in a fork of a process that has used an object store: it lacks its parent's threads, and
    a request would wait for them forever.
    """

    def __init__(self, url: str) -> None:
        if _users - {os.getpid()}:
            raise ValueError(
                "a forked process cannot read an object store; start workers with spawn "
                "(DataLoader: multiprocessing_context='spawn')"
            )
        _users.add(os.getpid())
        first, longest = timedelta(seconds=FIRST_DELAY), timedelta(seconds=MAX_DELAY)
        retries: Any = {
            "max_retries": MAX_RETRIES,
            "backoff": {"init_backoff": first, "max_backoff": longest, "base": 2},
            "retry_timeout": timedelta(seconds=RETRY_TIMEOUT),
        }
        self.store: Any = from_url(url, retry_config=retries)
        self._pool = ThreadPoolExecutor(CONNECTIONS)

    @retried
    def read(self, key: str, limit: int) -> bytes | None:
        """Return the object, or None if it does not exist; raise OverflowError above ``limit`` bytes."""
        try:
            response = obstore.get(self.store, key)
            check_size(response.meta["size"], limit)
            return bytes(response.bytes())
        except MISSING:
            return None

    @retried
    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return bytes ``start`` to ``end`` for each range; a negative start counts from the end.

        Ranges less than a megabyte apart share one request.
        """
        if ranges[0][0] < 0:
            ((start, _),) = ranges
            return [bytes(obstore.get(self.store, key, options={"range": {"suffix": -start}}).bytes())]
        starts, ends = zip(*ranges, strict=True)
        return list(map(bytes, obstore.get_ranges(self.store, key, starts=starts, ends=ends)))

    def map(self, function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        """Apply ``function`` to the items in order, with concurrent requests."""
        return self._pool.map(function, items)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return key and size in bytes of every object.

        A store lists its pages one after another, so the arrays are listed concurrently.
        """
        sizes: dict[str, int] = {}
        folders = [prefix.rstrip("/")]
        while folders and len(folders[0].split("/")) * bool(folders[0]) < ARRAY_DEPTH:
            levels = list(self.map(self._list_level, folders))
            folders = [folder for below, _ in levels for folder in below]
            sizes |= {key: size for _, objects in levels for key, size in objects.items()}
        for objects in self.map(self._list_all, folders):
            sizes |= objects
        return sizes

    @retried
    def _list_level(self, folder: str) -> tuple[Sequence[str], dict[str, int]]:
        """Return the folders directly in a folder, and the sizes of the objects directly in it."""
        with contextlib.suppress(*MISSING):
            listed = obstore.list_with_delimiter(self.store, folder or None)
            return listed["common_prefixes"], {entry["path"]: entry["size"] for entry in listed["objects"]}
        return [], {}

    @retried
    def _list_all(self, folder: str) -> dict[str, int]:
        sizes: dict[str, int] = {}
        with contextlib.suppress(*MISSING):
            for page in obstore.list(self.store, prefix=folder, chunk_size=PAGE):
                sizes.update((entry["path"], entry["size"]) for entry in page)
        return sizes

    def write(self, key: str, data: bytes, guard: Guard) -> None:
        """Write the whole object inside ``guard``.

        A retried request may arrive after the lock has changed hands. A late array does not fit its commit
        record; a document must not arrive late, so it is written only over the state seen before.
        """
        if not key.endswith(DOCUMENT):
            with guard():
                obstore.put(self.store, key, data)
            return
        _, before = self.peek(key)
        with guard():
            if not self.swap(key, before, data) and self.peek(key)[0] != data:
                raise ValueError("another process has written it meanwhile")

    def delete(self, key: str, guard: Guard) -> None:
        """Delete the object if it exists; enter ``guard`` for it."""
        with guard():
            self._delete(key)

    @retried
    def peek(self, key: str) -> tuple[bytes | None, Any]:
        """Return an object and its state for ``swap``: e-tag and version."""
        try:
            response = obstore.get(self.store, key)
            state = {name: response.meta[name] for name in ("e_tag", "version") if response.meta.get(name)}
            return bytes(response.bytes()), state
        except MISSING:
            return None, None

    @retried
    def swap(self, key: str, before: Any, data: bytes) -> bool:
        """Write the object and return True if its state is still ``before``; else return False."""
        try:
            obstore.put(self.store, key, data, mode="create" if before is None else before)
        except (AlreadyExistsError, PreconditionError):
            return False
        except MISSING:
            if before is None:  # the bucket is missing
                raise
            return False
        return True

    def remove(self, key: str, _before: Any) -> None:
        """Delete the object. Stores have no conditional deletion; the caller has just swapped it."""
        self._delete(key)

    @retried
    def _delete(self, key: str) -> None:
        with contextlib.suppress(*MISSING):
            obstore.delete(self.store, key)

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Do nothing: no kernel has a lock on an object store."""
        yield

    def remove_staged(self) -> None:
        """Do nothing: an object becomes visible with its last byte."""

    @contextlib.contextmanager
    def hold(self, key: str, check: Callable[[bytes | None], None]) -> Iterator[None]:
        """Pass the object to ``check``, which may raise; an object store cannot lock it afterwards."""
        check(self.peek(key)[0])
        yield
