"""Read a configuration once, at the edge: YAML, then ``key.sub=value`` overrides, then validation.

Every mistake becomes one line: the file, the key, and what to write instead.
"""

import difflib
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ddk_cache.errors import ConfigError

MAX_VALUES = 100_000  # in a file, every use of an alias counted


class Config(BaseModel):
    """Base of every configuration: no unknown keys, no infinite numbers, no changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CommandConfig(Config):
    """The configuration of a command."""

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply overrides such as ``"lora.r=8"``, as the command does with ``--set``.

        Raises
        ------
        ConfigError
            In one line: the file, the key and what is wrong.
        """
        return load(path, overrides, cls)

    def to_yaml(self) -> str:
        """Return the text of a file with every key."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


Model = TypeVar("Model", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, and ``1e6`` a number as in YAML 1.2."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse a repeated key, then merge what ``<<`` refers to; the mapping's own keys win."""
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if _identity(key) in seen:
                problem = f"{key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(_identity(key))
        super().flatten_mapping(node)
        # Without repeats, so that merges of merges do not grow exponentially.
        node.value = list({_identity(key): (key, value) for key, value in node.value}.values())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Report a value that does not fit its tag, such as ``!!timestamp x``, with its line."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{str(node.value)[:60]!r} is no {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _identity(key: yaml.Node) -> Hashable:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | os.PathLike[str], overrides: Sequence[str], model: type[Model]) -> Model:
    """Read ``path``, apply ``key.sub=value`` overrides (values are YAML) and validate against ``model``.

    Raises ConfigError, in one line, if the file is missing or not YAML, an override has no ``=``, a key is
    unknown, or a value has the wrong type or is out of range.
    """
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_other_stage(tree, model) or first_problem(error, model)}") from error
    validated = flat(config.model_dump())
    for key, value in flat(tree).items():
        if isinstance(value, bool) and type(validated.get(key)) in (int, float):
            raise ConfigError(f"{path}: {key}: must be a number; YAML reads yes, no, on and off as booleans")
    return config


def has_keys_of(path: str | Path, model: type[BaseModel]) -> bool:
    """Return whether a file can be read and has all keys that a configuration requires."""
    try:
        return _read(path).keys() >= set(_required(model))
    except ConfigError:
        return False


def stage_configurations() -> dict[str, type[Config]]:
    """Return the configurations of the installed stages, by command."""
    points = entry_points(group="ddk_cache.schemas")
    return {point.name: point.load() for point in sorted(points, key=lambda point: point.name)}


def _read(path: str | os.PathLike[str]) -> dict[Any, Any]:
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as 'cache: runs/cache'")
    return tree


def _parse(text: str) -> Any:
    """Return the YAML's value; raise yaml.YAMLError."""
    try:
        return _copy(yaml.load(text, _Loader), count())  # a SafeLoader
    except RecursionError as error:
        raise yaml.YAMLError("is nested too deep") from error
    except ValueError as error:  # an impossible date, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _copy(value: Any, counter: Iterator[int]) -> Any:
    """Copy what aliases share, so that an override changes one of them; bounded against alias bombs."""
    if next(counter) > MAX_VALUES:
        raise yaml.YAMLError(f"holds more than {MAX_VALUES:,} values")
    if isinstance(value, dict):
        return {key: _copy(item, counter) for key, item in value.items()}
    return [_copy(item, counter) for item in value] if isinstance(value, list) else value


def _apply(tree: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override}: must be key=value or key.sub=value")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {_yaml_problem(error)}") from error
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {parent!r} holds a value, not keys")
    tree[last] = value


def _other_stage(tree: Mapping[str, Any], model: type[BaseModel]) -> str | None:
    """Return an error if the file has all keys that another command's configuration requires."""
    missing = [key for key in _required(model) if key not in tree]
    for name, other in stage_configurations().items() if missing else ():
        if all(key in tree for key in _required(other)):
            return f"looks like a configuration of ddk-cache {name}; here {missing[0]} is required"
    return None


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first problem in one line that begins with the key."""
    problems = error.errors(include_url=False)
    # A misspelt key says more than the missing key that was meant.
    misspelt = (problem for problem in problems if problem["type"] == "extra_forbidden")
    problem = next(misspelt, problems[0]) if problems[0]["type"] == "missing" else problems[0]
    key = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))  # no "list[str]"
    if problem["type"] == "missing":
        return f"{key}: is required"
    if problem["type"] == "extra_forbidden":
        last, models = str(problem["loc"][-1]), reversed([*_models(model)])  # of equal names the outermost
        keys = {name: f"{prefix}{name}" for prefix, kind in models for name in kind.model_fields}
        near = keys[last] if last in keys else next(iter(difflib.get_close_matches(last, keys, n=1)), None)
        return f"{key}: unknown key" + (f"; did you mean {near!r}?" if near else "")
    return (f"{key}: " if key else "") + _reason(problem, model)


def _reason(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """Return the reason why a value is wrong, and the value."""
    value = problem["input"]
    reason = _one_line(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "int_parsing":
        reason += "; write it out, such as 1_000_000"
    if problem["type"] in ("dict_type", "model_type", "model_attributes_type"):
        name = problem.get("ctx", {}).get("class_name")
        required = next((_required(kind) for _, kind in _models(model) if kind.__name__ == name), [])
        example = f"{required[0]}: {value}" if required and isinstance(value, str) else "name: ..."
        reason = f"must hold keys and values, such as '{example}'"
    if isinstance(problem.get("ctx", {}).get("error"), ConfigError) or isinstance(value, dict | list):
        return reason  # a ConfigError shows what may be shown
    if value is None:
        return f"{reason} (got null: YAML reads ~ and an empty value so)"
    return f"{reason} (got {value!r:.200})"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys as dotted ones: ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        inside = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        result |= inside or {f"{prefix}{key}": value}
    return result


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return each key whose value has changed, as "key: before -> after"."""
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def _models(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield a model and the models inside it, each after what its dotted keys begin with."""
    yield prefix, model
    for name, field in model.model_fields.items():
        pending: list[tuple[Any, str]] = [(field.annotation, f"{prefix}{name}.")]
        while pending:
            kind, inside = pending.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _models(kind, inside)
            inside += "NAME." if get_origin(kind) is dict else ""
            pending += [(argument, inside) for argument in getattr(kind, "__args__", ())]


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return the problem and its line; PyYAML calls every text "<unicode string>"."""
    problem = _one_line(str(error)).replace(' in "<unicode string>",', " in")
    if "while scanning an alias" in problem:
        problem += "; quote a text that begins with *, such as a glob: '**/*.md'"
    return problem


def _one_line(text: str) -> str:
    return " ".join(text.split())
