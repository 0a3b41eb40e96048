"""The objects of a cache as files in one folder.

Reading follows links inside the folder, and the links of a model hub's snapshot to its blobs. Writing follows
none. Pipes, devices and links to other files, which a downloaded cache may hold, are refused.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from obstore.store import LocalStore

from ddk_cache.util.durable import Guard, is_staged, make_folder, open_regular, sync, write

LOCK_TIMEOUT = 30.0  # seconds to wait for another process's file lock, which is held for microseconds
MAX_SWAPPED_BYTES = 1 << 16  # of an object for ``swap``
NO_FILE_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # from file systems without file locks


class Folder:
    """Files by key. Every method raises OSError."""

    def __init__(self, path: Path, *, create: bool) -> None:
        if create:
            path.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()  # the folder itself may be a link
        self._prefix = f"{self.path}/"
        blobs = _hub_blobs(self.path)
        self._readable = (self._prefix,) if blobs is None else (self._prefix, f"{blobs}/")
        self._resolved: dict[str, str] = {}  # folders inside, by key, without links

    @property
    def store(self) -> LocalStore:
        """The folder as obstore has it, for zarr."""
        return LocalStore(self.path)

    def read(self, key: str, limit: int) -> bytes | None:
        """Return the object, or None if it does not exist; raise OverflowError above ``limit`` bytes."""
        try:
            with open(self._open(key), "rb", buffering=0) as file:
                check_size(os.fstat(file.fileno()).st_size, limit)
                return file.read()
        except FileNotFoundError:
            return None

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return bytes ``start`` to ``end`` for each range; a negative start counts from the end."""
        file = self._open(key)
        try:  # a file object, or a Path, would double the time
            size = os.fstat(file).st_size if min(ranges)[0] < 0 else 0
            ranges = [(max(size + start, 0), size) if start < 0 else (start, end) for start, end in ranges]
            return [os.pread(file, end - start, start) for start, end in ranges]
        finally:
            os.close(file)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return key and size in bytes of every regular file; a "#" in the name marks an unfinished file."""
        sizes: dict[str, int] = {}
        folders = [f"{prefix.strip('/')}/" if prefix else ""]
        with contextlib.suppress(FileNotFoundError):
            self._folder(folders[0][:-1])
        links: set[str] = set()
        while folders:
            folder = folders.pop()
            # pathlib would take half of the time for hundreds of thousands of folders.
            with contextlib.suppress(FileNotFoundError), os.scandir(self._prefix + folder) as entries:
                for entry in entries:
                    if entry.is_symlink() and not self._follows(entry, links):
                        continue
                    if entry.is_dir():
                        folders.append(f"{folder}{entry.name}/")
                    elif "#" not in entry.name and entry.is_file():
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            sizes[folder + entry.name] = entry.stat().st_size
        return sizes

    def write(self, key: str, data: bytes, guard: Guard) -> None:
        """Write the whole object so that it survives a power cut; enter ``guard`` for the last step."""
        target = self._target(key)
        make_folder(target.parent)
        write(target, data, guard)

    def delete(self, key: str, guard: Guard) -> None:
        """Delete the object if it exists; enter ``guard`` for it."""
        target = self._target(key)
        with guard():
            target.unlink(missing_ok=True)
        if target.parent.exists():
            sync(target.parent)

    def peek(self, key: str) -> tuple[bytes | None, bytes | None]:
        """Return an object and its state for ``swap``: here the bytes themselves."""
        try:
            with self._exclusive(key) as file:
                data = os.pread(file, MAX_SWAPPED_BYTES, 0) or None
                return data, data
        except FileNotFoundError:
            return None, None

    def swap(self, key: str, before: bytes | None, data: bytes) -> bool:
        """Write the object and return True if its state is still ``before``; else return False."""
        with self._exclusive(key, os.O_CREAT) as file:
            if (os.pread(file, MAX_SWAPPED_BYTES, 0) or None) != before:
                return False
            os.ftruncate(file, os.pwrite(file, data, 0))
            return True

    def remove(self, key: str, before: bytes | None) -> None:
        """Delete the object if its state is still ``before``."""
        with self._exclusive(key) as file:
            if os.pread(file, MAX_SWAPPED_BYTES, 0) == before:
                self._target(key).unlink()

    @contextlib.contextmanager
    def claim(self) -> Iterator[list[int] | None]:
        """Hold the kernel's lock on the folder, which ends with this process at the latest.

        Yield the folder's identity; None where the file system has no such lock, as NFS for folders.

        Raises BlockingIOError if another process holds it.
        """
        file = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _claims.add(file)
        try:
            identity = None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(file)
                identity = [status.st_dev, status.st_ino]
            except OSError as error:
                if error.errno not in (*NO_FILE_LOCKS, errno.EBADF):
                    raise
            yield identity
        finally:
            if file in _claims:  # not in a forked child
                _claims.remove(file)
                os.close(file)

    def remove_staged(self) -> None:
        """Remove the staged files of killed writers. The caller has just taken their lock."""
        for folder, _, names in os.walk(self.path):
            for name in filter(is_staged, names):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{folder}/{name}")

    @contextlib.contextmanager
    def hold(self, key: str, check: Callable[[bytes | None], None]) -> Iterator[None]:
        """Pass the object to ``check``, which may raise; inside, no process can swap or remove it."""
        with contextlib.ExitStack() as stack:
            data = None
            with contextlib.suppress(FileNotFoundError):
                data = os.pread(stack.enter_context(self._exclusive(key)), MAX_SWAPPED_BYTES, 0)
            check(data)
            yield

    @contextlib.contextmanager
    def _exclusive(self, key: str, flags: int = 0) -> Iterator[int]:
        """Yield the file's descriptor while no other process is inside."""
        path, deadline = self._target(key), time.monotonic() + LOCK_TIMEOUT
        while True:
            file = open_regular(path, flags | os.O_RDWR)
            try:
                _lock(file, deadline)
                if _is_at(file, path):
                    yield file
                    return
            finally:
                os.close(file)

    def _open(self, key: str) -> int:
        """Open the file of a key for reading."""
        _check_key(key)
        folder, _, name = key.rpartition("/")
        path = f"{self._folder(folder)}/{name}"
        try:
            return open_regular(path, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        return open_regular(self._resolve(path), os.O_RDONLY)

    def _folder(self, key: str) -> str:
        """Return the path of a folder inside, links resolved."""
        if key not in self._resolved:
            self._resolved[key] = self._resolve(self._prefix + key)
        return self._resolved[key]

    def _resolve(self, path: str) -> str:
        real = os.path.realpath(path, strict=True)
        if not f"{real}/".startswith(self._readable):
            raise OSError(errno.ELOOP, "is a link that leads out of the cache (cp -rL makes a copy without)")
        return real

    def _follows(self, link: os.DirEntry[str], links: set[str]) -> bool:
        """Return whether a listing follows a link: into the cache or its hub, and once into each folder."""
        try:
            real = self._resolve(link.path)
        except OSError:
            return False
        is_new = real not in links or not link.is_dir()
        links.add(real)
        return is_new

    def _target(self, key: str) -> Path:
        """Return the path of a key for writing; refuse a key or a link that leads out of the folder."""
        _check_key(key)
        path = self.path
        for part in key.split("/")[:-1]:
            path = path / part
            if path.is_symlink():
                raise OSError(errno.ELOOP, "is behind a link to a folder, where nothing is written")
        return self.path / key


_claims: set[int] = set()  # open descriptors of ``Folder.claim``


def _close_claims() -> None:
    """Close a forked child's copies, with which a killed parent's locks would live on."""
    while _claims:
        os.close(_claims.pop())


os.register_at_fork(after_in_child=_close_claims)


def check_size(size: int, limit: int) -> None:
    """Raise OverflowError if an object is larger than ``limit`` bytes, before memory is allocated."""
    if size > limit:
        raise OverflowError(f"has {size:,} bytes, more than the {limit:,} that it may have")


def _hub_blobs(path: Path) -> Path | None:
    """Return the folder that the links of a huggingface_hub snapshot lead to.

    Its cache has ``models--x--y/snapshots/<commit>/file``, a link to ``../../blobs/<digest>``.
    """
    snapshots = (folder.parent / "blobs" for folder in path.parents if folder.name == "snapshots")
    return next((blobs for blobs in snapshots if blobs.is_dir()), None)


def _check_key(key: str) -> None:
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise OSError(errno.EINVAL, f"{key!r} is not a valid key")


def _is_at(file: int, path: Path) -> bool:
    """Return whether the path still leads to the open file: another process may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: int, deadline: float) -> None:
    """Wait for the file's lock, which ends with the descriptor."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another process keeps it locked; is it stopped?") from None
            time.sleep(0.001)
        except OSError as error:
            if error.errno in NO_FILE_LOCKS:
                return None  # without file locks, the content alone decides
            raise
