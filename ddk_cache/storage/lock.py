"""The lock of a cache: only its holder may write, and every write checks that the lock is still held.

The lock is an object with the holder's token and heartbeat. It changes hands by compare-and-swap (a file
lock in a folder, a conditional put in an object store), so that only one of two processes gets a stale
lock. A holder that was suspended meanwhile finds another token and stops writing. In a folder, check and
write are one step. In an object store a request may still be under way when the lock changes hands; all it
can leave is a commit record that does not match its shard.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ddk_cache.errors import CacheError, ConfigError, printable
from ddk_cache.storage.hub import SCHEME
from ddk_cache.storage.storage import Storage, plain_errors

logger = logging.getLogger(__name__)

LOCK_KEY = "ddk.lock"
HEARTBEAT = 20.0  # seconds between two heartbeats
STALE = 120.0  # seconds without a heartbeat until a lock is stale
POLL = 1.0  # seconds between two reads of a lock held on another machine


class LockedStorage(Storage):
    """A ``Storage`` that can be written while its write token is valid; made by ``locked`` and ``joined``."""

    def __init__(self, url: str, write_token: str, *, create: bool = False) -> None:
        if url.startswith(SCHEME):
            raise ConfigError(f"{url}: can only be read; build into a folder, then ddk-cache push")
        super().__init__(url, create=create)
        self.write_token = write_token  # the lock's token, or "<token>.<grant>"

    def write(self, key: str, data: bytes) -> None:
        """Write the whole object; raise CacheError if the lock is lost."""
        with plain_errors(f"{self.url}/{key}"):
            self.objects.write(key, data, self._guard)

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        """Write several objects, in any order."""
        list(self.map(lambda item: self.write(*item), list(objects.items())))

    def update(self, objects: Mapping[str, bytes]) -> None:
        """Write the objects that are missing or differ; the last one after all others."""
        stored = self.read_all({key: len(data) for key, data in objects.items()})
        changed = {key: data for (key, data), old in zip(objects.items(), stored, strict=True) if old != data}
        last = {key: changed.pop(key) for key in [*objects][-1:] if key in changed}
        self.write_all(changed)
        self.write_all(last)

    def delete(self, key: str) -> None:
        """Delete the object if it exists; raise CacheError if the lock is lost."""
        with plain_errors(f"{self.url}/{key}"):
            self.objects.delete(key, self._guard)

    def check(self) -> None:
        """Raise CacheError if the lock is lost."""
        with self._guard():
            pass

    def _guard(self) -> contextlib.AbstractContextManager[None]:
        return self.objects.hold(LOCK_KEY, self._check)

    def _check(self, raw: bytes | None) -> None:
        token, _, grant = self.write_token.partition(".")
        lock = _parse(raw)
        if lock.get("token") != token:
            raise CacheError(
                f"{self.url}: this build no longer holds the cache's lock: it has ended, or sent no "
                f"heartbeat for {STALE:.0f} s; nothing was written since; run the build again to resume"
            )
        if grant and grant not in lock["grants"]:
            raise CacheError(f"{self.url}: the build has revoked this engine's right to write")


class Holder(LockedStorage):
    """The lock's holder: sends heartbeats, and may grant other processes the right to write."""

    def __init__(self, url: str) -> None:
        super().__init__(url, secrets.token_hex(16), create=True)
        self._grants: list[str] = []
        self._sending = threading.Lock()

    def grant(self) -> str:
        """Return a write token for another process (``joined``), valid until it is revoked."""
        grant = secrets.token_hex(8)
        self._grants.append(grant)
        self.heartbeat()
        return f"{self.write_token}.{grant}"

    def revoke(self, write_token: str) -> None:
        """Make a granted write token invalid."""
        self._grants.remove(write_token.partition(".")[2])
        self.heartbeat()

    def heartbeat(self) -> None:
        """Renew the lock's timestamp; raise CacheError if the lock is lost."""
        with self._sending, plain_errors(f"{self.url}/{LOCK_KEY}"):
            while True:
                raw, state = self.objects.peek(LOCK_KEY)
                self._check(raw)
                if self.objects.swap(LOCK_KEY, state, self.content()):
                    return

    def content(self) -> bytes:
        """Return the lock's content: token, process, timestamp and granted tokens, as JSON."""
        lock = {"token": self.write_token, "timestamp": time.monotonic(), "grants": self._grants}
        return json.dumps(lock | _identity()).encode()

    def acquire(self, *, wait: bool) -> None:
        """Take the lock; see ``locked``."""
        last, since = b"", 0.0
        while True:
            raw, state = self.objects.peek(LOCK_KEY)
            lock, now = _parse(raw), time.monotonic()
            if lock.get("token") == self.write_token:
                return  # the first attempt of a retried request had arrived
            if raw != last:
                if last and lock.get("token") == _parse(last).get("token"):
                    raise self._taken(lock, 0.0)
                last, since = raw or b"", now
            age = STALE if raw is None else _age(lock, now - since)
            if age >= STALE:
                if self.objects.swap(LOCK_KEY, state, self.content()):
                    return
                continue
            if _shares_clock(lock) or not wait:
                raise self._taken(lock, age)
            if since == now:
                logger.warning(
                    "%s: waiting up to %.0f s for a heartbeat of %s", self.url, STALE, _process_name(lock)
                )
            time.sleep(POLL)

    def release(self) -> None:
        """Remove the lock if this build still holds it."""
        with contextlib.suppress(CacheError), plain_errors(self.url):
            self.heartbeat()  # so that it cannot become stale before it is removed
            _, state = self.objects.peek(LOCK_KEY)
            self.objects.remove(LOCK_KEY, state)

    def _taken(self, lock: dict[str, Any], age: float) -> CacheError:
        return CacheError(
            f"{self.url}: another build ({_process_name(lock)}) is writing here, last heartbeat {age:.0f} s "
            f"ago; wait for it, or, if it is dead, try again in {STALE:.0f} s"
        )


@contextlib.contextmanager
def locked(url: str, *, wait: bool = True) -> Iterator[Holder]:
    """Hold the cache's lock and send a heartbeat every 20 seconds; create the folder if needed.

    A lock is stale, and taken over, when its process is dead or has sent no heartbeat for two minutes. On one
    machine the timestamp tells. A lock from another machine is watched with this process's own clock, unless
    ``wait`` is False.

    Raises CacheError if another build holds the lock.
    """
    holder = Holder(url)
    with plain_errors(url):
        holder.acquire(wait=wait)
    stop = threading.Event()

    def send_heartbeats() -> None:
        while not stop.wait(HEARTBEAT):
            with contextlib.suppress(CacheError):  # the next one follows in 20 s, or the lock is lost
                holder.heartbeat()

    thread = threading.Thread(target=send_heartbeats, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        stop.set()
        thread.join()
        holder.release()


def joined(url: str, write_token: str) -> LockedStorage:
    """Return the cache for a process that writes with a token from ``Holder.grant``.

    Raises CacheError if the cache does not exist or the token is not valid.
    """
    storage = LockedStorage(url, write_token)
    storage.check()
    return storage


def _parse(raw: bytes | None) -> dict[str, Any]:
    """Return a lock's content; empty if it is missing or cannot be read."""
    try:
        lock = json.loads(raw or b"")
        kinds = {"grants": list, "process": int, "timestamp": float}
        return lock if all(isinstance(lock[key], kind) for key, kind in kinds.items()) else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _process_name(lock: dict[str, Any]) -> str:
    return printable(f"process {lock.get('process', '?')} on {lock.get('host', '?')}")


def _identity() -> dict[str, Any]:
    """Describe this process; its id alone may be reused, or occur in another container."""
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _BOOT,
        "namespace": _NAMESPACE,
        "process": process,
        "started": _started(process),
    }


def _started(process: int) -> str | None:
    """Return the start time of a process, in clock ticks since boot; None if it is dead or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _from_kernel(read: Callable[[], str]) -> str:
    """Return ``read()``, or a random value on systems without /proc."""
    try:
        return read().strip()
    except OSError:
        return secrets.token_hex(16)


_BOOT = _from_kernel(lambda: Path("/proc/sys/kernel/random/boot_id").read_text())
_NAMESPACE = _from_kernel(lambda: os.readlink("/proc/self/ns/pid"))


def _shares_clock(lock: dict[str, Any]) -> bool:
    """Return whether the timestamp is from this machine, since its last boot."""
    return bool(lock.get("boot") == _BOOT)


def _age(lock: dict[str, Any], watched: float) -> float:
    """Return the seconds since the last heartbeat; infinity if the process is dead."""
    if not _shares_clock(lock):
        return watched
    if lock.get("namespace") == _NAMESPACE and lock.get("started") != _started(lock["process"]):
        return math.inf
    return time.monotonic() - float(lock["timestamp"])
