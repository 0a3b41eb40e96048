"""Power cuts, imitated: what was not flushed to disk is gone, and the build starts on what is left.

The model of a disk is the weakest that POSIX allows. A file has the content of its last fsync; without one it
is empty. A folder has the entries of its last fsync (``STRICT``), or those of the moment, as file systems
with a journal of metadata keep them (``JOURNAL``).
"""

import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tools.torture.subject import Subject, stored

MODELS = STRICT, JOURNAL = ("strict", "journal")
Snapshot = dict[str, bytes]  # what is on disk after a power cut, by path


class Disk:
    """Follows what of a folder would survive a power cut; takes a snapshot after every step."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cuts: list[tuple[str, str, Snapshot]] = []  # model, step, what is left
        self._contents: dict[int, bytes] = {}  # flushed, by inode
        self._entries: dict[int, dict[str, int]] = {}  # flushed, by the folder's inode
        self._lock = threading.Lock()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the calls of this process."""

        def watching(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(target: Any, *arguments: Any, **options: Any) -> Any:
                with self._lock:
                    is_new = name == "open" and not os.path.lexists(target)
                    result = original(target, *arguments, **options)
                    if name == "fsync":
                        self._flush(target)
                    elif is_new and str(target).startswith(str(self.root)):
                        self._contents.pop(os.fstat(result).st_ino, None)  # the kernel gives it again
                    if (name != "open" or is_new) and self.root.exists():
                        self._cut(f"{name} {target}")
                return result

            return call

        with ExitStack() as stack:
            for name in ("fsync", "mkdir", "open", "pwrite", "replace", "unlink"):
                stack.enter_context(mock.patch.object(os, name, watching(name, getattr(os, name))))
            yield

    def _flush(self, file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        inode = os.fstat(file).st_ino
        if path.is_dir():
            self._entries[inode] = _entries(path)
        else:
            self._contents[inode] = path.read_bytes()

    def _cut(self, step: str) -> None:
        for model in MODELS:
            snapshot = dict(self._left(self.root, "", model))
            if not self.cuts or snapshot not in [cut[2] for cut in self.cuts[-2:]]:
                self.cuts.append((model, step, snapshot))

    def _left(self, folder: Path, prefix: str, model: str) -> Iterator[tuple[str, bytes]]:
        now = _entries(folder)
        kept = now if model == JOURNAL else self._entries.get(folder.stat().st_ino, {})
        for name, inode in kept.items():
            path = folder / name
            if name in now and path.is_dir():
                yield from self._left(path, f"{prefix}{name}/", model)
            elif name not in now or not path.is_dir():
                yield f"{prefix}{name}", self._contents.get(inode, b"")


def _entries(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}


def torture(subject: Subject, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Build on what is left after power cuts, in random order, until all are done or the time is over."""
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    cache = subject.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    disk = Disk(cache)
    with disk.watched():
        subject.build(str(cache))
    counts["points"] = len(disk.cuts)
    chance.shuffle(disk.cuts)
    deadline = time.monotonic() + seconds
    for model, step, snapshot in disk.cuts:
        if time.monotonic() > deadline:
            break
        counts["trials"] += 1
        counts[model] += 1
        problems = build_on(subject, cache, snapshot)
        if problems:
            failures.append(f"seed {seed}, {model}, after {step}: {'; '.join(problems[:3])}")
    return counts, failures


def build_on(subject: Subject, cache: Path, snapshot: Snapshot) -> list[str]:
    """Build on what a power cut has left; return what is wrong with the cache then."""
    shutil.rmtree(cache, ignore_errors=True)
    for key, data in snapshot.items():
        (cache / key).parent.mkdir(parents=True, exist_ok=True)
        (cache / key).write_bytes(data)
    try:
        subject.build(str(cache))
    except Exception as error:
        return [f"the build on what is left: {error!r}"]
    return subject.problems(str(cache), stored(cache))
