"""The entry points of the checkout, for pages that are made from what they load."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def loaded(group: str) -> dict[str, Any]:
    """Return what the entry points of a group in pyproject.toml load, by name, sorted.

    Not those of the installed package: an editable install keeps the entry points of its day.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = sorted(project["entry-points"][group].items())
    return {name: EntryPoint(name, value, group).load() for name, value in points}
