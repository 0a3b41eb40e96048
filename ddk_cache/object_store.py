"""The objects of a cache in an object store, through obstore, which repeats what failed in passing."""

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

from ddk_cache.folder import refuse_size

MISSING = (NotFoundError, FileNotFoundError)  # obstore raises now one, now the other
CONNECTIONS = 16  # requests under way at once
PAGE = 1000  # keys that a store lists at once
DOCUMENT = "zarr.json"  # the end of a document's key
ARRAY_DEPTH = 3  # folders of an array: <domain>/<split>/<array>
# How long a store that is away is waited for.
PATIENCE = 180.0  # seconds in all
RETRIES = 10  # requests after the first
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds between two requests; each wait is twice the one before
# What obstore says of an answer that broke off, and of a connection that did.
LOST = ("response body", "error sending request")

P = ParamSpec("P")
T = TypeVar("T")

_users: set[int] = set()  # the processes that have used the object store's threads: at most this one


def asked_again(ask: Callable[P, T]) -> Callable[P, T]:
    """Repeats what obstore does not: a reading whose answer broke off, and a deletion or a conditional put
    whose answer is lost. The first may have arrived: then the put is refused, and whoever asked looks."""

    @wraps(ask)
    def again(*arguments: P.args, **options: P.kwargs) -> T:
        end, wait = time.monotonic() + PATIENCE, FIRST_WAIT
        while True:
            try:
                return ask(*arguments, **options)
            except GenericError as error:
                said = str(error)
                has_given_up = f"after {RETRIES} retries" in said or time.monotonic() + wait > end
                if has_given_up or not any(sign in said for sign in LOST):
                    raise
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    return again


class ObjectStore:
    """Objects by key. Every method raises obstore's BaseError.

    Raises
    ------
    ValueError
        This process was forked by one that has used an object store: its threads are not here, and what
        waits for them waits for ever.
    """

    def __init__(self, url: str) -> None:
        if _users - {os.getpid()}:
            raise ValueError(
                "an object store cannot be read in a forked process; let workers be spawned "
                "(DataLoader: multiprocessing_context='spawn')"
            )
        _users.add(os.getpid())
        first, longest, whole = (timedelta(seconds=span) for span in (FIRST_WAIT, LONGEST_WAIT, PATIENCE))
        backoff: Any = {"init_backoff": first, "max_backoff": longest, "base": 2}
        retries: Any = {"max_retries": RETRIES, "backoff": backoff, "retry_timeout": whole}
        self.store: Any = from_url(url, retry_config=retries)
        self._pool = ThreadPoolExecutor(CONNECTIONS)

    @asked_again
    def read(self, key: str, most: int) -> bytes | None:
        """The object; OverflowError where it has more bytes than ``most``."""
        try:
            found = obstore.get(self.store, key)
            refuse_size(found.meta["size"], most)
            return bytes(found.bytes())
        except MISSING:
            return None

    @asked_again
    def read_ranges(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Spans that lie less than a megabyte apart come in one request."""
        if spans[0][0] < 0:
            (suffix,) = spans
            return [bytes(obstore.get(self.store, key, options={"range": {"suffix": -suffix[0]}}).bytes())]
        starts, ends = zip(*spans, strict=True)
        return list(map(bytes, obstore.get_ranges(self.store, key, starts=starts, ends=ends)))

    def map(self, function: Callable[[Any], Any], items: Any) -> Iterator[Any]:
        """Like the built-in, with several requests under way."""
        return self._pool.map(function, items)

    def sizes(self, prefix: str) -> dict[str, int]:
        """A store lists a thousand keys a request, one after another: so arrays are listed side by side."""
        found: dict[str, int] = {}
        folders = [prefix.rstrip("/")]
        while folders and len(folders[0].split("/")) * bool(folders[0]) < ARRAY_DEPTH:
            levels = list(self.map(self._level, folders))
            folders = [folder for below, _ in levels for folder in below]
            found |= {key: size for _, sizes in levels for key, size in sizes.items()}
        for sizes in self.map(self._all, folders):
            found |= sizes
        return found

    @asked_again
    def _level(self, folder: str) -> tuple[Sequence[str], dict[str, int]]:
        """The folders in a folder, and the sizes of its objects."""
        with contextlib.suppress(*MISSING):
            listed = obstore.list_with_delimiter(self.store, folder or None)
            return listed["common_prefixes"], {entry["path"]: entry["size"] for entry in listed["objects"]}
        return [], {}

    @asked_again
    def _all(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        with contextlib.suppress(*MISSING):
            for page in obstore.list(self.store, prefix=folder, chunk_size=PAGE):
                found.update((entry["path"], entry["size"]) for entry in page)
        return found

    def write(
        self, key: str, data: bytes, guard: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Put the object there, whole, inside of ``guard``.

        A request may be on its way for as long as it is repeated, and the lock change hands meanwhile. What
        of an array comes late does not fit its marker; a document must not come late at all.
        """
        if not key.endswith(DOCUMENT):
            with guard():
                obstore.put(self.store, key, data)
            return
        _, before = self.peek(key)
        with guard():
            if not self.swap(key, before, data) and self.peek(key)[0] != data:
                raise ValueError("another process has written it meanwhile")

    def delete(self, key: str, guard: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        with guard():
            self._delete(key)

    @asked_again
    def peek(self, key: str) -> tuple[bytes | None, Any]:
        """An object and what ``swap`` knows its state by: its e-tag and version."""
        try:
            found = obstore.get(self.store, key)
            known = {name: found.meta[name] for name in ("e_tag", "version") if found.meta.get(name)}
            return bytes(found.bytes()), known
        except MISSING:
            return None, None

    @asked_again
    def swap(self, key: str, before: Any, data: bytes) -> bool:
        """Put the object there if it is still what ``peek`` saw; else False."""
        try:
            obstore.put(self.store, key, data, mode="create" if before is None else before)
        except (AlreadyExistsError, PreconditionError):
            return False
        except MISSING:
            if before is None:  # what is missing is the bucket
                raise
            return False
        return True

    def remove(self, key: str, _before: Any) -> None:
        """Delete the object: stores have no condition for that. Whoever calls has just swapped it."""
        self._delete(key)

    @asked_again
    def _delete(self, key: str) -> None:
        with contextlib.suppress(*MISSING):
            obstore.delete(self.store, key)

    @contextlib.contextmanager
    def keeping(self, key: str, check: Callable[[bytes | None], None]) -> Iterator[None]:
        """``check`` sees the object first and may raise; an object store cannot hold on to it."""
        check(self.peek(key)[0])
        yield
