"""The one lock of a cache: whoever holds it may write, and asks at every write whether it still does.

The lock is an object with the holder's token and its last sign of life. It changes hands by compare-and-swap
(a file lock in a folder, a conditional put in an object store), so of two who find it stale one gets it; a
holder that slept meanwhile finds another's token in it, and writes nothing more. In a folder the question and
the write are one step. In an object store a request may still be on its way when the lock changes hands; what
it can leave is a marker that does not fit its shard.
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

from ddk_cache.errors import CacheError, printable
from ddk_cache.storage import Storage, plain_errors

logger = logging.getLogger(__name__)

LOCK_KEY = "ddk.lock"
HEARTBEAT = 20.0  # seconds between two signs of life of a build
STALE = 120.0  # seconds without one, after which a build is taken for dead
GLANCE = 1.0  # seconds between two looks at the lock of a build on another machine


class LockedStorage(Storage):
    """A ``Storage`` that may be written while its write_token is good; made by ``locked`` and ``joined``."""

    def __init__(self, url: str, write_token: str, *, create: bool = False) -> None:
        super().__init__(url, create=create)
        self.write_token = write_token  # token of the lock, or token.member

    def write(self, key: str, data: bytes) -> None:
        """Put the object there, whole; CacheError where the lock is no longer held."""
        with plain_errors(f"{self.url}/{key}"):
            self.objects.write(key, data, self._guard)

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        """Put several objects there, in any order."""
        list(self.map(lambda item: self.write(*item), list(objects.items())))

    def update(self, objects: Mapping[str, bytes]) -> None:
        """Put those there that are missing or others, the last one when all the rest is there."""
        there = self.read_all({key: len(data) for key, data in objects.items()})
        changed = {key: data for (key, data), old in zip(objects.items(), there, strict=True) if old != data}
        last = {key: changed.pop(key) for key in [*objects][-1:] if key in changed}
        self.write_all(changed)
        self.write_all(last)

    def delete(self, key: str) -> None:
        """Delete the object, if it is there; CacheError where the lock is no longer held."""
        with plain_errors(f"{self.url}/{key}"):
            self.objects.delete(key, self._guard)

    def check(self) -> None:
        """Raise CacheError where the lock is no longer held."""
        with self._guard():
            pass

    def _guard(self) -> contextlib.AbstractContextManager[None]:
        return self.objects.keeping(LOCK_KEY, self._check)

    def _check(self, raw: bytes | None) -> None:
        token, _, member = self.write_token.partition(".")
        sign = _parse(raw)
        if sign.get("token") != token:
            raise CacheError(
                f"{self.url}: this build was silent for so long that its lock is gone or another build's; "
                "it has written nothing since; start it again to go on"
            )
        if member and member not in sign["members"]:
            raise CacheError(f"{self.url}: the build has given this engine up; it writes nothing more")


class Holder(LockedStorage):
    """The lock's holder, which gives signs of life and may let other processes write with it."""

    def __init__(self, url: str) -> None:
        super().__init__(url, secrets.token_hex(16), create=True)
        self._members: list[str] = []
        self._signing = threading.Lock()

    def grant(self) -> str:
        """A write_token with which another process may write (``joined``), until it is dismissed."""
        member = secrets.token_hex(8)
        self._members.append(member)
        self.heartbeat()
        return f"{self.write_token}.{member}"

    def revoke(self, write_token: str) -> None:
        """From now on nothing is written with that write_token."""
        self._members.remove(write_token.partition(".")[2])
        self.heartbeat()

    def heartbeat(self) -> None:
        """Give a sign of life; CacheError where the lock is no longer held."""
        with self._signing, plain_errors(f"{self.url}/{LOCK_KEY}"):
            while True:
                raw, version = self.objects.peek(LOCK_KEY)
                self._check(raw)
                if self.objects.swap(LOCK_KEY, version, self.sign_of_life()):
                    return

    def sign_of_life(self) -> bytes:
        return json.dumps(
            {"token": self.write_token, **_identity(), "beat": time.monotonic(), "members": self._members}
        ).encode()

    def acquire(self, *, wait: bool) -> None:
        """See ``locked``."""
        known, since = b"", 0.0
        while True:
            raw, version = self.objects.peek(LOCK_KEY)
            sign, now = _parse(raw), time.monotonic()
            if sign.get("token") == self.write_token:
                return  # a request that was repeated: the first had arrived
            if raw != known:
                if known and sign.get("token") == _parse(known).get("token"):
                    raise self._is_taken(sign, 0.0)
                known, since = raw or b"", now
            silent = STALE if raw is None else _silence(sign, now - since)
            if silent >= STALE:
                if self.objects.swap(LOCK_KEY, version, self.sign_of_life()):
                    return
                continue
            if _shares_clock(sign) or not wait:
                raise self._is_taken(sign, silent)
            if since == now:
                logger.warning(
                    "%s: waiting up to %.0f s for a sign of life of %s", self.url, STALE, _name(sign)
                )
            time.sleep(GLANCE)

    def release(self) -> None:
        """Remove the lock, if it still is this build's."""
        with contextlib.suppress(CacheError), plain_errors(self.url):
            self.heartbeat()  # fresh, so that nobody takes it over before it is gone
            _, version = self.objects.peek(LOCK_KEY)
            self.objects.remove(LOCK_KEY, version)

    def _is_taken(self, sign: dict[str, Any], silent: float) -> CacheError:
        return CacheError(
            f"{self.url}: another build ({_name(sign)}) is writing here, last heard of {silent:.0f} s ago; "
            f"if it is dead, try again in {STALE:.0f} s"
        )


@contextlib.contextmanager
def locked(url: str, *, wait: bool = True) -> Iterator[Holder]:
    """Hold the cache's one lock, with a sign of life every 20 seconds; the folder is made if need be.

    A lock is taken over when its process is known to be dead, or was silent for two minutes: by the clock
    they share on one machine, else by this process's own, which watches for a change (``wait=False``: no).

    Raises
    ------
    CacheError
        Another build is at work here.
    """
    holder = Holder(url)
    with plain_errors(url):
        holder.acquire(wait=wait)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            with contextlib.suppress(
                CacheError
            ):  # a sign missed is given 20 seconds later, or is no more due
                holder.heartbeat()

    heart = threading.Thread(target=beat, name="lock", daemon=True)
    heart.start()
    try:
        yield holder
    finally:
        stop.set()
        heart.join()
        holder.release()


def joined(url: str, write_token: str) -> LockedStorage:
    """The cache for a process that writes with the holder's ``write_token`` (``Holder.grant``).

    Raises
    ------
    CacheError
        There is no such cache, or the write_token is not, or no longer, good.
    """
    found = LockedStorage(url, write_token)
    found.check()
    return found


def _parse(raw: bytes | None) -> dict[str, Any]:
    """A sign of life; empty where there is none or it cannot be read."""
    try:
        sign = json.loads(raw or b"")
        kinds = {"members": list, "process": int, "beat": float}
        return sign if all(isinstance(sign[key], kind) for key, kind in kinds.items()) else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _name(sign: dict[str, Any]) -> str:
    return printable(f"process {sign.get('process', '?')} on {sign.get('host', '?')}")


def _identity() -> dict[str, Any]:
    """Who this process is: its number alone may be another's later, or in another container."""
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _BOOT,
        "space": _SPACE,
        "process": process,
        "started": _started(process),
    }


def _started(process: int) -> str | None:
    """When the process began, in ticks since the machine did; None where there is no such process.

    One that has ended, and that its parent has not asked about yet (a zombie), is none.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _kernel(read: Callable[[], str]) -> str:
    """What /proc says, or, where it says nothing, what no other process has: then nothing is concluded."""
    try:
        return read().strip()
    except OSError:
        return secrets.token_hex(16)


_BOOT = _kernel(lambda: Path("/proc/sys/kernel/random/boot_id").read_text())
_SPACE = _kernel(lambda: os.readlink("/proc/self/ns/pid"))


def _shares_clock(sign: dict[str, Any]) -> bool:
    """Whether it was given on this machine since it started."""
    return bool(sign.get("boot") == _BOOT)


def _silence(sign: dict[str, Any], watched: float) -> float:
    """Seconds without a sign of life; infinity where the process is known to be dead."""
    if not _shares_clock(sign):
        return watched
    if sign.get("space") == _SPACE and sign.get("started") != _started(sign["process"]):
        return math.inf
    return time.monotonic() - float(sign["beat"])
