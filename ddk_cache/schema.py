"""The configurations' JSON schema, and the reference that is made from it (docs/configuration.md)."""

import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from ddk_cache.configuration import SCHEMAS, Config


def names() -> list[str]:
    """The configurations that installed stages have."""
    return sorted(entry_points(group=SCHEMAS).names)


def schema(name: str) -> dict[str, Any]:
    """The JSON schema of a configuration, ready for an editor that checks YAML."""
    (point,) = entry_points(group=SCHEMAS, name=name)
    model: type[Config] = point.load()
    return model.model_json_schema()


def reference(name: str) -> str:
    """The configuration in Markdown: a table of keys, and one for each configuration inside it."""
    whole = schema(name)
    lines = [f"## `ddk-cache {name}`", "", *_table(whole)]
    for inner, part in whole.get("$defs", {}).items():
        if "properties" in part:
            lines += ["", f"### {inner}", "", _first_paragraph(part), "", *_table(part)]
    return "\n".join(lines) + "\n"


def _table(part: dict[str, Any]) -> Iterator[str]:
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for key, field in part["properties"].items():
        default = "required" if key in part.get("required", ()) else f"`{_default(field)}`"
        yield f"| `{key}` | {_type(field)} | {default} | {_cell(field.get('description', ''))} |"


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "…" if isinstance(value, dict) and value else json.dumps(value, ensure_ascii=False)


def _type(field: dict[str, Any]) -> str:
    """A field's type in words, with its bounds."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field or "oneOf" in field:
        return " or ".join(dict.fromkeys(map(_type, field.get("anyOf") or field["oneOf"])))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    if kind == "object":
        values = field.get("additionalProperties")
        inner = (
            values
            if isinstance(values, dict)
            else next(iter(field.get("patternProperties", {}).values()), {})
        )
        return f"map to {_type(inner)}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {field[key]:{',' if kind == 'integer' else 'g'}}"
        for key, sign in signs.items()
        if key in field
    ]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _first_paragraph(part: dict[str, Any]) -> str:
    return " ".join(part.get("description", "").partition("\n\n")[0].split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
