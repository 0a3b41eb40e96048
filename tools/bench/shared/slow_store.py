"""An object store with latency: obstore on a store in memory, every request delayed."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import obstore
from obstore.store import MemoryStore

URL = "s3://pretended/cache"


class SlowObstore:
    """The module ``obstore``, each of whose functions waits first. A listing is one request a page."""

    def __init__(self, latency: float) -> None:
        self.latency = latency  # seconds
        self.requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        function = getattr(obstore, name)

        def delayed(*arguments: Any, **options: Any) -> Any:
            self._wait(name)
            return function(*arguments, **options)

        return delayed

    def list(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for page in obstore.list(*arguments, **options):
            self._wait("list")
            yield page

    def _wait(self, name: str) -> None:
        self.requests[name] += 1
        time.sleep(self.latency)


@contextmanager
def slow_store(latency: float) -> Iterator[tuple[MemoryStore, SlowObstore]]:
    """Open every bucket URL in one store inside the block; yield it and the counter of its requests."""
    store, functions = MemoryStore(), SlowObstore(latency)
    with (
        patch("ddk_cache.storage.object_store.from_url", lambda _, **options: store),
        patch("ddk_cache.storage.object_store.obstore", functions),
    ):
        yield store, functions
