"""The engine starts before anything is tokenised, and only where there is something to answer."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.builds import objects, write_config, write_corpus
from helpers.models import make_model

import ddk_cache
from ddk_build import build
from ddk_build.build import build_cache
from ddk_build.capture.check import checked_teacher
from ddk_build.capture.samples import tokenised_documents
from ddk_build.config import BuildConfig
from ddk_cache.cache.verify import verify
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.util.configuration import load
from tools.torture.subject import comparable


def make_config(folder: Path, teacher: Path, **changes: Any) -> BuildConfig:
    return load(
        write_config(folder / "build.yaml", teacher, write_corpus(folder), **changes), [], BuildConfig
    )


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """For each engine that was started, whether there were tokens by then."""
    found: list[bool] = []

    def starting(*arguments: Any) -> Any:
        found.append(any((tmp_path / "cache").glob("*/*/tokens/c/*")))
        return checked_teacher(*arguments)

    monkeypatch.setattr(build, "checked_teacher", starting)
    return found


@pytest.mark.parametrize("target", [{"top_k": 8}, {"kind": "label"}], ids=["topk", "label"])
def test_it_starts_first_and_once(
    tmp_path: Path, teacher_folder: Path, starts: list[bool], target: dict[str, Any]
) -> None:
    config = make_config(tmp_path, teacher_folder, target=target)
    build_cache(config)
    assert starts == [False]
    built = objects(tmp_path / "cache")
    build_cache(config)
    assert starts == [False]  # all is answered
    shutil.rmtree(tmp_path / "cache" / "tail" / "train" / "commits")
    build_cache(config)
    assert starts == [False, True]
    assert objects(tmp_path / "cache") == built


@pytest.mark.parametrize("changes", [{}, {"seq_length": 32}], ids=["as before", "shorter rows"])
def test_another_teacher_behind_one_that_did_not_start(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Nothing that was taken for the first, with its tokenizer, is given to the second."""
    other = make_model(tmp_path / "other", vocab_size=300, seed=3)
    config = make_config(tmp_path, other, **changes)
    build_cache(config)
    built = comparable(objects(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")

    def failing(*arguments: Any) -> Any:
        raise ConfigError("the engine does not start")

    first = make_config(tmp_path, teacher_folder)
    with monkeypatch.context() as patched:
        patched.setattr(build, "checked_teacher", failing)
        with pytest.raises(ConfigError, match="does not start"):
            build_cache(first)
    build_cache(config)
    assert comparable(objects(tmp_path / "cache")) == built


def test_a_codebook_that_codes_nothing_is_not_the_next_teachers(tmp_path: Path, teacher_folder: Path) -> None:
    """Without its domains a cache binds nobody, and another teacher may have another vocabulary."""
    config = make_config(tmp_path, make_model(tmp_path / "other", vocab_size=300, seed=3))
    build_cache(config)
    built = comparable(objects(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    build_cache(make_config(tmp_path, teacher_folder))
    for name in config.domains:
        shutil.rmtree(tmp_path / "cache" / name)
    build_cache(config)
    assert comparable(objects(tmp_path / "cache")) == built


def test_tokens_only_starts_none_and_the_build_behind_it_needs_no_source(
    tmp_path: Path, teacher_folder: Path, starts: list[bool]
) -> None:
    config = make_config(tmp_path, teacher_folder)
    build_cache(config, tokens_only=True)
    assert starts == []
    for source in tmp_path.glob("*.jsonl"):
        source.unlink()
    build_cache(config)
    assert starts == [True]
    assert not list(verify(config.cache))


def test_more_tokens_start_it_again(tmp_path: Path, teacher_folder: Path, starts: list[bool]) -> None:
    config = make_config(tmp_path, teacher_folder)
    code = config.domains["code"].model_copy(update={"max_tokens": 1200})
    small = config.model_copy(update={"domains": config.domains | {"code": code}})
    build_cache(small)
    build_cache(config)
    assert starts == [False, True]
    assert not list(verify(config.cache))


def test_an_engine_that_cannot_start_leaves_the_texts_alone(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise ConfigError("teacher: too little memory")

    monkeypatch.setattr(build, "checked_teacher", failing)
    config = make_config(tmp_path, teacher_folder)
    with pytest.raises(ConfigError, match="too little memory"):
        build_cache(config)
    assert not list((tmp_path / "cache").glob("*/*/tokens"))
    monkeypatch.setattr(build, "checked_teacher", checked_teacher)
    build_cache(config)
    assert not list(verify(config.cache))


def test_the_check_passes_over_shards_without_a_label() -> None:
    """The first may be of a question alone."""
    plain = np.ones((2, 8), np.uint16)

    class Tokenised:
        manifest = SimpleNamespace(shard_rows=2)

        def split_state(self, *_: str) -> SimpleNamespace:
            return SimpleNamespace(rows=4)

        def read_tokens(self, _: str, split: str, shard: int) -> dict[str, np.ndarray]:
            mask = np.ones((2, 8), np.bool_) & (np.arange(8) < 7) & (shard == self.labelled)
            return {"tokens": plain.astype(np.int32), "segments": plain, "loss_mask": mask}

        def __init__(self, labelled: int) -> None:
            self.labelled = labelled

    assert len(tokenised_documents(Tokenised(1), "any")) == 2  # type: ignore[arg-type]
    assert tokenised_documents(Tokenised(2), "any") == []  # type: ignore[arg-type]


def test_what_is_lost_before_the_end_is_answered_again(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, teacher_folder)
    expected = objects(build_cache(config).storage._folder.path)  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "cache")
    finalize, losses = build.finalize, list[str]()

    def losing(writer: Any) -> Any:
        if len(losses) < most:
            path = next((tmp_path / "cache").glob("*/train/gaps/c/0/0"))
            path.unlink()
            losses.append(str(path))
        return finalize(writer)

    monkeypatch.setattr(build, "finalize", losing)
    most = 1
    build_cache(config)
    assert comparable(objects(tmp_path / "cache")) == comparable(expected)
    shutil.rmtree(tmp_path / "cache")
    losses.clear()
    most = 2
    with pytest.raises(CacheError, match="train shard 0: objects that this build wrote or saw are missing"):
        build_cache(config)
    assert not ddk_cache.open_cache(tmp_path / "cache", allow_incomplete=True).complete
    build_cache(config)
    assert comparable(objects(tmp_path / "cache")) == comparable(expected)


@pytest.mark.parametrize("verified", [False, True])
def test_a_codebook_of_another_build_costs_nothing_unasked(
    tmp_path: Path, teacher_folder: Path, verified: bool
) -> None:
    (tmp_path / "other").mkdir()
    build_cache(make_config(tmp_path / "other", teacher_folder, target={"top_k": 5}))
    config = make_config(tmp_path, teacher_folder)
    build_cache(config)
    cache = tmp_path / "cache"
    before = objects(cache)
    for group in ("ddk.codebook", "ddk.codebook-0-copy"):
        shutil.move(cache / group, tmp_path / group)
        shutil.copytree(tmp_path / "other" / "cache" / group, cache / group)
    if verified:
        assert any("did not encode tail: put it back" in str(problem) for problem in verify(str(cache)))
    with pytest.raises(ConfigError, match=r"codebook: is lost or of another build: .* add --yes"):
        build_cache(config)
    with pytest.raises(CacheError):
        ddk_cache.open_cache(cache)
    for group in ("ddk.codebook", "ddk.codebook-0-copy"):  # put back, as the message says
        shutil.rmtree(cache / group)
        shutil.copytree(tmp_path / group, cache / group)
    build_cache(config)
    assert objects(cache) == before
    for group in ("ddk.codebook", "ddk.codebook-0-copy"):
        shutil.rmtree(cache / group)
    build_cache(config, yes=True)
    assert not list(verify(str(cache)))
    assert objects(cache) == before
