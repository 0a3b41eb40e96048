"""The objects of a cache as files of one folder, which nothing in it leads out of.

A stranger's cache may hold links, pipes and devices: they are refused, never followed or waited for.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

from obstore.store import LocalStore

PATIENCE = 30.0  # seconds that a process waits for one that holds a file's lock, which takes microseconds
LARGEST = 1 << 16  # bytes of an object that is swapped
UNLOCKABLE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems that know no file locks


class Folder:
    """Files by key. Every method raises OSError."""

    def __init__(self, path: Path, *, create: bool) -> None:
        if create:
            path.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()  # the folder itself may be a link of the user's
        self._prefix = f"{self.path}/"
        self._plain: set[str] = set()  # folders inside that were looked at and are no links

    @property
    def store(self) -> LocalStore:
        """For zarr."""
        return LocalStore(self.path)

    def read(self, key: str, most: int) -> bytes | None:
        """The object; OverflowError where it has more bytes than ``most``."""
        try:
            with self._open(key) as file:
                refuse_size(os.fstat(file.fileno()).st_size, most)
                return file.read()
        except FileNotFoundError:
            return None

    def read_ranges(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        file = _open_regular(self._checked(key), os.O_RDONLY | os.O_CLOEXEC)
        try:  # a file object, or a Path, costs as much again as all of this
            size = os.fstat(file).st_size if min(spans)[0] < 0 else 0
            spans = [(max(size + start, 0), size) if start < 0 else (start, end) for start, end in spans]
            return [os.pread(file, end - start, start) for start, end in spans]
        finally:
            os.close(file)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Of regular files; what another process is about to put there has a "#" in its name."""
        found: dict[str, int] = {}
        folders = [f"{prefix.strip('/')}/" if prefix else ""]
        self._locate(f"{folders[0]}any")
        root = f"{self.path}/"  # of hundreds of thousands of folders pathlib would take half of the time
        while folders:
            folder = folders.pop()
            with contextlib.suppress(FileNotFoundError), os.scandir(root + folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{folder}{entry.name}/")
                    elif "#" not in entry.name and entry.is_file(follow_symlinks=False):
                        try:
                            found[folder + entry.name] = entry.stat(follow_symlinks=False).st_size
                        except FileNotFoundError:
                            continue  # deleted meanwhile
        return found

    def write(
        self, key: str, data: bytes, guard: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        """Put the object there, whole, to outlive a power cut; ``guard`` is entered for the last step."""
        target = self._locate(key)
        missing = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f"{target.name}#{secrets.randbits(48)}")
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with guard():
                staged.replace(target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        for folder in (target.parent, *(folder.parent for folder in missing)):
            _sync(folder)

    def delete(self, key: str, guard: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        target = self._locate(key)
        with guard():
            target.unlink(missing_ok=True)
        if target.parent.exists():
            _sync(target.parent)

    def peek(self, key: str) -> tuple[bytes | None, bytes | None]:
        """An object and what ``swap`` knows its state by."""
        try:
            with self._exclusive(key) as file:
                data = os.pread(file, LARGEST, 0) or None
                return data, data
        except FileNotFoundError:
            return None, None

    def swap(self, key: str, before: bytes | None, data: bytes) -> bool:
        """Put the object there if it is still what ``peek`` saw; else False."""
        with self._exclusive(key, os.O_CREAT) as file:
            if (os.pread(file, LARGEST, 0) or None) != before:
                return False
            os.ftruncate(file, os.pwrite(file, data, 0))
            return True

    def remove(self, key: str, before: bytes | None) -> None:
        """Delete the object if it is still what ``peek`` saw."""
        with self._exclusive(key) as file:
            if os.pread(file, LARGEST, 0) == before:
                self._locate(key).unlink()

    @contextlib.contextmanager
    def keeping(self, key: str, check: Callable[[bytes | None], None]) -> Iterator[None]:
        """While inside, nobody swaps or removes the object; ``check`` sees it first and may raise."""
        with contextlib.ExitStack() as stack:
            try:
                found = os.pread(stack.enter_context(self._exclusive(key)), LARGEST, 0)
            except FileNotFoundError:
                found = None
            check(found)
            yield

    @contextlib.contextmanager
    def _exclusive(self, key: str, flags: int = 0) -> Iterator[int]:
        """The file's descriptor, while no other process is in here."""
        path, deadline = self._locate(key), time.monotonic() + PATIENCE
        while True:
            file = os.open(path, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                _refuse_irregular(file)
                _lock(file, deadline)
                if _is_at(file, path):
                    yield file
                    return
            finally:
                os.close(file)

    def _open(self, key: str) -> FileIO:
        return open(self._locate(key), "rb", buffering=0, opener=_open_regular)

    def _locate(self, key: str) -> Path:
        """The file of a key; refuses what leads out of the folder."""
        return Path(self._checked(key))

    def _checked(self, key: str) -> str:
        *folders, name = key.split("/")
        if any(part in ("", ".", "..") for part in (*folders, name)):
            raise OSError(errno.EINVAL, f"{key!r} is no object's name")
        folder = key[: -len(name) - 1]
        if folder not in self._plain:
            path = self.path
            for part in folders:
                path = path / part
                if path.is_symlink():
                    raise OSError(errno.ELOOP, _IS_A_LINK)
            if path.is_dir():
                self._plain.add(folder)
        return f"{self._prefix}{key}"


_IS_A_LINK = "is a link; a cache's own folders and files must not be links (cp -rL makes a copy without)"


def refuse_size(size: int, most: int) -> None:
    """Raise OverflowError, before memory is taken, for an object that is larger than it may be."""
    if size > most:
        raise OverflowError(f"has {size:,} bytes, more than the {most:,} that it may")


def _open_regular(path: str, flags: int) -> int:
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, _IS_A_LINK) from error
        raise
    try:
        _refuse_irregular(file)
    except BaseException:
        os.close(file)
        raise
    return file


def _refuse_irregular(file: int) -> None:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "is not a regular file")


def _is_at(file: int, path: Path) -> bool:
    """Whether the path still leads to the open file: another process may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: int, deadline: float) -> None:
    """Wait for the file's lock; it goes with the descriptor."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process holds it and does not go on") from None
            time.sleep(0.001)
        except OSError as error:
            if error.errno not in UNLOCKABLE:
                raise
            return  # then what the file says is all there is
        else:
            return


def _sync(folder: Path) -> None:
    """Make what was renamed or deleted in the folder outlive a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
