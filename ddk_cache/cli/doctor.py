"""The facts for a bug report: versions, the machine, and what each installed stage reports."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from ddk_cache.errors import CacheError, ConfigError, brief
from ddk_cache.storage.addresses import redact
from ddk_cache.util.packages import package_version

PACKAGES = ("ddk-cache", "numpy", "zarr", "numcodecs", "pcodec", "obstore", "pyarrow", "pydantic", "click")


def facts(url: str | None) -> Iterator[tuple[str, str]]:
    """Yield names and values; with ``url``, whether the cache there can be read. Nothing is written."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield "cpu", f"{os.cpu_count()} cores, {platform.machine()}; memory {memory:,.0f} GiB"
    disk = shutil.disk_usage(Path.cwd())
    yield "disk", f"{disk.free / 2**30:,.0f} GiB free of {disk.total / 2**30:,.0f} GiB in this folder"
    for name in PACKAGES:
        yield name, package_version(name)
    # Functions without arguments that return a stage's facts.
    for point in sorted(entry_points(group="ddk_cache.doctor"), key=lambda point: point.name):
        try:
            yield from point.load()()
        except (ImportError, OSError, RuntimeError) as error:  # a package that does not load
            yield point.name, brief(error)
    if url is not None:
        yield "cache", _access(url)


def _access(url: str) -> str:
    from ddk_cache.cache.metadata import read_manifest
    from ddk_cache.storage.storage import Storage

    try:
        shown = redact(url)
    except ValueError as error:
        return f"is not a valid URL: {brief(error)}"
    try:
        manifest = read_manifest(Storage(url))
    except (CacheError, ConfigError, OSError) as error:
        return " ".join(str(error).replace(url, shown).split())
    content = "no cache" if manifest is None else f"a cache, format {manifest.version}"
    return f"{shown}: readable, {content}"
