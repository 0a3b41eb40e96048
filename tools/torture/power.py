"""Power cuts, imitated: what was not flushed to disk is gone, and the build starts on what is left.

The model of a disk is the weakest that POSIX allows. A file has the content of its last fsync; without one it
is empty. A folder has the entries of its last fsync (``STRICT``), or those of the moment, as file systems
with a journal of metadata keep them (``JOURNAL``). ``MIXED``: each file and folder has, at random, the state
of its last fsync or of the moment, and a file perhaps a part of the latter.
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

MODELS = STRICT, JOURNAL, MIXED = ("strict", "journal", "mixed")
Snapshot = dict[str, bytes]  # what is on disk after a power cut, by path; folders end with "/"
Entries = dict[str, tuple[int, bool]]  # of a folder: inode, and whether it is a folder


class Disk:
    """Follows what of a folder would survive a power cut; takes a snapshot after every step."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cuts: list[tuple[str, str, Snapshot]] = []  # model, step, what is left
        self._contents: dict[int, bytes] = {}  # flushed, by inode
        self._entries: dict[int, Entries] = {}  # flushed, by the folder's inode
        self._lock, self._chance = threading.RLock(), random.Random(1)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the calls of this process."""

        def watching(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(target: Any, *arguments: Any, **options: Any) -> Any:
                with self._lock:
                    result = original(target, *arguments, **options)
                    if name == "fsync":
                        self._flush(target, stack)
                    if self.root.exists():
                        self._cut(f"{name} {target}")
                return result

            return call

        names = ("fsync", "ftruncate", "mkdir", "open", "pwrite", "rename", "replace", "rmdir", "unlink")
        with ExitStack() as stack:
            for path in (self.root, *self.root.rglob("*")) if self.root.exists() else ():
                file = os.open(path, os.O_RDONLY)  # it is on disk before the command begins
                self._flush(file, stack)
                os.close(file)
            for name in names:
                stack.enter_context(mock.patch.object(os, name, watching(name, getattr(os, name))))
            yield

    def _flush(self, file: int, held: ExitStack) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        inode = os.fstat(file).st_ino
        if inode not in self._contents and inode not in self._entries:
            held.callback(os.close, os.dup(file))  # or the kernel gives the inode to another file
        if path.is_dir():
            self._entries[inode] = _entries(path)
        else:
            self._contents[inode] = path.read_bytes()

    def _cut(self, step: str) -> None:
        for model in MODELS:
            snapshot = dict(self._left(self.root.stat().st_ino, self.root, "", model))
            if not self.cuts or snapshot not in [cut[2] for cut in self.cuts[-len(MODELS) :]]:
                self.cuts.append((model, step, snapshot))

    def _left(self, folder: int, path: Path | None, prefix: str, model: str) -> Iterator[tuple[str, bytes]]:
        """Yield what is left of a folder by its inode; ``path`` is where it is now, if it still exists."""
        flushed = self._entries.get(folder, {})
        now = _entries(path) if path else {}
        for name, (inode, is_folder) in (now if path and self._is_kept(model) else flushed).items():
            here = path / name if path and now.get(name) == (inode, is_folder) else None
            if is_folder:
                yield f"{prefix}{name}/", b""
                yield from self._left(inode, here, f"{prefix}{name}/", model)
                continue
            content = self._contents.get(inode, b"")
            if model == MIXED and here and self._is_kept(model):
                after = here.read_bytes()
                is_longer = after.startswith(content)
                content = after[: self._chance.randint(len(content), len(after)) if is_longer else None]
            yield f"{prefix}{name}", content

    def _is_kept(self, model: str) -> bool:
        """Return whether what was not flushed is left all the same."""
        return model == JOURNAL or (model == MIXED and self._chance.random() < 0.5)


def _entries(folder: Path) -> Entries:
    with os.scandir(folder) as entries:
        return {entry.name: (entry.inode(), entry.is_dir()) for entry in entries}


def torture(subject: Subject, seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Run on what is left after power cuts, in random order, until all are done or the time is over."""
    chance, counts, failures = random.Random(seed), Counter[str](), list[str]()
    subject.begin()
    disk = Disk(subject.output)
    with disk.watched():
        subject.run(str(subject.output))
    counts["points"] = len(disk.cuts)
    chance.shuffle(disk.cuts)
    deadline = time.monotonic() + seconds
    for model, step, snapshot in disk.cuts:
        if time.monotonic() > deadline:
            break
        counts["trials"] += 1
        counts[model] += 1
        problems = run_on(subject, snapshot)
        if problems:
            failures.append(f"seed {seed}, {model}, after {step}: {'; '.join(problems[:3])}")
    return counts, failures


def run_on(subject: Subject, snapshot: Snapshot) -> list[str]:
    """Run on what a power cut has left, after a new start of the machine; return what is wrong at the end."""
    shutil.rmtree(subject.output, ignore_errors=True)
    subject.output.mkdir()
    for key, data in snapshot.items():
        path = subject.output / key
        path.mkdir() if key.endswith("/") else path.write_bytes(data)
    module = "ddk_cache.storage.lock"
    try:
        with (
            mock.patch.dict(f"{module}._PROCESS", boot="after"),
            mock.patch(f"{module}.STALE", 0.01),
            mock.patch(f"{module}.POLL", 0.01),
        ):
            subject.run(str(subject.output))
    except Exception as error:
        return [f"the command on what is left: {error!r}"]
    return subject.problems(str(subject.output), stored(subject.output))
