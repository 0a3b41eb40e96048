"""Each domain answered by a teacher of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.builds import write_config, write_corpus
from helpers.models import make_model, make_tokenizer

import ddk_cache
from ddk_build import build
from ddk_build.build import build_cache
from ddk_build.config import BuildConfig
from ddk_cache import open_cache
from ddk_cache.cache.verify import verify
from ddk_cache.errors import ConfigError
from ddk_cache.util.configuration import load

RECIPES = Path(ddk_cache.__file__).parent / "recipes"


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher with the first one's tokenizer and other weights."""
    return make_model(tmp_path_factory.mktemp("other"), seed=7)


def make_config(folder: Path, first: Path, teachers: dict[str, Path | None]) -> BuildConfig:
    """Domains in the order of ``teachers``; None is for the common one, ``first``."""
    folder.mkdir(exist_ok=True)
    corpus = write_corpus(folder)
    domains: dict[str, dict[str, Any]] = {}
    for name, teacher in teachers.items():
        domains[name] = {"path": "json", "data_files": str(corpus[name])}
        if teacher is not None:
            domains[name]["teacher"] = {"model": str(teacher)}
    return load(write_config(folder / "build.yaml", first, corpus, domains=domains), [], BuildConfig)


def same_answers(one: str, other: str, name: str) -> bool:
    rows = open_cache(one)[name].train, open_cache(other)[name].train
    everything = np.arange(len(rows[0]))
    left, right = (part.read(everything) for part in rows)
    return all(
        np.array_equal(getattr(left, key), getattr(right, key)) for key in ("tokens", "ids", "logprobs")
    )


def test_each_answers_as_in_a_build_of_its_own(
    tmp_path: Path, teacher_folder: Path, other_folder: Path
) -> None:
    both = make_config(tmp_path / "both", teacher_folder, {"code": None, "tail": other_folder})
    build_cache(both)
    assert not list(verify(both.cache))
    for name, teacher in (("code", teacher_folder), ("tail", other_folder)):
        alone = make_config(tmp_path / name, teacher, {name: None})
        build_cache(alone)
        assert same_answers(both.cache, alone.cache, name)
        assert open_cache(both.cache)[name].teacher.model == str(teacher)


def test_the_recipe_gives_code_to_the_coder_and_the_rest_to_the_generalist(
    tmp_path: Path, teacher_folder: Path, other_folder: Path
) -> None:
    recipe = yaml.safe_load((RECIPES / "two-teachers" / "build.yaml").read_text("utf-8"))
    small = {"cache": str(tmp_path / "cache"), "seq_length": 32, "validation_rows": 2, "target": {"top_k": 8}}
    corpus = list(write_corpus(tmp_path).values())
    for domain in recipe["domains"].values():
        domain.pop("name", None)
        domain |= {"path": "json", "data_files": str(corpus[0]), "streaming": False, "max_tokens": None}
    recipe["teacher"] |= {"model": str(teacher_folder), "engine": "transformers", "dtype": "float32"}
    recipe["domains"]["code"]["teacher"]["model"] = str(other_folder)
    config = BuildConfig.model_validate(recipe | small)
    build_cache(config)
    cache = open_cache(config.cache)
    assert [cache[name].teacher.model for name in ("web", "maths", "code")] == [
        str(teacher_folder),
        str(teacher_folder),
        str(other_folder),
    ]
    assert cache["code"].teacher.dtype == "float32"  # inherited


def test_a_build_that_ends_between_two_teachers_goes_on(
    tmp_path: Path, teacher_folder: Path, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, teacher_folder, {"code": None, "tail": other_folder})
    started: list[str] = []
    checked = build.checked_teacher

    def failing(teacher: Any, *rest: Any) -> Any:
        started.append(teacher.model)
        if len(started) == 2:
            raise KeyboardInterrupt
        return checked(teacher, *rest)

    monkeypatch.setattr(build, "checked_teacher", failing)
    with pytest.raises(KeyboardInterrupt):
        build_cache(config)
    build_cache(config)
    assert started == [str(teacher_folder), str(other_folder), str(other_folder)]
    assert not list(verify(config.cache))


def test_a_new_teacher_comes_behind_those_that_are_there(
    tmp_path: Path, teacher_folder: Path, other_folder: Path
) -> None:
    build_cache(make_config(tmp_path, teacher_folder, {"tail": None}))
    config = make_config(tmp_path, teacher_folder, {"code": other_folder, "tail": None})
    build_cache(config)
    manifest = open_cache(config.cache).manifest
    assert [domain.teacher_index for domain in manifest.domains] == [1, 0]
    assert not list(verify(config.cache))
    with pytest.raises(ConfigError, match=r"domains\.code\.teacher\.model: .*other.* -> "):
        build_cache(make_config(tmp_path, teacher_folder, {"code": None, "tail": None}))


def test_tokenizers_must_agree(tmp_path: Path, teacher_folder: Path) -> None:
    foreign = make_model(tmp_path / "foreign", seed=3)
    make_tokenizer(foreign, 300)
    config = make_config(tmp_path, teacher_folder, {"code": None, "tail": foreign})
    with pytest.raises(
        ConfigError, match=r"domains\.tail\.teacher: its tokenizer differs .* has id .* missing"
    ):
        build_cache(config)
    assert not Path(config.cache).exists()


def test_the_common_teacher_must_be_used(tmp_path: Path, teacher_folder: Path, other_folder: Path) -> None:
    with pytest.raises(ConfigError, match="teacher: no domain uses it"):
        make_config(tmp_path, teacher_folder, {"code": other_folder, "tail": other_folder})
