"""Ready configurations that come with the package."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from ddk_cache.errors import ConfigError
from ddk_cache.util.durable import write


@dataclass(frozen=True)
class Recipe:
    """Configurations that belong together. Several recipes may share one build."""

    about: str
    """The first comment line."""
    texts: dict[str, str]
    """By file name: build.yaml and train.yaml, and generate.yaml where a model writes the text."""


def read_recipes() -> dict[str, Recipe]:
    """Return all recipes by name. A recipe without a build trains from another recipe's cache."""
    folders = {
        folder.name: {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
        for folder in (files("ddk_cache") / "recipes").iterdir()
    }
    builds = {
        _cache(texts["build.yaml"]): texts["build.yaml"]
        for texts in folders.values()
        if "build.yaml" in texts
    }
    return {
        name: Recipe(
            about=texts.get("build.yaml", texts["train.yaml"]).partition("\n")[0].lstrip("# "),
            texts={"build.yaml": builds[_cache(texts["train.yaml"])]} | texts,
        )
        for name, texts in sorted(folders.items())
    }


def write_recipe(folder: Path, name: str) -> list[Path]:
    """Write a recipe's files into ``folder``, and return their paths.

    Raises ConfigError, and writes nothing, if the recipe does not exist or one of the files does.
    """
    recipes = read_recipes()
    if name not in recipes:
        raise ConfigError(f"--from {name}: unknown recipe; choose one of {', '.join(recipes)}")
    texts = {folder / file: text for file, text in sorted(recipes[name].texts.items())}
    for path in texts:
        if path.exists():
            raise ConfigError(f"{path}: exists already; move it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write(path, text)
    return list(texts)


def _cache(text: str) -> str:
    return str(yaml.safe_load(text)["cache"])
