"""Reads a configuration once, at the edge: YAML, then ``key.sub=value`` overrides, then validation.

Whatever is wrong becomes one line that names the file, the key and what would be right.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ddk_cache.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML in which a key comes once: of two domains of one name the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            seen.append(self.construct_object(key, deep=True))
            if seen[-1] in seen[:-1]:
                problem = f"{seen[-1]!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str], model: type[Model]) -> Model:
    """Read ``path``, apply ``key.sub=value`` overrides (values are YAML) and validate against ``model``.

    Raises
    ------
    ConfigError
        In one line: the file is missing or not YAML, an override has no ``=``, a key is unknown, or a
        value is of the wrong type or out of range.
    """
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {_one_line(str(error))}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as 'cache: runs/cache'")
    for override in overrides:
        _apply(tree, override)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error, model)}") from error


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


def _apply(tree: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override}: must be key=value or key.sub=value")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {override}: the value is not valid YAML: {_one_line(str(error))}"
        ) from error
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {parent!r} holds a value, not keys")
    tree[last] = value


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong, in one line that begins with the key."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{key}: is required"
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _keys(model), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    reason = _one_line(problem["msg"]).removeprefix("Value error, ")
    shown = f" (got {problem['input']!r})" if not isinstance(problem["input"], dict | list) else ""
    return (f"{key}: " if key else "") + f"{reason}{shown}"


def _keys(model: type[BaseModel]) -> list[str]:
    """The names of a model's fields and of those of the models inside it."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        found.append(name)
        pending: list[Any] = [field.annotation]
        while pending:
            kind = pending.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += _keys(kind)
            pending += getattr(kind, "__args__", ())
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
