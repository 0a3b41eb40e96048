"""What can befall a process from outside; for ``builds.start``'s ``prepare``."""

import ctypes
import resource
import struct


def limit_files(size: int) -> None:
    """A disk that is full: no file grows beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def obey_permissions() -> None:
    """Give up all capabilities, so that a file's mode binds root as it does everybody."""
    version_3, nothing = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capset(version_3, nothing) == 0, ctypes.get_errno()


def lose_patience() -> None:
    """Give up on an object store after seconds, not minutes."""
    from ddk_cache import object_store

    object_store.RETRY_TIMEOUT = 2.0
