"""Builds that are killed, that meet each other, and that go on: the same cache comes out, byte for byte."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.builds import finish, kill_when_it_has_written, objects, start, write_config, write_corpus

import ddk_cache
from ddk_cache.cache.info import info
from ddk_cache.cache.verify import verify
from tools.torture.subject import comparable

KILLS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, corpus: dict[str, Path]) -> Path:
    """Return the cache of an uninterrupted build."""
    config = write_config(tmp_path_factory.mktemp("whole") / "build.yaml", teacher_folder, corpus)
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    return config.parent / "cache"


def test_twenty_kills_change_nothing(
    tmp_path: Path, teacher_folder: Path, corpus: dict[str, Path], whole: Path
) -> None:
    chance = random.Random(1)
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus)
    cache = tmp_path / "cache"
    expected = comparable(objects(whole))
    step = len(expected) // KILLS
    kills = 0
    for _ in range(4 * KILLS):
        if not kill_when_it_has_written(start(config), cache, chance.randint(1, 2 * step - 1), chance):
            break
        kills += 1
        assert set(objects(cache)) <= set(expected)
    # Whatever is left of the twenty strikes while nothing new is written: early, in tokenising.
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    while kills < KILLS:
        (cache / "code" / "train" / "commits" / "c" / "0" / "0").unlink()
        kills += kill_when_it_has_written(start(config), cache, 1, chance)
        assert finish(config) == 0
    found = comparable(objects(cache))
    assert set(found) == set(expected)
    assert [key for key in expected if found[key] != expected[key]] == []
    assert not list(verify(str(cache)))


def test_two_builds_at_once(
    tmp_path: Path, teacher_folder: Path, corpus: dict[str, Path], whole: Path
) -> None:
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus)
    both = [start(config), start(config)]
    for process in both:
        process.join(300)
    codes = sorted(process.exitcode for process in both)
    log = config.with_suffix(".log").read_text()
    assert codes[0] == 0, log
    if codes[1]:
        assert codes[1] == 1
        assert "another process" in log
    assert comparable(objects(tmp_path / "cache")) == comparable(objects(whole))


@pytest.mark.parametrize(
    "key", ["code/train/codes/c/1/0", "tail/train/tokens/c/0/0", "code/validation/tokens/c/0/0"]
)
def test_a_damaged_object_is_restored(
    tmp_path: Path, teacher_folder: Path, corpus: dict[str, Path], whole: Path, key: str
) -> None:
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus)
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    data = bytearray((cache / key).read_bytes())
    data[len(data) // 2] ^= 4
    (cache / key).write_bytes(bytes(data))
    problems = [str(problem) for problem in verify(str(cache))]
    assert len(problems) == 1
    domain, split, *_ = key.split("/")
    assert len(info(str(cache))["domains"][domain][split]["shards_missing"]) == 1
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    assert not list(verify(str(cache)))
    assert objects(cache) == objects(whole)


def test_a_cache_grows_without_doing_again_what_is_there(
    tmp_path: Path, teacher_folder: Path, corpus: dict[str, Path]
) -> None:
    code = {"path": "json", "data_files": str(corpus["code"]), "max_tokens": 1500}
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus, domains={"code": code})
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    cache = tmp_path / "cache"
    before, times = objects(cache), {path: path.stat().st_mtime_ns for path in cache.rglob("*/c/*/0")}
    rows = len(ddk_cache.open_cache(str(cache))["code"].train)
    write_config(
        config,
        teacher_folder,
        corpus,
        domains={
            "code": code | {"max_tokens": 2500},
            "tail": {"path": "json", "data_files": str(corpus["tail"])},
        },
    )
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    assert not list(verify(str(cache)))
    grown = ddk_cache.open_cache(str(cache))
    assert grown.domains == ("code", "tail")
    assert len(grown["code"].train) > rows
    last = (rows - 1) // 5  # five rows a shard; the last one was not full
    for path, time in times.items():
        parts = path.relative_to(cache).parts
        if parts[0] == "code" and (parts[1] == "validation" or int(parts[4]) < last):
            assert path.stat().st_mtime_ns == time, path
    old = shutil.copytree(cache, tmp_path / "old")
    shutil.rmtree(old)
    for key, data in before.items():
        target = old / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    mine = ddk_cache.open_cache(str(old))["code"].train.read(range(rows))
    kept = grown["code"].train.read(range(rows))
    for name in ("tokens", "label_logprob"):
        np.testing.assert_array_equal(mine.arrays()[name], kept.arrays()[name])


def test_another_configuration_is_refused(
    tmp_path: Path, teacher_folder: Path, corpus: dict[str, Path], whole: Path
) -> None:
    config = write_config(
        tmp_path / "build.yaml", teacher_folder, corpus, cache=str(whole), seq_length=32, target={"top_k": 4}
    )
    before = objects(whole)
    assert finish(config) == 2
    log = config.with_suffix(".log").read_text()
    assert log.startswith("Error: ")
    assert log.count("\n") == 1
    assert "seq_length: 64 -> 32" in log
    assert "target.top_k: 8 -> 4" in log
    assert objects(whole) == before
