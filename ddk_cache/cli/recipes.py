"""Ready configurations that come with the package."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from ddk_cache.errors import ConfigError
from ddk_cache.util.durable import write


@dataclass(frozen=True)
class Recipe:
    """A pair of configurations, as texts. Several recipes may share one build."""

    name: str
    about: str
    """The first comment line."""
    build: str
    train: str


def read_recipes() -> dict[str, Recipe]:
    """Return all recipes by name. One without a build trains from the cache that another recipe builds."""
    texts = {
        f"{folder.name}.{path.name.removesuffix('.yaml')}": path.read_text(encoding="utf-8")
        for folder in (files("ddk_cache") / "recipes").iterdir()
        for path in folder.iterdir()
    }
    builds = {_cache(text): text for key, text in texts.items() if key.endswith(".build")}
    return {
        name: Recipe(
            name=name,
            about=texts.get(f"{name}.build", texts[f"{name}.train"]).partition("\n")[0].lstrip("# "),
            build=builds[_cache(texts[f"{name}.train"])],
            train=texts[f"{name}.train"],
        )
        for name in sorted(key.removesuffix(".train") for key in texts if key.endswith(".train"))
    }


def write_recipe(folder: Path, name: str) -> list[Path]:
    """Write a recipe's ``build.yaml`` and ``train.yaml`` into ``folder``, and return their paths.

    Raises ConfigError, and writes nothing, if the recipe does not exist or one of the files does.
    """
    recipes = read_recipes()
    if name not in recipes:
        raise ConfigError(f"--from {name}: unknown recipe; choose one of {', '.join(recipes)}")
    texts = {folder / "build.yaml": recipes[name].build, folder / "train.yaml": recipes[name].train}
    for path in texts:
        if path.exists():
            raise ConfigError(f"{path}: exists already; move it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write(path, text)
    return list(texts)


def _cache(text: str) -> str:
    return str(yaml.safe_load(text)["cache"])
