"""What a stranger may put into a cache (hostile.py): it is refused, or read right, in little memory."""

import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.caches import VOCABULARY_MAP, make_manifest, read_files, write_domain
from helpers.hostile import CASES

import ddk_cache
from ddk_cache.cache.info import as_text, info
from ddk_cache.cache.reader import Cache
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import open_writer
from ddk_cache.errors import CacheError, printable

MOST_MEMORY = 100 << 20  # bytes; the cache has 60,000


@pytest.fixture(scope="module")
def innocent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("innocent") / "cache"
    with open_writer(str(folder), make_manifest("code"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    return folder


def everything(cache: Cache) -> list[np.ndarray]:
    assert cache.vocabulary == VOCABULARY_MAP
    splits = [split for domain in cache.values() for split in (domain.train, domain.validation)]
    return [values for split in splits for values in split.read(range(len(split))).arrays().values()]


def test_there_are_a_hundred() -> None:
    assert len(CASES) >= 100


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_cache(innocent: Path, tmp_path: Path, name: str) -> None:
    change, expected = CASES[name]
    whole = everything(ddk_cache.open_cache(str(innocent)))
    cache, outside = shutil.copytree(innocent, tmp_path / "cache"), tmp_path / "outside"
    change(cache)
    before = read_files(outside)
    messages: list[str] = []
    tracemalloc.start()
    try:
        read = everything(ddk_cache.open_cache(str(cache)))
        for values, expected_values in zip(read, whole, strict=True):
            np.testing.assert_array_equal(values, expected_values)
    except CacheError as error:
        messages.append(str(error))
    try:
        assert all(line.isprintable() for line in as_text(info(str(cache))).splitlines())
    except CacheError as error:
        messages.append(str(error))
    try:
        problems = [str(problem) for problem in verify(str(cache))]
        assert len(problems) < 50
    except CacheError as error:
        problems = [str(error)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bool(problems) == (expected is not None)
    assert expected is None or re.search(expected, " | ".join(messages + problems))
    assert all(
        printable(line).isprintable() and "\n" not in line and len(line) < 2000
        for line in messages + problems
    )
    assert read_files(outside) == before
    assert peak < MOST_MEMORY
