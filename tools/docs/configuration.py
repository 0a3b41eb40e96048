"""Write docs/configuration.md from the configurations: ``python -m tools.docs.configuration``."""

import json
from collections.abc import Iterator
from typing import Any

import click
from pydantic import BaseModel

from tools.docs.checkout import ROOT, loaded

PAGE = ROOT / "docs" / "configuration.md"
HEAD = """# Configuration

For those who edit build.yaml, generate.yaml, rounds.yaml or train.yaml: every key; in brackets its type and
its default.
Made from the descriptions in the code by `python -m tools.docs.configuration`.

`ddk-cache init` writes a commented pair of files, `ddk-cache recipes` lists others. Unknown keys are errors.
A key is changed for one run by `--set key.sub=value`.

`ddk-cache schema build`, `generate`, `rounds` and `train` print this page as JSON schema. An editor with a
YAML language server checks a file against it: save it beside the file, and begin the file with
`# yaml-language-server: $schema=build.schema.json`.
"""
LARGEST = 2**53  # a bound beyond this is that of the number's type, not the user's


def page() -> str:
    """Return the whole page."""
    configurations = loaded("ddk_cache.schemas")
    return "\n".join([HEAD, *(reference(name, found) for name, found in configurations.items())])


def reference(name: str, configuration: type[BaseModel]) -> str:
    """Return a configuration as Markdown: a list of its keys, and one for each configuration inside it."""
    whole = configuration.model_json_schema()
    lines = [f"## `ddk-cache {name}`", "", *_keys(whole)]
    for inner, part in whole.get("$defs", {}).items():
        if "properties" in part:
            about = _one_line(part.get("description", "").partition("\n\n")[0])
            lines += ["", f"### {inner}", "", about, "", *_keys(part)]
    return "\n".join(lines) + "\n"


def _keys(part: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each key: a list fits on a phone, a table of four columns does not."""
    for key, field in part["properties"].items():
        default = "required" if key in part.get("required", ()) else f"`{_default(field)}`"
        about = _one_line(field.get("description", ""))
        yield f"- **`{key}`** ({_type(field)}; {default}){about and ': '}{about}"


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
    return (
        f"{sign} {field[key]:{number_format}}"
        for key, sign in signs.items()
        if field.get(key, LARGEST) < LARGEST
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


@click.command(help=__doc__)
def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
