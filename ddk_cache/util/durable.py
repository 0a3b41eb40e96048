"""Write files so that neither a crash, nor a power cut, nor a link in a stranger's folder does harm.

``write(path, data)`` replaces a whole file: afterwards it is the old or the new one. Use ``replacing(path)``
where another library writes the file: it yields a path beside it to write to. ``append(path, data)`` adds to
a log. ``make_folder`` creates folders, ``open_regular`` opens a file for anything else. A link at the path is
replaced by ``write`` and refused by the others. All raise OSError.

Order matters in a power cut: call ``sync(log)`` before writing a file that counts on what was appended.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Guard = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes the context in which a write becomes visible; it raises where writing is no longer allowed."""


def write(path: Path, data: bytes | str, guard: Guard = contextlib.nullcontext) -> None:
    """Replace the whole file, or create it; enter ``guard`` for the last step."""
    with replacing(path, guard) as staged, staged.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path, guard: Guard = contextlib.nullcontext) -> Iterator[Path]:
    """Yield the path of an empty file beside ``path``; at the end flush it to disk and rename it to ``path``.

    Where the block raises, the staged file is removed and ``path`` stays as it was.
    """
    staged = path.with_name(f"{path.name}#{secrets.token_hex(6)}")
    try:
        with open(open_regular(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            with contextlib.suppress(OSError):  # not all file systems have locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield staged
            sync(staged)
            with guard():
                staged.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        if isinstance(error, OSError) and error.filename in (staged, str(staged)):
            error.filename = str(path)  # the file that a user knows
        raise
    sync(path.parent)


def is_staged(name: str) -> bool:
    """Return whether a file of that name is staged: its writer is at work, or was killed."""
    return re.search("#[0-9a-f]{12}$", name) is not None


def remove_staged(paths: Iterable[Path]) -> None:
    """Remove the staged files among ``paths`` whose writers were killed, so that no process locks them."""
    for path in paths:
        if is_staged(path.name):
            with contextlib.suppress(OSError), open(open_regular(path, os.O_WRONLY), "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def append(path: Path, data: bytes | str) -> None:
    """Add to the end of a regular file, or create it. A crash may leave a part of ``data`` there."""
    with open(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def make_folder(path: Path) -> None:
    """Create a folder, and its parents, so that it survives a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def nearest_folder(path: Path) -> Path:
    """Return the folder, or the nearest one above that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_writable(folder: Path) -> None:
    """Make and remove an entry of the folder: permissions alone do not tell, as in /proc."""
    entry = folder / f".ddk#{secrets.token_hex(6)}"
    entry.mkdir()
    entry.rmdir()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def open_regular(path: str | Path, flags: int, *, follow: bool = False) -> int:
    """Open a regular file and return its descriptor; refuse a pipe, and a link unless ``follow``."""
    file = os.open(path, flags | os.O_NOFOLLOW * (not follow) | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is not a regular file")
    return file
