"""While the first domain is answered the others are tokenised, and the same cache comes out."""

from pathlib import Path
from typing import Any

import pytest
from builds import comparable, objects, write_config, write_corpus

from ddk_build import arrivals
from ddk_build.arrivals import Arrivals
from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_cache.configuration import load
from ddk_cache.errors import ConfigError


def make_config(folder: Path, teacher: Path, cache: str, **changes: Any) -> BuildConfig:
    path = write_config(folder / "build.yaml", teacher, write_corpus(folder), **changes)
    return load(path, [f"cache={folder / cache}"], BuildConfig)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The domains that had their tokens when another process was started."""
    found: list[set[str]] = []
    original = Arrivals._start

    def start(self: Arrivals) -> Any:
        found.append(set(self._ready))
        return original(self)

    monkeypatch.setattr(Arrivals, "_start", start)
    monkeypatch.setattr(arrivals, "PATIENCE", 0.0)
    return found


def test_the_other_domains_are_tokenised_beside_the_teacher(
    tmp_path: Path, teacher_folder: Path, started: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cache(make_config(tmp_path, teacher_folder, "beside"))
    assert started == [{"code"}]
    monkeypatch.setattr(arrivals, "PATIENCE", 1e9)
    build_cache(make_config(tmp_path, teacher_folder, "before"))
    assert len(started) == 1
    beside, before = (comparable(objects(tmp_path / name)) for name in ("beside", "before"))
    assert set(beside) == set(before)
    assert [key for key in before if beside[key] != before[key]] == []


def test_trouble_beside_the_teacher_ends_the_build(
    tmp_path: Path, teacher_folder: Path, started: list[set[str]]
) -> None:
    config = make_config(tmp_path, teacher_folder, "beside", target={"kind": "label"})
    tail = config.domains["tail"].model_copy(update={"text_column": "nowhere"})
    wrong = config.model_copy(update={"domains": config.domains | {"tail": tail}})
    with pytest.raises(ConfigError, match=r"^domains\.tail: there is no column 'nowhere'"):
        build_cache(wrong)
    assert started == [{"code"}]
