"""Let calls on the files in some folders fail."""

import builtins
import io
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch

CALLS = (
    *("fsync", "ftruncate", "listdir", "mkdir", "open", "pread", "pwrite"),
    *("rename", "replace", "rmdir", "scandir", "unlink"),
)
FILE_CALLS = ("read", "readinto", "readline", "truncate", "write")
Fail = Callable[[], object]  # raises, or ends the process


class Trigger:
    """Counts calls from all threads and forked processes, and fires at some of them."""

    def __init__(self, *fires_at: int) -> None:
        self.fired, self._fires_at = list[str](), fires_at
        self._calls = multiprocessing.get_context("fork").Value("q", 0)

    @property
    def calls(self) -> int:
        """The calls so far."""
        return int(self._calls.value)

    def fires(self, name: str) -> bool:
        """Count a call; return whether it fails."""
        with self._calls.get_lock():
            self._calls.value += 1
            if self._calls.value in self._fires_at:
                self.fired.append(name)
            return self._calls.value in self._fires_at


@contextmanager
def failing_files(folders: Collection[Path], trigger: Trigger, fail: Fail) -> Iterator[None]:
    """Call ``fail`` in place of a call on a file in the folders when the trigger fires."""
    calls = _Calls(folders, trigger, fail)
    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, calls.failing(name, getattr(os, name))))
        for module in (builtins, io):
            stack.enter_context(mock.patch.object(module, "open", calls.opening(open)))
        save = calls.saving(vars(safetensors.torch)["serialize_file"])
        stack.enter_context(mock.patch.object(safetensors.torch, "serialize_file", save))
        yield


class _Calls:
    """Makes functions that fail out of others."""

    def __init__(self, folders: Collection[Path], trigger: Trigger, fail: Fail) -> None:
        self._folders, self._trigger, self._fail = tuple(map(str, folders)), trigger, fail

    def failing(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of a path or descriptor, which may fail."""

        def call(target: Any = ".", *arguments: Any, **options: Any) -> Any:
            if self._is_inside(target, options.get("dir_fd")):
                self._count(f"{name} {target}")
            return original(target, *arguments, **options)

        return call

    def opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that opens files whose methods may fail."""

        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            if not self._is_inside(target):
                return original(target, *arguments, **options)
            self._count(f"open {target}")
            return _File(
                original(target, *arguments, **options), lambda name: self._count(f"{name} {target}")
            )

        return call

    def saving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that may write half a file of tensors."""

        def call(tensors: Any, path: Any, **options: Any) -> None:
            original(tensors, path, **options)
            if self._is_inside(path) and self._trigger.fires(f"safetensors {path}"):
                os.truncate(path, os.stat(path).st_size // 2)
                self._fail()

        return call

    def _count(self, name: str) -> None:
        if self._trigger.fires(name):
            self._fail()

    def _is_inside(self, target: Any, parent: int | None = None) -> bool:
        with suppress(OSError):
            if parent is not None:
                target = os.path.join(os.readlink(f"/proc/self/fd/{parent}"), target)
            if isinstance(target, int):
                target = os.readlink(f"/proc/self/fd/{target}")
        return str(target).startswith(self._folders)


class _File:
    """An open file, before whose calls ``count`` is called; of a write, after half of it."""

    def __init__(self, file: Any, count: Callable[[str], None]) -> None:
        self._file, self._count = file, count

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._file, name)
        if name not in FILE_CALLS:
            return original

        def call(*arguments: Any) -> Any:
            self._count(name)
            return original(*arguments)

        return self.write if name == "write" else call

    def write(self, data: Any) -> int:
        """Write both halves; between them the call may fail."""
        half = len(data) // 2
        written = self._file.write(data[:half])
        self._file.flush()
        self._count("write")
        return int(written + self._file.write(data[half:]))
