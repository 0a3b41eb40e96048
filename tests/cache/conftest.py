"""A complete cache for the tests of the library."""

import os
from pathlib import Path

import pytest
from helpers.caches import VOCABULARY_MAP, make_manifest, write_domain

from ddk_cache.cache.writer import open_writer


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which takes milliseconds, twice an object: no test survives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    """Return a complete cache with two domains."""
    with open_writer(str(tmp_path / "cache"), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
        write_domain(writer, "prose", 2)
    return tmp_path / "cache"
