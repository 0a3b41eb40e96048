"""A folder or a URL (file:// s3:// gs:// az://) as one kind of store, through obstore.

Writes are atomic: an object is there whole or not at all. obstore repeats requests that failed for a
passing reason; what it gives up on becomes a CacheError in one line.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PermissionDeniedError
from obstore.store import LocalStore, from_url

from ddk_cache.errors import CacheError, CacheNotFoundError, ConfigError

SCHEMES = ("file://", "s3://", "gs://", "az://")
LOCK_KEY = "ddk.lock"
HEARTBEAT = 20.0  # seconds between two signs of life of a build
STALE = 120.0  # seconds without one, after which a build on another machine is taken for dead
CONNECTIONS = 16  # requests under way at once to a remote store


class Storage:
    """The objects of one cache, by key.

    Parameters
    ----------
    url
        A folder, or a URL of one of the schemes above; credentials come from the environment.
    create
        Make the folder if it is not there.

    Raises
    ------
    ConfigError
        The URL is of a kind not known here.
    CacheNotFoundError
        The folder is not there.
    CacheError
        The place cannot be reached, read or written; so do all methods.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.url = url
        is_local = "://" not in url or url.startswith("file://")
        folder = Path(url.removeprefix("file://")).absolute()
        if is_local and not create and not folder.is_dir():
            raise CacheNotFoundError(f"{url}: there is no such folder")
        if not is_local and not url.startswith(SCHEMES):
            raise ConfigError(f"{url}: a cache is a folder or begins with one of {' '.join(SCHEMES)}")
        with _plain_errors(url):
            self.store: Any = LocalStore(folder, mkdir=create) if is_local else from_url(url)
        # A local read takes less time than handing it to another thread, which obstore does too.
        self._folder = folder if is_local else None
        self._pool = None if is_local else ThreadPoolExecutor(CONNECTIONS)

    def read(self, key: str) -> bytes | None:
        """The whole object; None if there is none."""
        with _plain_errors(f"{self.url}/{key}"):
            try:
                return bytes(obstore.get(self.store, key).bytes())
            except (NotFoundError, FileNotFoundError):
                return None

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes ``start`` to ``end`` of each ``(key, start, end)``; a negative start counts from the end."""
        return list(self._pool.map(self._read_range, ranges) if self._pool else map(self._read_range, ranges))

    def _read_range(self, wanted: tuple[str, int, int]) -> bytes:
        key, start, end = wanted
        with _plain_errors(f"{self.url}/{key}"):
            if self._folder is not None:
                return _read_file(f"{self._folder}/{key}", start, end)
            if start < 0:
                return bytes(obstore.get(self.store, key, options={"range": {"suffix": -start}}).bytes())
            return bytes(obstore.get_range(self.store, key, start=start, end=end)) if end > start else b""

    def write(self, key: str, data: bytes) -> None:
        """Put the object there, whole."""
        with _plain_errors(f"{self.url}/{key}"):
            obstore.put(self.store, key, data)

    def delete(self, key: str) -> None:
        with _plain_errors(f"{self.url}/{key}"), contextlib.suppress(NotFoundError, FileNotFoundError):
            obstore.delete(self.store, key)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Every key under ``prefix``, with the object's size in bytes."""
        found: dict[str, int] = {}
        with _plain_errors(f"{self.url}/{prefix}"), contextlib.suppress(NotFoundError, FileNotFoundError):
            for batch in obstore.list(self.store, prefix=prefix):
                found.update((entry["path"], entry["size"]) for entry in batch)
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the cache's one lock while writing, with a sign of life every 20 seconds.

        A lock is taken over when its process is known to be dead (same machine) or was silent for two
        minutes (another machine).

        Raises
        ------
        CacheError
            Another build is at work here.
        """
        with _plain_errors(self.url):
            while True:
                try:
                    obstore.put(self.store, LOCK_KEY, _sign_of_life(), mode="create")
                    break
                except AlreadyExistsError:
                    self._remove_if_dead()
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT):
                with contextlib.suppress(BaseError):  # a sign missed now is given 20 seconds later
                    obstore.put(self.store, LOCK_KEY, _sign_of_life())

        heart = threading.Thread(target=beat, name="lock", daemon=True)
        heart.start()
        try:
            yield
        finally:
            stop.set()
            heart.join()
            self.delete(LOCK_KEY)

    def _remove_if_dead(self) -> None:
        raw = self.read(LOCK_KEY)
        if raw is None:
            return
        try:
            owner = json.loads(raw)
            host, process, silent = str(owner["host"]), int(owner["process"]), time.time() - owner["time"]
        except (ValueError, KeyError, TypeError):
            host, process, silent = "?", 0, STALE
        if silent < STALE and not (host == socket.gethostname() and not _is_alive(process)):
            raise CacheError(
                f"{self.url}: another build (process {process} on {host}) is writing here, "
                f"last heard of {max(silent, 0):.0f} s ago; if it is dead, try again in {STALE:.0f} s"
            )
        self.delete(LOCK_KEY)


def _read_file(path: str, start: int, end: int) -> bytes:
    """See ``Storage.read_ranges``."""
    with open(path, "rb", buffering=0) as file:
        if start < 0:
            end = os.fstat(file.fileno()).st_size
            start = max(end + start, 0)
        file.seek(start)
        return file.read(end - start)


def _sign_of_life() -> bytes:
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "time": time.time()}).encode()


def _is_alive(process: int) -> bool:
    """Whether that process of this machine lives; its number is ours only if a restart gave it again."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


@contextlib.contextmanager
def _plain_errors(where: str) -> Iterator[None]:
    """Turn what the store says into one plain line."""
    try:
        yield
    except (NotFoundError, FileNotFoundError) as error:
        raise CacheError(f"{where}: is missing") from error
    except (PermissionDeniedError, PermissionError) as error:
        raise CacheError(f"{where}: permission denied") from error
    except (BaseError, OSError, ValueError) as error:
        raise CacheError(f"{where}: {str(error).splitlines()[0]}") from error
