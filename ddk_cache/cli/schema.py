"""The JSON schema of the configurations of all installed stages."""

from importlib.metadata import entry_points
from typing import Any

from ddk_cache.util.configuration import SCHEMAS, Config


def names() -> list[str]:
    """Return the names of the configurations."""
    return sorted(entry_points(group=SCHEMAS).names)


def schema(name: str) -> dict[str, Any]:
    """Return the JSON schema of a configuration, for editors that validate YAML."""
    (point,) = entry_points(group=SCHEMAS, name=name)
    model: type[Config] = point.load()
    return model.model_json_schema()
