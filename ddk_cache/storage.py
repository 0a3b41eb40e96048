"""A folder or a URL (file:// s3:// gs:// az://) as one kind of store.

``Storage`` only reads. What may be written is a ``LockedStorage`` (lock.py), which exists while its lock is
held: a write that asks no lock cannot be written down.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError

from ddk_cache.addresses import refuse_credentials
from ddk_cache.errors import (
    CacheError,
    CacheNotFoundError,
    ConfigError,
    TooLargeError,
    UnreachableError,
)
from ddk_cache.folder import Folder
from ddk_cache.object_store import ObjectStore

T = TypeVar("T")
R = TypeVar("R")

SCHEMES = ("file://", "s3://", "gs://", "az://")
MOST_BYTES = 1 << 24  # of a document: a stranger's may be of any size


class Storage:
    """The objects of one cache, by key, for reading. It may be pickled; a copy opens its store anew.

    Parameters
    ----------
    url
        A folder, or a URL of one of the schemes above; credentials come from the environment.
    create
        Make the folder if it is not there.

    Raises
    ------
    ConfigError
        The URL is of a kind not known here, or holds credentials.
    CacheNotFoundError
        The folder is not there.
    CacheError
        The place cannot be reached, read or written; so do all methods.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        refuse_credentials(url)
        self.url = url
        is_local = "://" not in url or url.startswith("file://")
        folder = Path(url.removeprefix("file://")).absolute()
        if is_local and not create and not folder.is_dir():
            raise CacheNotFoundError(f"{url}: there is no such folder")
        if not is_local and not url.startswith(SCHEMES):
            raise ConfigError(f"{url}: a cache is a folder or begins with one of {' '.join(SCHEMES)}")
        with plain_errors(url):
            self._folder = Folder(folder, create=create) if is_local else None
        self._buckets: dict[int, ObjectStore] = {}
        if self._folder is None:
            _ = self.objects

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key != "store"}
        return kept | {"_buckets": {}}

    @property
    def objects(self) -> Folder | ObjectStore:
        """Where they lie; a store's connections and threads belong to one process."""
        if self._folder is not None:
            return self._folder
        if os.getpid() not in self._buckets:
            with plain_errors(self.url):
                self._buckets[os.getpid()] = ObjectStore(self.url)
        return self._buckets[os.getpid()]

    @cached_property
    def store(self) -> Any:
        """As obstore has it, for zarr."""
        return self.objects.store

    def read(self, key: str, most: int = MOST_BYTES) -> bytes | None:
        """The whole object; None if there is none. TooLargeError where it has more bytes than ``most``."""
        with plain_errors(f"{self.url}/{key}"):
            return self.objects.read(key, most)

    def read_all(self, most: Mapping[str, int]) -> list[bytes | None]:
        """Whole objects by key, asked for at once; None where there is none of at most that many bytes."""

        def read(item: tuple[str, int]) -> bytes | None:
            with contextlib.suppress(TooLargeError):
                return self.read(*item)
            return None

        return list(self.map(read, list(most.items())))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes ``start`` to ``end`` of each ``(key, start, end)``; a negative start counts from the end.

        An object is asked once for all that is wanted of it. What a connection garbled may come whole when
        it is asked for again.
        """
        objects, places = self.objects, defaultdict[str, list[int]](list)
        for place, (key, _, _) in enumerate(ranges):
            places[key].append(place)

        def read_object(key: str) -> list[bytes]:
            with plain_errors(f"{self.url}/{key}"):
                return objects.read_ranges(key, [ranges[place][1:] for place in places[key]])

        found = dict[int, bytes]()
        for key, chunks in zip(places, self.map(read_object, list(places)), strict=True):
            found |= zip(places[key], chunks, strict=True)
        return [found[place] for place in range(len(ranges))]

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Like the built-in; an object store has several requests under way."""
        # A local read takes less time than handing it to another thread.
        objects = self.objects
        return (objects.map if isinstance(objects, ObjectStore) else map)(function, items)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Every key under ``prefix``, with the object's size in bytes."""
        with plain_errors(f"{self.url}/{prefix}"):
            return self.objects.sizes(prefix)


@contextlib.contextmanager
def plain_errors(where: str) -> Iterator[None]:
    """Turn what the store says into one plain line."""
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
        raise UnreachableError(f"{where}: {(reason.splitlines() or [type(error).__name__])[0]}") from error
