"""The JSON schema of the configurations, and the reference docs/configuration.md made from it."""

import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from ddk_cache.configuration import SCHEMAS, Config


def names() -> list[str]:
    """Return the names of the configurations of all installed stages."""
    return sorted(entry_points(group=SCHEMAS).names)


def schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a configuration, for editors that validate YAML."""
    (point,) = entry_points(group=SCHEMAS, name=name)
    model: type[Config] = point.load()
    return model.model_json_schema()


def reference(name: str) -> str:
    """Return a configuration as Markdown: a table of its keys, and one for each configuration inside it."""
    whole = schema(name)
    lines = [f"## `ddk-cache {name}`", "", *_table(whole)]
    for inner, part in whole.get("$defs", {}).items():
        if "properties" in part:
            about = _one_line(part.get("description", "").partition("\n\n")[0])
            lines += ["", f"### {inner}", "", about, "", *_table(part)]
    return "\n".join(lines) + "\n"


def _table(part: dict[str, Any]) -> Iterator[str]:
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for key, field in part["properties"].items():
        default = "required" if key in part.get("required", ()) else f"`{_default(field)}`"
        about = _one_line(field.get("description", "")).replace("|", "\\|")
        yield f"| `{key}` | {_type(field)} | {default} | {about} |"


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "…" if isinstance(value, dict) and value else json.dumps(value, ensure_ascii=False)


def _type(field: dict[str, Any]) -> str:
    """Return a field's type and bounds, such as "integer ≥ 2 or null"."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, options)))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    if kind == "object":
        return f"map to {_type(_values(field))}"
    return " ".join([kind, ", ".join(_bounds(field, "," if kind == "integer" else "g"))]).strip()


def _values(field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a map's values."""
    values = field.get("additionalProperties")
    if isinstance(values, dict):
        return values
    return next(iter(field.get("patternProperties", {}).values()), {})


def _bounds(field: dict[str, Any], number_format: str) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return (f"{sign} {field[key]:{number_format}}" for key, sign in signs.items() if key in field)


def _one_line(text: str) -> str:
    return " ".join(text.split())
