"""A cache of another format version is refused in one line that says what to do."""

import re
from pathlib import Path

import pytest
from helpers.caches import VOCABULARY_MAP, edit, make_manifest

import ddk_cache
from ddk_cache.cache.info import info
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import open_writer
from ddk_cache.errors import CacheError

# As version 1 and version 2 wrote them, cut down to what tells them apart; version 1 had no sha256.
VERSION_1 = """{"zarr_format": 3, "node_type": "group", "attributes": {"ddk_cache": {
    "format": "ddk-cache", "version": 1}}}"""
OLDER = (
    r"zarr\.json: has format version [12], and this release reads 3: build the cache again into a new folder$"
)


def refusals(folder: Path) -> list[str]:
    """Return the errors of reading, info, verify and a build."""
    attempts = [
        lambda: ddk_cache.open_cache(str(folder)),
        lambda: info(str(folder)),
        lambda: list(verify(str(folder))),
        lambda: open_writer(str(folder), make_manifest("code", "prose"), VOCABULARY_MAP).__enter__(),
    ]
    lines = []
    for attempt in attempts:
        with pytest.raises(CacheError) as error:
            attempt()
        lines.append(str(error.value))
    return lines


def test_an_older_version_has_to_be_built_again(cache_folder: Path) -> None:
    edit(cache_folder / "zarr.json", lambda manifest: manifest.update(version=2))
    lines = refusals(cache_folder)
    (cache_folder / "zarr.json").write_text(VERSION_1)
    for line in lines + refusals(cache_folder):
        assert re.search(OLDER, line)
        assert "\n" not in line


def test_a_newer_version_asks_for_an_upgrade(cache_folder: Path) -> None:
    edit(cache_folder / "zarr.json", lambda manifest: manifest.update(version=4, more={}))
    for line in refusals(cache_folder):
        assert line.endswith("has format version 4, and this release reads 3: upgrade ddk-cache")
