"""The checkout and its pyproject.toml, for the pages that are made from them."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    """Return the table ``project`` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def loaded(group: str) -> dict[str, Any]:
    """Return what the entry points of a group in pyproject.toml load, by name, sorted.

    Not those of the installed package: an editable install keeps the entry points of its day.
    """
    points = sorted(project()["entry-points"][group].items())
    return {name: EntryPoint(name, value, group).load() for name, value in points}
