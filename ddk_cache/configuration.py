"""Reads a configuration once, at the edge: YAML, then ``key.sub=value`` overrides, then validation.

Whatever is wrong becomes one line that names the file, the key and what would be right.
"""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ddk_cache.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=Config)


SCHEMAS = "ddk_cache.schemas"  # entry points of the commands' configurations
LARGEST = 16 << 20  # bytes of a file
DEEPEST = 64  # levels
MERGE = "tag:yaml.org,2002:merge"  # the key "<<"
MOST = 100_000  # values, each counted as often as aliases repeat it


class _Loader(yaml.SafeLoader):
    """YAML in which a key comes once: of two domains of one name the first would be lost without a word.

    ``1e6`` is a number, as in YAML 1.2; to PyYAML it is a text. What is nested too deep or grows too large by
    its aliases is refused before it is made.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels", self.get_mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                problem = f"{key.value!r} is given twice"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add(name)
        self._count(node, [part for pair in node.value for part in pair])
        return node

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        node: yaml.SequenceNode = super().compose_sequence_node(anchor)
        self._count(node, node.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what ``<<`` names under the mapping's own keys; PyYAML's own takes a wrong value at times."""
        own = [pair for pair in node.value if pair[0].tag != MERGE]
        names = {(key.tag, str(key.value)) for key, _ in own}
        merged = []
        for key, value in node.value:
            if key.tag != MERGE:
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    problem = "<< must be followed by keys and values, or an alias of such"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                self.flatten_mapping(source)
                for pair in source.value:
                    name = (pair[0].tag, str(pair[0].value))
                    if name not in names:
                        names.add(name)
                        merged.append(pair)
        node.value = merged + own

    def _count(self, node: yaml.Node, parts: Sequence[yaml.Node]) -> None:
        self._sizes[id(node)] = 0  # until it is known that it does not hold itself
        unfinished = [part for part in parts if not isinstance(part, yaml.ScalarNode)]
        if any(not self._sizes.get(id(part)) for part in unfinished):
            raise yaml.composer.ComposerError(
                None, None, "an alias stands inside its own anchor", node.start_mark
            )
        size = 1 + len(parts) + sum(self._sizes[id(part)] for part in unfinished)
        if size > MOST:
            raise yaml.composer.ComposerError(None, None, "holds too many values", node.start_mark)
        self._sizes[id(node)] = size


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, overrides: Sequence[str], model: type[Model]) -> Model:
    """Read ``path``, apply ``key.sub=value`` overrides (values are YAML) and validate against ``model``.

    Raises
    ------
    ConfigError
        In one line: the file is missing or not YAML, an override has no ``=``, a key is unknown, or a
        value is of the wrong type or out of range.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise ConfigError(f"{path}: is larger than {LARGEST >> 20} MiB: no configuration")
        tree = _parse(raw.decode())
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys and values, such as 'cache: runs/cache'")
    for override in overrides:
        _apply(tree, override)
    try:
        found = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_mistaken(tree, model) or first_problem(error, model)}") from error
    meant = flat(found.model_dump())
    for key, value in flat(tree).items():
        if isinstance(value, bool) and type(meant.get(key)) in (int, float):
            raise ConfigError(f"{path}: {key}: must be a number; YAML reads yes, no, on and off as booleans")
    return found


def _parse(text: str) -> Any:
    """What the YAML says, nothing of it shared: changing one domain changes no alias of it.

    Raises yaml.YAMLError.
    """
    try:
        return copy.deepcopy(yaml.load(text, _Loader), _Forgetful())  # a SafeLoader
    except (ValueError, OverflowError) as error:  # of a date or a number that is none
        raise yaml.YAMLError(str(error)) from error


class _Forgetful(dict[int, Any]):
    """A memo that lets ``copy.deepcopy`` copy what it meets again once more."""

    def __setitem__(self, key: int, value: Any) -> None:
        pass


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


def _mistaken(tree: Mapping[str, Any], model: type[BaseModel]) -> str | None:
    """That it is another command's: all keys that one requires are there, and not all of ``model``'s."""
    missing = [key for key in _required(model) if key not in tree]
    for point in entry_points(group=SCHEMAS):
        if missing and all(key in tree for key in _required(point.load())):
            return f"looks like a configuration of ddk-cache {point.name}; here {missing[0]} is required"
    return None


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong, in one line that begins with the key."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    if problem["type"] == "missing":  # a slip in its name is more to the point
        problem = next((one for one in problems if one["type"] == "extra_forbidden"), problem)
    key = ".".join(str(part) for part in problem["loc"] if "[" not in str(part))  # no "list[str]"
    if problem["type"] == "missing":
        return f"{key}: is required"
    if problem["type"] == "extra_forbidden":
        last = str(problem["loc"][-1])
        keys = _keys(model)
        near = keys[last] if last in keys else next(iter(difflib.get_close_matches(last, keys, n=1)), None)
        return f"{key}: unknown key" + (f"; did you mean {near!r}?" if near else "")
    reason = _one_line(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "int_parsing":
        reason += "; write it out, such as 1_000_000"
    if problem["type"] in ("dict_type", "model_type", "model_attributes_type"):
        reason = "must hold keys and values, such as 'name: ...'"
    shown = "" if isinstance(problem["input"], dict | list) else f" (got {problem['input']!r:.200})"
    if problem["input"] is None:
        shown = " (got null, which is what YAML makes of ~ and of no value at all)"
    if isinstance(problem.get("ctx", {}).get("error"), ConfigError):
        shown = ""  # it says itself what may be shown
    return (f"{key}: " if key else "") + f"{reason}{shown}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones, so that a difference names the smallest thing that differs."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inside = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        found |= inside or {f"{prefix}{key}": value}
    return found


def _keys(model: type[BaseModel], place: str = "") -> dict[str, str]:
    """The names of a model's fields and of those of the models inside it, with the whole key of the first."""
    found = {name: f"{place}{name}" for name in model.model_fields}
    for name, field in model.model_fields.items():
        pending: list[tuple[Any, str]] = [(field.annotation, f"{place}{name}.")]
        while pending:
            kind, inside = pending.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found = _keys(kind, inside) | found
            inside += "NAME." if get_origin(kind) is dict else ""
            pending += [(one, inside) for one in getattr(kind, "__args__", ())]
    return found


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line; PyYAML calls every text "<unicode string>"."""
    return _one_line(str(error)).replace(' in "<unicode string>",', " in")


def _one_line(text: str) -> str:
    return " ".join(text.split())
