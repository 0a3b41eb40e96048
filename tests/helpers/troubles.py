"""Troubles for a process, to be passed to ``builds.start`` as ``prepare``."""

import ctypes
import resource
import struct


def limit_files(size: int) -> None:
    """Make files fail to grow beyond ``size`` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def obey_permissions() -> None:
    """Drop all capabilities, so that file modes apply to root as well."""
    version_3, nothing = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capset(version_3, nothing) == 0, ctypes.get_errno()


def shorten_retries() -> None:
    """Make requests to an object store time out after seconds instead of minutes."""
    from ddk_cache.storage import object_store

    object_store.RETRY_TIMEOUT = 2.0
