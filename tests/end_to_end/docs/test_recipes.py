"""Every recipe is a valid configuration, and every student's cache is built by a recipe."""

from pathlib import Path

import pytest

from ddk_build.config import BuildConfig
from ddk_build.generate.config import GenerateConfig
from ddk_cache.util.configuration import Config, load
from ddk_train.config import TrainConfig

FOLDER = Path(__file__).parents[3] / "ddk_cache" / "recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))
KINDS: dict[str, type[Config]] = {"build": BuildConfig, "generate": GenerateConfig, "train": TrainConfig}


def read(path: Path) -> Config:
    return load(path, [], KINDS[path.stem])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_is_valid(path: Path) -> None:
    read(path)
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_every_student_has_a_cache_and_every_cache_a_student() -> None:
    configs = [read(path) for path in RECIPES]
    built = {config.cache for config in configs if isinstance(config, BuildConfig)}
    trained = {config.cache for config in configs if isinstance(config, TrainConfig)}
    assert built
    assert trained == built


def test_no_two_recipes_write_to_the_same_folder() -> None:
    configs = [read(path) for path in RECIPES]
    written = [
        next(str(vars(config)[key]) for key in ("output", "output_dir", "cache") if key in vars(config))
        for config in configs
    ]
    assert len(set(written)) == len(written)


def test_a_build_reads_what_its_recipe_generates() -> None:
    for path in sorted(FOLDER.glob("*/generate.yaml")):
        written, build = read(path), read(path.with_name("build.yaml"))
        assert isinstance(written, GenerateConfig)
        assert isinstance(build, BuildConfig)
        expected = {name: f"{written.output}/{name}" for name in written.domains}
        assert {name: domain.path for name, domain in build.domains.items()} == expected
        longest = written.sampling.max_tokens
        assert longest < build.seq_length


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/train.yaml")), ids=lambda path: path.parent.name)
def test_temperatures_agree(path: Path) -> None:
    student = read(path)
    assert isinstance(student, TrainConfig)
    for build in map(read, sorted(FOLDER.glob("*/build.yaml"))):
        if isinstance(build, BuildConfig) and build.cache == student.cache:
            assert student.temperature == build.target.temperature
