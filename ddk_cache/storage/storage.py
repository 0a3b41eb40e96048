"""A folder or URL (file:// s3:// gs:// az:// hf://) as one kind of store: objects of bytes by key.

``Storage`` only reads. ``LockedStorage`` (lock.py) writes, and exists only while its lock is held.
"""

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError

from ddk_cache.errors import CacheError, CacheNotFoundError, ConfigError, TooLargeError, UnreachableError
from ddk_cache.storage import hub
from ddk_cache.storage.addresses import refuse_credentials
from ddk_cache.storage.folder import Folder
from ddk_cache.storage.object_store import ObjectStore

T = TypeVar("T")
R = TypeVar("R")

SCHEMES = ("file://", "s3://", "gs://", "az://", hub.SCHEME)
MAX_BYTES = 1 << 24  # of a document; in a downloaded cache it may have any size
METADATA_SERVICE = "//169.254.169.254/"  # of cloud machines; asked if the environment has no credentials
NO_CREDENTIALS = (
    "no credentials in the environment, and none for this machine: set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS; for a public bucket AWS_SKIP_SIGNATURE=true "
    "or GOOGLE_SKIP_SIGNATURE=true"
)


class Storage:
    """The objects of one cache by key, for reading. A pickled copy opens its own connections.

    Parameters
    ----------
    url
        A folder, or a URL with one of ``SCHEMES``; credentials come from the environment.
    create
        Create the folder if it does not exist.

    Raises
    ------
    ConfigError
        The URL has another scheme, or contains credentials.
    CacheNotFoundError
        The folder does not exist.
    CacheError
        The store cannot be reached, read or written. All methods raise it too.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        refuse_credentials(url)
        self.url = url
        is_url = re.match(r"[A-Za-z0-9+.-]+:/", url) is not None  # also s3:/bucket, a mistake
        is_local = not is_url or url.startswith(("file://", hub.SCHEME))
        address = hub.snapshot(url) if url.startswith(hub.SCHEME) else url.removeprefix("file://")
        folder = Path(address).absolute()
        if is_local and not create and not folder.is_dir():
            raise CacheNotFoundError(f"{url}: there is no such folder")
        if not is_local and not url.startswith(SCHEMES):
            raise ConfigError(f"{url}: a cache is a folder or begins with one of {' '.join(SCHEMES)}")
        with plain_errors(url):
            self._folder = Folder(folder, create=create) if is_local else None
        self._object_stores: dict[int, ObjectStore] = {}
        if self._folder is None:
            _ = self.objects

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_object_stores": {}}

    @property
    def objects(self) -> Folder | ObjectStore:
        """The backend. Connections and threads belong to one process, so each process has its own."""
        if self._folder is not None:
            return self._folder
        if os.getpid() not in self._object_stores:
            with plain_errors(self.url):
                self._object_stores[os.getpid()] = ObjectStore(self.url)
        return self._object_stores[os.getpid()]

    def read(self, key: str, limit: int = MAX_BYTES) -> bytes | None:
        """Return the object, or None if it does not exist; raise TooLargeError above ``limit`` bytes."""
        with plain_errors(f"{self.url}/{key}"):
            return self.objects.read(key, limit)

    def read_all(self, limits: Mapping[str, int]) -> list[bytes | None]:
        """Read objects concurrently; None for an object that is missing or larger than its limit in bytes."""

        def read(item: tuple[str, int]) -> bytes | None:
            with contextlib.suppress(TooLargeError):
                return self.read(*item)
            return None

        return list(self.map(read, list(limits.items())))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return bytes ``start`` to ``end`` for each ``(key, start, end)``, with one request per object.

        A negative start counts from the object's end.
        """
        objects, positions = self.objects, defaultdict[str, list[int]](list)
        for position, (key, _, _) in enumerate(ranges):
            positions[key].append(position)

        def read_object(key: str) -> list[bytes]:
            with plain_errors(f"{self.url}/{key}"):
                return objects.read_ranges(key, [ranges[position][1:] for position in positions[key]])

        chunks = dict[int, bytes]()
        for key, parts in zip(positions, self.map(read_object, list(positions)), strict=True):
            chunks |= zip(positions[key], parts, strict=True)
        return [chunks[position] for position in range(len(ranges))]

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Apply ``function`` to the items in order; concurrently for an object store."""
        # A local read takes less time than handing it to another thread.
        objects = self.objects
        return (objects.map if isinstance(objects, ObjectStore) else map)(function, items)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return every key under ``prefix`` with the object's size in bytes."""
        with plain_errors(f"{self.url}/{prefix}"):
            return self.objects.sizes(prefix)


@contextlib.contextmanager
def plain_errors(where: str) -> Iterator[None]:
    """Turn errors of the backend into CacheErrors of one line that begins with ``where``."""
    try:
        yield
    except (NotFoundError, FileNotFoundError) as error:
        raise CacheError(f"{where}: is missing") from error
    except OverflowError as error:
        raise TooLargeError(f"{where}: {error}") from error
    except (PermissionDeniedError, PermissionError) as error:
        raise UnreachableError(f"{where}: Permission denied") from error
    except (BaseError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if METADATA_SERVICE in reason:
            reason = NO_CREDENTIALS
        raise UnreachableError(f"{where}: {(reason.splitlines() or [type(error).__name__])[0]}") from error
