"""The lock of a cache or of a training run: only its holder may write.

``with locked(folder):`` holds it. In a folder the kernel decides between processes of one machine: its lock
(flock) is held exactly as long as the process lives, whatever /proc shows and the clocks say. Between
machines, and in an object store, an object with the holder's token and heartbeat decides. It changes hands
by compare-and-swap (a file lock in a folder, a conditional put in an object store), so that only one of two
processes gets a stale lock.

Every write checks the token, so that a holder that was suspended meanwhile stops writing. In a folder, check
and write are one step. In an object store a request may still be under way when the lock changes hands; all
it can leave is a commit record that does not match its shard.
"""

import contextlib
import json
import logging
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
        """Write the objects that are missing or differ; the last object after all others."""
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
                f"{self.url}: this process no longer holds the lock: it has ended, or sent no heartbeat for "
                f"{STALE:.0f} s; nothing was written since; run the command again to resume"
            )
        if grant and grant not in lock["grants"]:
            raise CacheError(f"{self.url}: the build has revoked this engine's right to write")


class Holder(LockedStorage):
    """The lock's holder: sends heartbeats, and may grant other processes the right to write."""

    def __init__(self, url: str) -> None:
        super().__init__(url, secrets.token_hex(16), create=True)
        self._grants: list[str] = []
        self._claim: list[int] | None = None  # the folder of which the kernel's lock is held
        self._heartbeats = 0
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
        """Renew the lock's heartbeat; raise CacheError if the lock is lost."""
        with self._sending, plain_errors(f"{self.url}/{LOCK_KEY}"):
            while True:
                raw, state = self.objects.peek(LOCK_KEY)
                self._check(raw)
                if self.objects.swap(LOCK_KEY, state, self.content()):
                    return

    def content(self) -> bytes:
        """Return the lock's content: token, process, heartbeat and granted tokens, as JSON."""
        self._heartbeats += 1
        lock = {"token": self.write_token, "heartbeat": self._heartbeats, "grants": self._grants}
        return json.dumps(lock | {"folder": self._claim} | _PROCESS | {"process": os.getpid()}).encode()

    def acquire(self, claims: contextlib.ExitStack, *, wait: bool) -> None:
        """Take the lock; see ``locked``."""
        try:
            self._claim = claims.enter_context(self.objects.claim())
        except BlockingIOError:
            raise self._taken(_parse(self.objects.peek(LOCK_KEY)[0])) from None
        last, since = b"", 0.0
        while True:
            raw, state = self.objects.peek(LOCK_KEY)
            lock, now = _parse(raw), time.monotonic()
            if lock.get("token") == self.write_token:
                return  # the first attempt of a retried request had arrived
            if raw != last:
                if last and lock.get("token") == _parse(last).get("token"):
                    raise self._taken(lock)
                last, since = raw or b"", now
            if raw is None or now - since >= STALE or self._has_ended(lock):
                if self.objects.swap(LOCK_KEY, state, self.content()):
                    return
                continue
            if not wait:
                raise self._taken(lock)
            if since == now:
                logger.warning(
                    "%s: waiting up to %.0f s for a heartbeat of %s", self.url, STALE, _process_name(lock)
                )
            time.sleep(POLL)

    def _has_ended(self, lock: dict[str, Any]) -> bool:
        """Return whether a lock's process has certainly ended."""
        if lock.get("boot") != _PROCESS["boot"]:
            return False
        if lock.get("folder") or self._claim:
            return bool(lock.get("folder") == self._claim)  # it would hold the kernel's lock, which is ours
        if lock.get("namespace") != _PROCESS["namespace"]:
            return False
        try:
            os.kill(lock["process"], 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    def release(self) -> None:
        """Remove the lock if this build still holds it."""
        with contextlib.suppress(CacheError), plain_errors(self.url):
            self.heartbeat()  # so that it cannot become stale before it is removed
            _, state = self.objects.peek(LOCK_KEY)
            self.objects.remove(LOCK_KEY, state)

    def _taken(self, lock: dict[str, Any]) -> CacheError:
        return CacheError(
            f"{self.url}: another process ({_process_name(lock)}) is writing here: wait until it has ended, "
            "or stop it"
        )


@contextlib.contextmanager
def locked(url: str, *, wait: bool = True) -> Iterator[Holder]:
    """Hold the lock of a cache, or of any folder, and send a heartbeat every 20 seconds.

    Creates the folder if needed. A lock whose process has ended is taken over at once. If the process may
    live, as on another machine, the lock is taken after two minutes without a heartbeat, unless ``wait`` is
    False.

    Raises CacheError if another process holds the lock.
    """
    holder = Holder(url)
    with contextlib.ExitStack() as claims:
        with plain_errors(url):
            holder.acquire(claims, wait=wait)
        stop = threading.Event()

        def send_heartbeats() -> None:
            while not stop.wait(HEARTBEAT):
                with contextlib.suppress(CacheError):  # another follows in 20 s, or the lock is lost
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
        kinds = {"grants": list, "process": int, "heartbeat": int}
        return lock if all(isinstance(lock[key], kind) for key, kind in kinds.items()) else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _process_name(lock: dict[str, Any]) -> str:
    return printable(f"process {lock.get('process', '?')} on {lock.get('host', '?')}")


def _from_kernel(read: Callable[[], str]) -> str:
    """Return ``read()``, or a random value on systems without /proc."""
    try:
        return read().strip()
    except OSError:
        return secrets.token_hex(16)


# A process id says nothing in another container, on another machine or after a restart.
_PROCESS = {
    "host": socket.gethostname(),
    "boot": _from_kernel(lambda: Path("/proc/sys/kernel/random/boot_id").read_text()),
    "namespace": _from_kernel(lambda: os.readlink("/proc/self/ns/pid")),
}
