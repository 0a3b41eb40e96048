"""A cache that the release before wrote (format version 1) opens, reads as it did and verifies."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from cache_makers import VOCABULARY_MAP, make_manifest

import ddk_cache
from ddk_cache.errors import ConfigError
from ddk_cache.inspection import as_text, info
from ddk_cache.verification import verify
from ddk_cache.writer import open_writer

DATA = Path(__file__).parent / "data"


@pytest.fixture
def old_cache(tmp_path: Path) -> Path:
    """Written by the code of format version 1: one domain, ``code``; top 3 entries."""
    with zipfile.ZipFile(DATA / "v1.zip") as archive:
        archive.extractall(tmp_path / "cache")
    return tmp_path / "cache"


def test_version_1_reads_to_the_same_rows(old_cache: Path) -> None:
    cache = ddk_cache.open_cache(str(old_cache))
    assert cache.teacher.model == cache["code"].teacher.model == "teacher"
    rows = cache["code"].train.read(range(10))
    with np.load(DATA / "v1_rows.npz") as expected:
        assert set(expected) == set(rows.arrays())
        for name, array in expected.items():
            np.testing.assert_array_equal(getattr(rows, name), array)


def test_version_1_is_verified_and_described(old_cache: Path) -> None:
    assert list(verify(str(old_cache))) == []
    assert "format version 1" in as_text(info(str(old_cache)))


def test_version_1_is_not_extended(old_cache: Path) -> None:
    with (
        pytest.raises(ConfigError, match="version 1, which is read but not extended"),
        open_writer(str(old_cache), make_manifest("code", "more", target={"top_k": 3}), VOCABULARY_MAP),
    ):
        pass
