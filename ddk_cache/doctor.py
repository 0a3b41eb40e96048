"""What goes into a bug report: versions, the machine, and what each installed stage says of itself."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from urllib.parse import urlsplit

from ddk_cache.errors import CacheError, ConfigError

Fact = tuple[str, str]
GROUP = "ddk_cache.doctor"
"""Entry points of functions without arguments that return facts, since the library knows no stage."""

PACKAGES = ("ddk-cache", "numpy", "zarr", "numcodecs", "pcodec", "obstore", "pyarrow", "pydantic", "click")


def facts(url: str | None) -> Iterator[Fact]:
    """Name and value, one after another; ``url`` is a cache's place whose access is tried, without writing.

    A part that fails says so in its value: a doctor does not fall ill.
    """
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "cpu", f"{os.cpu_count()} cores, {platform.machine()}; memory {_memory()}"
    free = shutil.disk_usage(Path.cwd())
    yield "disk", f"{free.free / 2**30:,.0f} GiB free of {free.total / 2**30:,.0f} GiB here"
    for name in PACKAGES:
        yield name, package_version(name)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        yield from point.load()()
    if url is not None:
        yield "cache", f"{_without_secrets(url)}: {_access(url)}"


def package_version(name: str) -> str:
    """The installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:,.0f} GiB"
    except (ValueError, OSError):
        return "unknown"


def _access(url: str) -> str:
    from ddk_cache.metadata import read_manifest
    from ddk_cache.storage import Storage

    try:
        manifest = read_manifest(Storage(url))
    except (CacheError, ConfigError, OSError) as error:
        return " ".join(str(error).replace(url, _without_secrets(url)).split())
    return "can be read; no cache there" if manifest is None else f"can be read; format {manifest.version}"


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
