"""The start files: recipes that come with the package, and a pair of them written where one begins."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from ddk_cache.errors import ConfigError

STAGES = ("build", "train")
DEFAULT = "start"


@dataclass(frozen=True)
class Recipe:
    """A name with the configurations that belong to it, as texts; ``build`` may be another recipe's."""

    name: str
    about: str
    """The first comment line: what it is for."""
    build: str
    train: str


def read_recipes() -> list[Recipe]:
    """All recipes, by name. A student alone (``lora-24gb``) trains from the cache that another one builds."""
    texts = {
        path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8")
        for path in (files("ddk_cache") / "recipes").iterdir()
        if path.name.endswith(".yaml")
    }
    caches = {_cache(text): text for name, text in texts.items() if name.endswith(".build")}
    return [
        Recipe(
            name=name,
            about=texts.get(f"{name}.build", texts[f"{name}.train"]).partition("\n")[0].lstrip("# "),
            build=caches[_cache(texts[f"{name}.train"])],
            train=texts[f"{name}.train"],
        )
        for name in sorted(key.removesuffix(".train") for key in texts if key.endswith(".train"))
    ]


def write_recipe(folder: Path, name: str = DEFAULT) -> list[Path]:
    """Write the recipe's ``build.yaml`` and ``train.yaml`` into ``folder``, and return their paths.

    Raises
    ------
    ConfigError
        There is no such recipe, or one of the files is there already: nothing is written then.
    """
    found = {recipe.name: recipe for recipe in read_recipes()}
    if name not in found:
        raise ConfigError(f"--from {name}: there is no such recipe; there are {', '.join(found)}")
    paths = [folder / f"{stage}.yaml" for stage in STAGES]
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path}: is there already; move it away, or go to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, (found[name].build, found[name].train), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def _cache(text: str) -> str:
    return str(yaml.safe_load(text)["cache"])
